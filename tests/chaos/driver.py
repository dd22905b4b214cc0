"""Commands of moeflow as processes of their own, which can be killed, and how they ended."""

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["tests.chaos.warm"])


@dataclass(frozen=True)
class Ended:
    code: int  # the exit code, negative for the signal that killed it
    out: str
    said: str
    hung: bool = False  # it had to be killed after its limit
    seconds: float = 0.0
    as_json: bool = False  # it was asked for

    @property
    def result(self) -> dict[str, Any]:
        """The JSON that the command printed; empty if it printed none."""
        lines = self.out.splitlines()
        return dict(json.loads(lines[-1])) if lines and lines[-1].startswith("{") else {}

    @property
    def improper(self) -> str:
        """What is wrong with how it ended, whatever it did: a traceback, or an error without its line and JSON."""
        if self.hung or self.code < 0:
            return ""
        if "Traceback" in self.said:
            return f"a traceback: {self.said.splitlines()[-1]}"
        last = (self.said.splitlines() or [""])[-1]
        told = not self.as_json or self.result.get("exit") == self.code
        if self.code and not (last.startswith("error: ") and told):
            return f"exit code {self.code} without its line: {last[:300] or 'nothing'}"
        return ""

    @property
    def line(self) -> str:
        return (self.said.splitlines() or [""])[-1][:600]


class Driver:
    """One command that runs: `moeflow WORD...`, forked from a process that has imported what it needs."""

    def __init__(self, words: Sequence[str], folder: Path, *, largest: int = 0, **environment: str) -> None:
        """`largest`: bytes of the largest file that it may write, 0 for no limit."""
        folder.mkdir(parents=True, exist_ok=True)
        n = len([*folder.glob("*.out")])
        self.out, self._said, self._began = folder / f"{n}.out", folder / f"{n}.said", time.monotonic()
        self._as_json = "--json" in words
        self.out.touch()
        self._process = self._start(words, environment, largest)

    def _start(self, words: Sequence[str], environment: Mapping[str, str], largest: int) -> Any:
        process = _forks.Process(target=_command, args=([*words], self.out, self._said, dict(environment), largest))
        process.start()
        return process

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self._began

    def lives(self) -> bool:
        return bool(self._process.is_alive())

    def kill(self) -> bool:
        """SIGKILL; False if it had ended already."""
        if not self.lives():
            return False
        os.kill(self.pid, signal.SIGKILL)
        return True

    def wait(self, seconds: float) -> Ended:
        """Wait for its end; kill it after so many seconds."""
        code = self._join(seconds)
        hung = code is None
        if code is None:
            self.kill()
            code = self._join(60)
        said = self._said.read_text(errors="replace") if self._said.exists() else ""
        return Ended(-9 if code is None else code, self.out.read_text(errors="replace"), said, hung, self.seconds, self._as_json)

    def _join(self, seconds: float) -> int | None:
        self._process.join(seconds)
        code: int | None = self._process.exitcode
        return code


class Program(Driver):
    """The same as a program that is started whole, as Ray's drivers must be."""

    def _start(self, words: Sequence[str], environment: Mapping[str, str], largest: int) -> Any:
        with self.out.open("w") as out, self._said.open("w") as said:
            return subprocess.Popen(
                self.command([*words]),
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
                stdout=out,
                stderr=said,
            )

    def command(self, words: list[str]) -> list[str]:
        """The program and its arguments."""
        return [sys.executable, "-c", "from moeflow.cli import app; app()", *words]

    def lives(self) -> bool:
        return self._process.poll() is None

    def _join(self, seconds: float) -> int | None:
        try:
            return int(self._process.wait(seconds))
        except subprocess.TimeoutExpired:
            return None


def _command(words: list[str], out: Path, said: Path, environment: dict[str, str], largest: int) -> None:
    """What the forked process does."""
    for path, standard in ((out, 1), (said, 2)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(opened, standard)
    os.chdir(ROOT)
    os.environ |= environment
    if largest:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    sys.argv = ["moeflow", *words]
    from moeflow.cli import app

    app(words)
