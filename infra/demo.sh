#!/usr/bin/env bash
# The demo: infra/demo.py with the Python of .venv.
set -euo pipefail
exec "$(dirname "$0")/python.sh" "$(dirname "$0")/demo.py" "$@"
