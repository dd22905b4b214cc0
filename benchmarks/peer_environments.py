"""Other libraries, each in a virtual environment of its own, and commands of theirs and ours as measured processes."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
STAMP = "moeflow-requirements"
THREADS = 2
LIMIT = 3600
"""Seconds after which a command is stopped."""


class NotMeasured(Exception):
    """A peer does not install or does not run here; the message is one line that says why."""


@dataclass(frozen=True)
class Took:
    """What one process took from start to end."""

    seconds: float
    peak: int
    """Bytes of resident memory at the most."""


def folder() -> Path:
    """Where the environments are: MOEFLOW_PEERS, or else the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MOEFLOW_PEERS") or Path(cache) / "moeflow" / "peers")


def python_with(name: str, requirements: tuple[str, ...]) -> Path:
    """The Python of the environment `name`, which is made unless it is there with these requirements.

    Raises NotMeasured where it cannot be made.
    """
    place = folder() / name
    python, stamp, wanted = place / "bin" / "python", place / STAMP, "\n".join(requirements)
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    place.parent.mkdir(parents=True, exist_ok=True)
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(place)],
        [str(python), "-m", "pip", "install", "-q", *requirements],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise NotMeasured(f"does not install: {_reason(done.stderr or done.stdout)}")
    stamp.write_text(wanted)
    return python


def measured(command: list[str], log: Path) -> Took:
    """Run a command on THREADS threads. Raises NotMeasured where it fails, with the last line of what it printed."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(THREADS))
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
    words = [sys.executable, "-I", str(HERE / "peer_process.py"), str(LIMIT), str(log), *command]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ | threads | offline, cwd=HERE.parent)
    told = json.loads(done.stdout)
    if told["code"] is None:
        raise NotMeasured(f"did not end within {LIMIT:,} s")
    if told["code"]:
        raise NotMeasured(f"does not run: {_reason(log.read_text(errors='replace'))}")
    return Took(told["seconds"], told["peak"])


def _reason(printed: str) -> str:
    """The line that says what went wrong: pip's first error, or else the last exception, or else the last line."""
    lines = [line.strip() for line in printed.replace("\r", "\n").splitlines() if line.strip()]
    of_pip = [line for line in lines if line.startswith("ERROR: ")]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (of_pip[:1] or errors[-1:] or lines[-1:] or ["it printed nothing"])[0][:200].replace("|", "/")
