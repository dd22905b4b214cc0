#!/usr/bin/env bash
# Start a local Ray head, submit pipelines/tiny.py to it as a job, and stop the head again, also on Ctrl-C.
set -euo pipefail
cd "$(dirname "$0")/.."

read -r gcs dashboard client <<<"$(infra/python.sh -c '
import socket
held = [socket.socket() for _ in range(3)]
[s.bind(("127.0.0.1", 0)) for s in held]
print(*(s.getsockname()[1] for s in held))')"
session=$(mktemp -d "${TMPDIR:-/tmp}/moeflow-XXXXXX")
RAY_AUTH_TOKEN=$(infra/python.sh -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0

infra/python.sh -m ray.scripts.scripts start --head --block --node-ip-address 127.0.0.1 --port "$gcs" \
    --dashboard-host 127.0.0.1 --dashboard-port "$dashboard" --ray-client-server-port "$client" \
    --temp-dir "$session" --disable-usage-stats >"$session/head.log" 2>&1 &
head=$!
stop() {
    echo "demo: stopping the Ray head"
    kill -TERM "$head" 2>/dev/null || true
    wait "$head" 2>/dev/null || true
    rm -rf "$session"
}
trap stop EXIT
trap 'exit 130' INT TERM

echo "demo: starting a Ray head"
for _ in $(seq 120); do
    kill -0 "$head" 2>/dev/null || { cat "$session/head.log" >&2; echo "demo: the Ray head did not start" >&2; exit 1; }
    # any answer will do: without the token it is a refusal
    infra/python.sh -c "import http.client as h; h.HTTPConnection('127.0.0.1', $dashboard, timeout=2).request('GET', '/')" \
        2>/dev/null && break
    sleep 0.5
done
# what Ray says of the job's own number and of other commands is left out
RAY_API_SERVER_ADDRESS="http://127.0.0.1:$dashboard" infra/python.sh -m ray.scripts.scripts job submit --log-style record \
    --working-dir . -- python pipelines/tiny.py --store "$PWD/.moeflow/store" 2>&1 |
    grep --line-buffered -v -E '^[0-9-]+ [0-9:,]+\s(INFO|SUCC|WARNING working_dir.py)|^Running entrypoint'
