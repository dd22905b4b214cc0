"""The process in which an engine is measured: requests come as lines of JSON on stdin, and each is answered by one on stdout.

A request is `{"do": "load" or "run", ...}` with the arguments of `measuring.Served`, an answer `{"ok": ...}` or `{"error": "one
line"}`. All else that is printed goes to stderr. Where stdin ends, because whoever asked has ended, this process ends at once, with
those that it started.
"""

import json
import os
import queue
import signal
import sys
import threading
from typing import Any

PROTOCOL = 1
"""Raised when a request or an answer changes; both sides must say the same."""


def main(served: Any = None) -> None:
    """Answer requests until stdin ends; `served` has a method for each, vLLM's if it is None."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # an engine prints to stdout, too
    asked: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read, args=(asked,), daemon=True).start()
    served = served or _vllm()
    while True:
        answers.write(json.dumps(_answer(served, asked.get())) + "\n")
        answers.flush()


def _read(asked: "queue.Queue[str]") -> None:
    """Queue the lines of stdin; where it ends, end."""
    for line in sys.stdin:
        asked.put(line)
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)


def _vllm() -> Any:
    from moeflow.serve.measuring import Served

    return Served()


def _answer(served: Any, line: str) -> dict[str, Any]:
    try:
        request = json.loads(line)
        if request.pop("protocol") != PROTOCOL:
            raise ValueError(f"the moeflow here speaks another protocol than {PROTOCOL}; install the same moeflow on both sides")
        return {"ok": getattr(served, request.pop("do"))(**request)}
    except (Exception, SystemExit) as error:  # an engine raises what it likes, and none of it may end the answers
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


if __name__ == "__main__":
    main()
