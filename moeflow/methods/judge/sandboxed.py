"""The process in which `sandbox` runs a program: it takes limits upon itself, then runs what comes by its standard input.

Run as a script, with Python's own library alone.
"""

import ctypes
import os
import resource
import signal
import sys

NEW_USER, NEW_NET, NEW_PID, NEW_IPC = 0x10000000, 0x40000000, 0x20000000, 0x08000000


def main() -> None:
    seconds, memory, file, told = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    word, _, program = sys.stdin.buffer.read().decode("utf-8", "replace").partition("\n")
    if alone := _unshared():
        os.write(told, b"alone\n")
    if child := os.fork() if alone else 0:  # the child is the first process of its namespace: with it all others end
        _wait(child, seconds)
        return
    for limit, value in {
        resource.RLIMIT_AS: memory, resource.RLIMIT_FSIZE: file, resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CPU: int(seconds) + 1,
    }.items():  # fmt: skip
        resource.setrlimit(limit, (value, value))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    signal.setitimer(signal.ITIMER_REAL, seconds)  # without a handler it ends the process
    sys.argv[:] = ["program"]
    exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    os.write(told, f"{word}\n".encode())
    os._exit(0)


def _unshared() -> bool:
    """Whether this process got namespaces of its own, so that it has no network."""
    try:
        return ctypes.CDLL(None, use_errno=True).unshare(NEW_USER | NEW_NET | NEW_PID | NEW_IPC) == 0
    except (OSError, AttributeError):
        return False


def _wait(child: int, seconds: float) -> None:
    """Wait for the child, and end it when its time is over, asleep or not."""

    def over(*_: object) -> None:
        os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds + 1)
    os.waitpid(child, 0)


if __name__ == "__main__":
    main()
