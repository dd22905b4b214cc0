"""Run a command, and print the seconds and the peak memory that it took: `peer_process.py LIMIT LOG COMMAND...`.

A process of its own with the standard library alone: Linux counts to a child's peak what its parent held when it was started. The
peak is that of the largest process, of the command and of those that it has started. What the command prints goes to LOG; after
LIMIT seconds it is stopped.
"""

import json
import resource
import subprocess
import sys
import time


def main(limit: str, log: str, *command: str) -> None:
    start = time.perf_counter()
    with open(log, "wb") as out:
        try:
            code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, timeout=float(limit)).returncode
        except subprocess.TimeoutExpired:
            code = None
    took = time.perf_counter() - start
    print(json.dumps({"code": code, "seconds": took, "peak": 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss}))


if __name__ == "__main__":
    main(*sys.argv[1:])
