"""A store on a disk and one in S3: what one promises, the other keeps."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from moeflow.store import Store


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
