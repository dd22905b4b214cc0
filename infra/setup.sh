#!/usr/bin/env bash
# Make .venv with the pinned versions, once: it is made again only when pyproject.toml or constraints.txt change.
set -euo pipefail
cd "$(dirname "$0")/.."

stamp=.venv/moeflow-setup
wanted=$(cat pyproject.toml setup.py infra/autoload/* constraints.txt infra/setup.sh | cksum)
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && [ "$(cat .venv/moeflow-place)" = "$PWD" ] && exit 0

fail() { echo "setup: $1" >&2; exit 2; }

command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null ||
    fail "no C++ compiler (c++, g++ or clang++); install one, on Debian: apt-get install g++"
for python in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
done
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || fail "no Python 3.11 or newer; install one"
"$python" -c 'import venv, ensurepip' 2>/dev/null || fail "this Python has no venv; install it, on Debian: apt-get install python3-venv"
free=$(df -Pk . | awk 'NR == 2 {print int($4 / 1024)}')
[ "$free" -ge 6000 ] || fail "$free MiB of disk are free here, and 6,000 are needed for the packages and the demo's results"

echo "setup: installing into .venv (about two minutes, once)"
rm -rf .venv
"$python" -m venv .venv
.venv/bin/python -m pip install -qq --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev]' torch==2.13.0 ||
    fail "pip could not install the packages; what it said stands above"
# Bytecode of what every run imports: where the environment forbids writing it, each process would compile it again, for 9 s.
env -u PYTHONDONTWRITEBYTECODE .venv/bin/python -c 'import ray, moeflow.cli, moeflow.model.passes, moeflow.methods.data.readers' ||
    fail "what pip has installed cannot be imported; what Python said stands above"
echo "$PWD" >.venv/moeflow-place
echo "$wanted" >"$stamp"
