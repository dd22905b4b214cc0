"""Models and servers that many tests share. Nothing outside the tests' own folders is read or written."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moeflow.store import s3
from tests import looks, servers, tiny

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, where transformers looks for it, warns that it sees no GPU
os.environ.setdefault("RAY_raylet_start_wait_time_s", "240")  # seconds; a busy machine needs more than the usual 30


LONGEST = (
    "test_run", "test_on_ray", "test_on_s3", "test_mending", "test_finetune", "test_gang", "test_survival", "test_clusters",
    "test_interruptions", "test_compress", "test_layouts", "test_evaluate", "test_golden", "test_skipping", "test_bad_inputs",
)  # fmt: skip
ONE_RAY = ("test_run", "test_on_ray", "test_on_s3", "test_mending", "test_overlapping", "test_ray_metrics")
"""The files whose tests share a Ray: all run in one process, so that it is started once."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also what is left out otherwise, for its time: `make test-all`")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The files that take longest, most of it waiting, come first, so that no process is left alone with one at the end."""
    if not config.getoption("slow") and (left := [i for i in items if _left_out(i)]):
        config.hook.pytest_deselected(items=left)
        items[:] = [i for i in items if i not in left]
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    for item in items:
        shared = "told" if "told" in getattr(item, "fixturenames", ()) else str(item.path)  # two versions that are made once
        item.add_marker(pytest.mark.xdist_group("ray" if item.path.stem in ONE_RAY else shared))


def _left_out(item: pytest.Item) -> bool:
    family = item.get_closest_marker("family")
    name = item.nodeid.partition("[")[0]
    return item.get_closest_marker("slow") is not None or (
        family is not None and family.args[0] not in tiny.turn(name, family.kwargs["among"])
    )


@pytest.fixture(scope="session", autouse=True)
def credentials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"):
            patch.delenv(name, raising=False)
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            patch.setenv(name, os.devnull)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("MOEFLOW_CACHE", str(tmp_path_factory.mktemp("moeflow-cache")))
        looks.share(tmp_path_factory)
        patch.setattr("moeflow.arch.found._looked", looks.here)
        yield


@pytest.fixture(scope="session")
def server(credentials: None) -> Iterator[servers.Proxy]:
    with servers.s3_server() as url, servers.proxy(url) as proxy:
        yield proxy


@pytest.fixture
def bucket(server: servers.Proxy) -> Iterator[str]:
    """The name of a bucket of this test's own."""
    name = f"bucket-{uuid.uuid4().hex}"
    server.reset()
    s3.client(server.url).create_bucket(Bucket=name)
    server.reset()
    yield name
    server.reset()


@pytest.fixture
def s3_url(server: servers.Proxy, bucket: str) -> str:
    return f"s3://{bucket}/pre/fix?endpoint={server.url}"


@pytest.fixture(scope="session", params=tiny.families())
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint, of one family after the other."""
    return tiny.write(request.param, tmp_path_factory.mktemp(request.param))
