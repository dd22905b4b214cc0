"""Start a Ray head of its own, submit pipelines/tiny.py to it as a job, show how that goes, and stop the head, also on Ctrl-C.

    infra/python.sh infra/demo.py [--store URL]

Nothing of another Ray on this machine is touched: every port is a free one. If anything fails, the head's folder stays, and its
place is said.
"""

import argparse
import asyncio
import logging
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).resolve().parents[1]
PORTS = (
    "port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port",
    "metrics-export-port", "runtime-env-agent-port", "node-manager-port", "object-manager-port",
)  # fmt: skip
PATIENCE = 180.0  # seconds for a head to take a job
STEP = re.compile(r"\[\s*(\d+)/(\d+)\] (.*)")


class Failed(Exception):
    """Why the demo cannot go on, in one line."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default=str(ROOT / ".moeflow" / "store"), help="(default: %(default)s)")
    store = parser.parse_args().store
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    logging.disable(logging.WARNING)  # what Ray's client says of its own connections
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    folder = Path(tempfile.mkdtemp(prefix="moeflow-", dir=_short()))
    try:
        with head(folder) as (process, address):
            job = submit(process, address, f"python pipelines/tiny.py --store {shlex.quote(store)} -p model={_model()}")
            done = asyncio.run(follow(address, job))
    except (Failed, KeyboardInterrupt) as error:
        print(f"demo: {str(error) or 'interrupted'}; the head's logs are in {folder}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    if done != "SUCCEEDED":
        print(f"demo: the job ended as {done}; the head's logs are in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    return 0


@contextmanager
def head(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A Ray head with its folder, and the address of its dashboard and job server."""
    ports = dict(zip(PORTS, free(len(PORTS)), strict=True))
    address = f"http://127.0.0.1:{ports['dashboard-port']}"
    words = ["start", "--head", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"]
    words += ["--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={folder}", *(f"--{n}={p}" for n, p in ports.items())]
    with (folder / "head.log").open("wb") as log:
        command = [sys.executable, "-m", "ray.scripts.scripts", *words]
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:  # at once, since whoever reads the next line may interrupt
        print(f"demo: starting a Ray head; its dashboard is at {address} (token: {os.environ['RAY_AUTH_TOKEN']})", flush=True)
        yield process, address
    finally:
        print("demo: stopping the Ray head", flush=True)
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # what it has started, too


def submit(process: subprocess.Popen[bytes], address: str, entrypoint: str, patience: float = PATIENCE) -> str:
    """Give the job to the head as soon as its job server takes one; any other answer is not readiness. Raises Failed.

    `patience`: seconds for it.
    """
    from ray.exceptions import RayError  # ray reads the environment when it is imported, so here and not above
    from ray.job_submission import JobSubmissionClient

    until, job, why = time.monotonic() + patience, f"demo-{secrets.token_hex(4)}", ""
    environment = {"working_dir": str(ROOT), "excludes": [".git", ".venv", ".moeflow", "tests"]}
    while time.monotonic() < until:
        if process.poll() is not None:
            raise Failed(f"the Ray head did not start (exit code {process.returncode})")
        try:
            client = JobSubmissionClient(address)
            if job not in {known.submission_id for known in client.list_jobs()}:  # an answer may get lost
                client.submit_job(entrypoint=entrypoint, submission_id=job, runtime_env=environment)
            return job
        except (RuntimeError, OSError, RayError) as error:
            why = " ".join(str(error).split())
            time.sleep(0.5)
    raise Failed(f"the Ray head took no job in {patience:.0f} s: {why[:300]}")


async def follow(address: str, job: str) -> str:
    """Show what the job prints until it ends, its steps as a bar on a terminal; return how it ended."""
    from ray.job_submission import JobSubmissionClient

    client, show = JobSubmissionClient(address), Shown()
    with show.bar:
        async for text in client.tail_job_logs(job):
            for line in text.splitlines():
                show.line(line)
    while not (status := client.get_job_status(job)).is_terminal():
        await asyncio.sleep(0.2)
    return str(status.value)


class Shown:
    """The job's lines, and a bar over its steps where somebody watches."""

    def __init__(self) -> None:
        console = Console(highlight=False)
        columns = (BarColumn(bar_width=32), MofNCompleteColumn(), TextColumn("steps"), TimeElapsedColumn())
        self.bar = Progress(
            *columns, TextColumn("{task.description}"), console=console, transient=True, disable=not console.is_terminal
        )
        self._task = self.bar.add_task("", total=None, visible=False)

    def line(self, line: str) -> None:
        if re.match(r"\d{4}-\d\d-\d\d [\d:,]+\s(INFO|SUCC|WARNING) |Running entrypoint", line):
            return  # Ray's words about the job's own number and other commands
        if not self.bar.disable and (step := STEP.match(line)):
            self.bar.update(self._task, completed=int(step[1]), total=int(step[2]), description=step[3], visible=True)
        else:
            self.bar.console.out(line, highlight=False)


def free(count: int) -> list[int]:
    """So many ports that nothing listens at."""
    taken = [socket.socket() for _ in range(count)]
    for one in taken:
        one.bind(("127.0.0.1", 0))
    ports: list[int] = [one.getsockname()[1] for one in taken]
    for one in taken:
        one.close()
    return ports


def _short() -> str | None:
    """The folder for temporary files, unless its path is too long, or has a space in it, for Ray's sockets."""
    usual = tempfile.gettempdir()
    return "/tmp" if len(usual) > 32 or " " in usual else None


def _model() -> str:
    return shlex.quote(str(ROOT / "models" / "mixtral-small"))


if __name__ == "__main__":
    sys.exit(main())
