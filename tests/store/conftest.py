"""A store on a disk and one in S3, with a proxy before the server so that requests and bytes can be counted."""

import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from moeflow.store import Store
from moeflow.store import s3 as s3_module
from tests import servers


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
    s3_module.client(server.url).create_bucket(Bucket=name)
    server.reset()
    yield name
    server.reset()


@pytest.fixture
def s3_url(server: servers.Proxy, bucket: str) -> str:
    return f"s3://{bucket}/pre/fix?endpoint={server.url}"


@pytest.fixture
def s3_store(s3_url: str, tmp_path: Path) -> Store:
    return Store.open(s3_url, tmp_path / "cache")


@pytest.fixture(params=["disk", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "disk":
        return Store.open(str(tmp_path / "store"))
    return Store.open(request.getfixturevalue("s3_url"), tmp_path / "cache")


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one MiB."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
