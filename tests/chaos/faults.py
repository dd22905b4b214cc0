"""What is done to a store: faults and outages of its server, and flipped bits."""

import os
import time
from pathlib import Path
from random import Random

from moeflow.store import LocalBlobs, Store, names
from tests.servers import Fault, Proxy


class Faults:
    """Makes the proxy fail a share of all requests, and counts them."""

    def __init__(self, proxy: Proxy, random: Random, share: float) -> None:
        self._random, self._share, self.count = random, share, 0
        proxy.fault = self

    def __call__(self, method: str, path: str) -> Fault | None:
        if self._random.random() >= self._share:
            return None
        self.count += 1
        return self._random.choice(
            (
                Fault(500, "InternalError"),
                Fault(503, "SlowDown"),
                Fault(hang_up=True),
                Fault(lose=True),
                Fault(break_off=self._random.randrange(400)),
            )
        )


class Outage:
    """For so many seconds the proxy refuses, hangs up, or keeps silent until the outage is over."""

    def __init__(self, proxy: Proxy, random: Random, seconds: float) -> None:
        self._end, self._how, self.count = time.monotonic() + seconds, random.choice(("refuse", "hang up", "silence")), 0
        proxy.fault = self

    def __call__(self, method: str, path: str) -> Fault | None:
        left = self._end - time.monotonic()
        if left <= 0:
            return None
        self.count += 1
        if self._how == "silence":
            time.sleep(left)
        return Fault(503, "SlowDown") if self._how == "refuse" else Fault(hang_up=True)


def flip(store: Store, name: str, random: Random) -> None:
    """Change one bit of a stored object, as a bad disk does: neither its size nor its time tell it."""
    if isinstance(store.blobs, LocalBlobs):
        flip_file(store.blobs.root / name, random)
        return
    data = bytearray(store.blobs.read(name))
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    store.blobs.delete([name])
    assert store.blobs.create(name, bytes(data))


def flip_file(path: Path, random: Random) -> None:
    """Change one bit of a file in its place; its time stays."""
    about = path.stat()
    at, bit = random.randrange(about.st_size), 1 << random.randrange(8)
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ bit]))
    path.chmod(about.st_mode & 0o777)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def blobs_of(store: Store, step: str = "") -> list[str]:
    """The names of the blobs that hold something, of all artifacts or of those of the steps with this name."""
    keys = [names.key_of(e.name) for e in store.blobs.list(f"manifests/{step}")]
    files = {f.sha256: f.size for m in store.manifests(keys).values() for f in m.files.values()}
    return sorted(names.blob(digest) for digest, size in files.items() if size)
