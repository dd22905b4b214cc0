#!/usr/bin/env bash
# Run tests/gguf in an environment with llama.cpp, built once (fifteen minutes on two cores, 2 GB): .venv-gguf, or $GGUF_VENV.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${GGUF_VENV:-.venv-gguf}
version=0.3.36
stamp=$venv/moeflow-gguf
wanted=$(cat infra/gguf.sh pyproject.toml constraints.txt | cksum)
fail() { echo "test-gguf: $1" >&2; exit 2; }

if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
    command -v c++ >/dev/null || fail "no C++ compiler; install one, on Debian: apt-get install g++"
    echo "test-gguf: installing into $venv, and building llama.cpp there (about fifteen minutes, once)"
    [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv" || fail "no environment could be made in $venv"
    pip() { "$venv/bin/python" -m pip "$@" -qq --disable-pip-version-check; }
    pip install -c constraints.txt -e '.[compress]' torch==2.13.0 pytest sentencepiece protobuf ||
        fail "pip could not install moeflow's packages; what it said stands above"
    # The source package carries the converter, which the installed one has not; its parts for images and its programs are not needed.
    source=$venv/llama_cpp_python-$version
    [ -d "$source" ] || { pip download --no-deps --no-binary llama-cpp-python -d "$venv" "llama-cpp-python==$version" && tar -xzf "$source.tar.gz" -C "$venv"; } ||
        fail "pip could not fetch the source of llama-cpp-python $version"
    parts=$(printf -- '-DLLAMA_BUILD_%s=OFF ' TOOLS EXAMPLES TESTS SERVER)
    "$venv/bin/python" -c "import llama_cpp; assert llama_cpp.__version__ == '$version'" 2>/dev/null ||
        CMAKE_ARGS="-DLLAVA_BUILD=OFF $parts" CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) nice -n 10 "$venv/bin/python" -m pip install -qq \
            --disable-pip-version-check "$source" || fail "llama.cpp could not be built; what was said stands above"
    echo "$wanted" >"$stamp"
fi
# tests/conftest.py is left out: it starts what the other tests need, which is not installed here
OMP_NUM_THREADS=1 exec "$venv/bin/python" -m pytest --confcutdir tests/gguf -p no:cacheprovider tests/gguf "$@"
