"""What is left, and what the next run does, when a run is stopped from outside; the run is a process of its own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from moeflow.run import in_process
from moeflow.run.pipeline import call, load
from moeflow.step import upstream
from moeflow.store import Store
from tests.run.cluster import PATIENCE, ROOT, title, until

PIPELINE = Path(__file__).with_name("slow_pipeline.py")


class Driver:
    """`python slow_pipeline.py` on one of the runners."""

    def __init__(self, folder: Path, runner: str) -> None:
        self.release, self.trace = folder / "release", folder / "trace"
        self.url = str(folder / "store")
        self.words = [f"until={self.release}", f"trace={self.trace}"]
        params = [word for w in self.words for word in ("-p", w)]
        self._command = [sys.executable, str(PIPELINE), "--store", self.url, *params, "--runner"]
        self._runner = runner
        self._env = {**os.environ, "PYTHONPATH": str(ROOT)}
        self._env.pop("RAY_ADDRESS", None)

    def start(self) -> subprocess.Popen[str]:
        command, pipe = [*self._command, self._runner], subprocess.PIPE
        return subprocess.Popen(command, env=self._env, stdout=pipe, stderr=pipe, text=True)

    def finish(self) -> dict[str, int]:
        """Let the slow steps end, and run to the end in process; how many steps ran and how many were stored."""
        self.release.touch()
        done = subprocess.run([*self._command, "process", "--json"], env=self._env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        steps: dict[str, int] = json.loads(done.stdout.splitlines()[-1])["steps"]
        return steps

    def began(self) -> bool:
        return self.trace.exists() and "begin" in self.trace.read_text()

    def traces(self, line: str) -> int:
        return self.trace.read_text().splitlines().count(line)

    def digests(self, url: str) -> dict[str, str]:
        keys = [s.key for s in upstream([call(load(PIPELINE), self.words)])]
        return {key: m.digest for key, m in Store.open(url).manifests(keys).items()}

    def undisturbed(self, url: str) -> dict[str, str]:
        in_process.run([call(load(PIPELINE), self.words)], Store.open(url))
        return self.digests(url)


@pytest.fixture(params=["process", "ray"])
def driver(request: pytest.FixtureRequest, tmp_path: Path) -> Driver:
    return Driver(tmp_path, request.param)


@pytest.mark.parametrize(
    ("driver", "signal_"),
    [
        pytest.param("process", signal.SIGINT, id="process-ctrl-c"),
        pytest.param("process", signal.SIGTERM, id="process-job-stop"),
        pytest.param("ray", signal.SIGINT, id="ray-ctrl-c", marks=pytest.mark.slow),
        pytest.param("ray", signal.SIGTERM, id="ray-job-stop", marks=pytest.mark.slow),
    ],
    indirect=["driver"],
)
def test_an_interrupted_run_says_so_in_one_line_and_the_next_continues(driver: Driver, signal_: int) -> None:
    process = driver.start()
    until(driver.began, "no slow step began")
    processes = [process.pid, *(p.pid for p in psutil.Process(process.pid).children(recursive=True))]
    process.send_signal(signal_)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("error: interrupted") and "next run continues" in errors.splitlines()[-1]
    until(lambda: not any(psutil.pid_exists(p) for p in processes), "processes were left behind")
    assert driver.finish() == {"run": 10, "stored": 1}
    assert driver.traces("number 4") == 1


def test_a_killed_driver_leaves_what_the_next_run_finishes_with_the_same_bytes(driver: Driver, tmp_path: Path) -> None:
    process = driver.start()
    until(driver.began, "no slow step began")
    steps = [p.pid for p in psutil.Process(process.pid).children(recursive=True) if title(p).startswith("ray::toy")]
    process.kill()
    process.communicate()
    until(lambda: not any(psutil.pid_exists(p) for p in steps), "steps outlived their driver")
    assert driver.finish() == {"run": 10, "stored": 1}
    assert driver.traces("number 4") == 1
    digests = driver.digests(driver.url)
    assert digests == driver.undisturbed(str(tmp_path / "undisturbed")) and len(digests) == 11
    left = [p for p in (tmp_path / "store" / "cache" / "work").iterdir() if p.name != ".lock"]
    assert not left, "the killed step's folder was swept"
