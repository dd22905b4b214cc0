"""The demo starts a Ray of its own beside any other, begins when the job server takes a job, and leaves its logs if it fails."""

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
BUSY = (52365, 8265, 6379, 10001)
"""The ports that another Ray on this machine would have taken."""


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "infra" / "demo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=[200, 401, 500])
def other(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server that answers every request, but is no job server."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(request.param)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def waiting() -> Iterator[subprocess.Popen[bytes]]:
    """A process that stands for a head which goes on."""
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def test_an_answer_that_is_not_the_job_servers_is_not_readiness(
    demo: ModuleType, other: str, waiting: subprocess.Popen[bytes]
) -> None:
    with pytest.raises(demo.Failed, match=r"the Ray head took no job in 1 s: .") as failed:
        demo.submit(waiting, other, "true", patience=1)
    assert "\n" not in str(failed.value)


def test_a_head_that_ends_is_not_waited_for(demo: ModuleType) -> None:
    ended = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    ended.wait()
    with pytest.raises(demo.Failed, match=r"the Ray head did not start \(exit code 3\)"):
        demo.submit(ended, "http://127.0.0.1:9", "true")


def run(*words: str) -> subprocess.Popen[str]:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = [sys.executable, str(ROOT / "infra" / "demo.py"), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def test_the_heads_logs_stay_where_the_demo_is_interrupted(tmp_path: Path) -> None:
    process = run("--store", str(tmp_path / "store"))
    assert process.stdout is not None
    assert "its dashboard is at http://127.0.0.1:" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 130
    (folder,) = re.findall(r"demo: interrupted; the head's logs are in (\S+)", said)
    assert (Path(folder) / "head.log").is_file()
    running = subprocess.run(["pgrep", "-f", f"temp-dir={folder}"], capture_output=True, text=True, check=False)
    assert not running.stdout, "the head is gone"
    subprocess.run(["rm", "-rf", folder], check=True)


@pytest.mark.slow
def test_the_demo_runs_beside_another_ray_and_shows_loss_and_what_both_models_write(tmp_path: Path) -> None:
    taken = []
    for port in BUSY:
        one = socket.socket()
        taken.append(one)
        try:
            one.bind(("127.0.0.1", port))
            one.listen()
        except OSError:  # another program has it, which is as good
            pass
    try:
        process = run("--store", str(tmp_path / "store"))
        said = process.communicate(timeout=500)[0]
    finally:
        for one in taken:
            one.close()
    assert process.returncode == 0, said
    for words in ("loss (stdlib)", "KL to the original", "the original model writes", "the compressed one", "tiny@1"):
        assert words in said, said
    assert "logs are in" not in said and " INFO " not in said
