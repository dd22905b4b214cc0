#!/usr/bin/env bash
# Run .venv's Python. Ray cannot start its processes from a path with a space in it, so there it goes by a link without one.
set -euo pipefail
venv=$(cd "$(dirname "$0")/.." && pwd)/.venv
case "$venv" in
*[[:space:]]*)
    link=${TMPDIR:-/tmp}/moeflow-$(id -u)-$(printf %s "$venv" | cksum | cut -d' ' -f1)
    ln -sfn "$venv" "$link"
    venv=$link
    ;;
esac
export PATH="$venv/bin:$PATH"
exec "$venv/bin/python" "$@"
