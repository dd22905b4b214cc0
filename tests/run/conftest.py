"""Both runners, each on a store of its own: what one promises, the other keeps."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from moeflow.run import Outcome, in_process
from moeflow.run.ray import runner as on_ray
from moeflow.store import Store

Run = Callable[..., Outcome]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "store"))


@pytest.fixture
def local_ray(rays: Path) -> None:
    """A Ray of two CPUs, which all tests of a process share until one shuts it down to have another."""
    if not ray.is_initialized():
        # Never without address="local": a head that died may have left its address behind.
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=str(rays))


@pytest.fixture
def no_ray() -> None:
    """For tests that start their own."""
    ray.shutdown()


@pytest.fixture(scope="session")
def rays() -> Iterator[Path]:
    """A folder whose name is short enough for sockets; what runs in it goes with it."""
    folder = tempfile.mkdtemp(prefix="mf")
    yield Path(folder)
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["process", "ray"])
def run(request: pytest.FixtureRequest) -> Run:
    if request.param == "ray":
        request.getfixturevalue("local_ray")
        return on_ray.run
    return in_process.run


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A file that steps write to, to say that they ran."""
    path = tmp_path / "trace"
    path.touch()
    return path
