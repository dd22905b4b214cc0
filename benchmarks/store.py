"""The store against plain tools: two GiB on a disk against `cp` and `sha256sum`, verified ranges against unverified ones, and a
plan's look at S3 with latency.

python -m benchmarks.store
"""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from benchmarks.rows import Row
from moeflow.store import Record, Store
from moeflow.store.names import manifest, marker

FILES, SIZE = 4, 512 << 20  # two GiB
RANGE = 7_000_000  # bytes: a matrix of a small expert, at no round place
ROUNDS, OF_RANGES = 3, 7
KEYS, LATENCY = 2000, 0.03


def main() -> list[Row]:
    return [disk(), *ranges(), listing()]


def disk() -> Row:
    """Commit and fetch against `cp` and `sha256sum`, alternating; the best of each."""
    tools, ours = [], []
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        source = top / "source"
        source.mkdir()
        block = os.urandom(SIZE)
        for i in range(FILES):
            (source / f"{i}.bin").write_bytes(i.to_bytes(8, "big") + block[8:])
        for i in range(ROUNDS):
            with scratch(top) as at:
                tools.append(seconds(partial(copy_and_sum, source, at / "copy")))
            with scratch(top) as at:
                out = at / "out"
                shutil.copytree(source, out)  # what a step has just written
                store = Store.open(str(at / "store"))
                work = partial(commit_and_fetch, store, out, at / "in", i)
                ours.append(seconds(work))
    ratio = min(ours) / min(tools)
    return Row("commit and fetch of 2 GiB on disk, against cp and sha256sum", ratio, "at most", 1.5, "times")


def ranges() -> list[Row]:
    """Two GiB read in ranges as `Artifact.read` does, verified, against the same ranges of the same file unverified.

    The first look of a process at a file hashes what it reads, later ones do not. Where the file lies in the page cache, hashing
    would cost most; there its pages are shown and not copied.
    """
    cold: dict[str, list[float]] = {"plain": [], "first": []}
    warm: dict[str, list[float]] = {"plain": [], "first": [], "again": []}
    with tempfile.TemporaryDirectory() as name:
        out, store, key = Path(name) / "out", Store.open(f"{name}/store"), f"bench.step-{0:032x}"
        out.mkdir()
        (out / "x").write_bytes(os.urandom(FILES * SIZE))
        store.commit(key, out, record=Record(step="bench.step", version=1))
        path = store.artifact(key).file("x")
        plain = partial(read_all, partial(unverified, path))
        for i in range(OF_RANGES):
            os.utime(path, (i, i))  # for this process it is another file now
            verified = partial(read_all, store.artifact(key).read)
            forget(path)
            cold["plain"].append(seconds(plain))
            forget(path)
            cold["first"].append(seconds(verified))
            os.utime(path, (OF_RANGES + i, OF_RANGES + i))
            warm["plain"].append(seconds(plain))
            warm["first"].append(seconds(verified))
            warm["again"].append(seconds(verified))
    what = "ranges of 7 MB, verified, against unverified"
    return [
        Row(f"{what}: from the disk", min(cold["first"]) / min(cold["plain"]), "at most", 1.1, "times"),
        Row(f"{what}: from the page cache, again", min(warm["again"]) / min(warm["plain"]), "at most", 1.1, "times"),
        Row(f"{what}: from the page cache, at first", min(warm["first"]) / min(warm["plain"]), "at most", 1.1, "times"),
    ]


def forget(path: Path) -> None:
    """Make the system forget what it caches of a file, so that the next read comes from the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(read: Callable[[str, int, int], bytes]) -> None:
    for start in range(0, FILES * SIZE, RANGE):
        read("x", start, min(start + RANGE, FILES * SIZE))


def unverified(path: Path, name: str, start: int, stop: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(stop - start)


def listing() -> Row:
    """What a plan of 2,000 stored steps asks of S3 when every request waits 30 ms more."""
    from tests import servers

    os.environ.setdefault("AWS_ACCESS_KEY_ID", "testing")
    os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "testing")
    from moeflow.store import s3

    with servers.s3_server() as url, servers.proxy(url) as proxy, tempfile.TemporaryDirectory() as cache:
        s3.client(url).create_bucket(Bucket="bench")
        direct = Store.open(f"s3://bench/x?endpoint={url}", cache)
        names = [f"step.{i}" for i in range(8)]

        def put(i: int) -> None:
            key = f"{names[i % len(names)]}-{i:032x}"
            direct.blobs.create(manifest(key), b"{}")
            direct.blobs.create(marker(key, f"-{i:032x}", f"{i:032x}", "0" * 8, i), b"")

        with ThreadPoolExecutor(8) as pool:
            [*pool.map(put, range(KEYS))]
        store = Store.open(f"s3://bench/x?endpoint={proxy.url}", cache)
        proxy.latency = LATENCY
        indexes = []
        took = seconds(lambda: indexes.append(store.index(names)))
        if len(indexes[0].keys) != KEYS:
            raise AssertionError(f"the index holds {len(indexes[0].keys)} of {KEYS} keys")
    return Row("index of 2,000 stored steps, S3 with 30 ms added to every request", took, "at most", 5, "s")


def copy_and_sum(source: Path, to: Path) -> None:
    subprocess.run(["cp", "-r", str(source), str(to)], check=True)
    subprocess.run(["sha256sum", *map(str, sorted(to.iterdir()))], check=True, stdout=subprocess.DEVNULL)


def commit_and_fetch(store: Store, out: Path, to: Path, i: int) -> None:
    key = f"bench.step-{i:032x}"
    store.commit(key, out, record=Record(step="bench.step", version=1))
    store.fetch(key, to)


def seconds(work: Callable[[], object]) -> float:
    os.sync()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@contextmanager
def scratch(top: Path) -> Iterator[Path]:
    at = Path(tempfile.mkdtemp(dir=top))
    yield at
    shutil.rmtree(at)


if __name__ == "__main__":
    for row in main():
        print(row.line())
