"""The kinds of trouble that need no Ray. Each is a function of a scene, which it leaves finished and compared."""

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Thread

from tests.chaos import clusters, gang
from tests.chaos.driver import Driver
from tests.chaos.faults import Faults, Outage, blobs_of, flip, flip_file
from tests.chaos.places import Absent
from tests.chaos.scene import Scene
from tests.chaos.truth import KEEPS

S3 = ("moto", "seaweedfs")
EVERYWHERE = ("folder", *S3)
FIRST, SECOND, THIRD = KEEPS


@dataclass(frozen=True)
class Kind:
    """`play` is one round of it; `stores` are the places where it means something."""

    play: Callable[[Scene], None]
    stores: tuple[str, ...]
    ray: bool = False  # it takes a Ray head


def driver(scene: Scene) -> None:
    """The driver is killed, one to four times, each time somewhere between its start and its end."""
    for _ in range(scene.random.randint(1, 4)):
        running = scene.start()
        time.sleep(scene.random.uniform(0.1, scene.truth.seconds))
        scene.killed(running)
    scene.finish()


def faults(scene: Scene) -> None:
    """The server fails a share of all requests in every way it can; the run must come to its end all the same."""
    assert scene.place.proxy is not None
    injected = Faults(scene.place.proxy, scene.random, scene.random.uniform(0.05, 0.25))
    scene.ended(scene.start())
    scene.place.proxy.reset()
    scene.round.injected["faults"] += injected.count
    scene.finish()


def outage(scene: Scene) -> None:
    """The server does not answer for 5 to 40 seconds, once or twice; the run waits for it."""
    assert scene.place.proxy is not None
    running, asked = scene.start(), 0
    for _ in range(scene.random.randint(1, 2)):
        time.sleep(scene.random.uniform(0, scene.truth.seconds / 2))
        seconds = scene.random.uniform(5, 40)
        if running.lives():
            out = Outage(scene.place.proxy, scene.random, seconds)
            time.sleep(seconds)
            asked += out.count
            scene.round.injected["outages"] += 1
    scene.ended(running)
    scene.place.proxy.reset()
    scene.round.injected["refused requests"] += asked
    scene.finish()


def flips(scene: Scene) -> None:
    """Bits of what is stored flip, in what was fetched or in anything; then a run for another result reads it."""
    scene.truth.copy(scene.url, scene.cache)
    store = scene.store()
    names = blobs_of(store, scene.random.choice(("sources.file-", "checkpoint.layer-", "calibrate.", "")))
    for name in scene.random.sample(names, min(len(names), scene.random.randint(1, 4))):
        flip(store, name, scene.random)
        scene.round.injected["flips"] += 1
    scene.ended(scene.start(SECOND), SECOND)
    scene.pull(SECOND, may=(0, 1))  # a run links files that it does not read: then pulling them refuses
    scene.command("verify", "--all", "--repair", may=(0, 1))
    scene.command("verify", "--all")
    scene.finish(SECOND)
    scene.finish(FIRST)


def cached_flips(scene: Scene) -> None:
    """Bits of the node's cache flip, behind a run that was killed and behind one that ended; the store has the right ones."""
    running = scene.start()
    time.sleep(scene.random.uniform(scene.truth.seconds / 2, scene.truth.seconds))
    scene.killed(running)
    for keep in (FIRST, SECOND):
        files = sorted(p for p in (scene.cache / "blobs").glob("*/*") if p.stat().st_size)
        for path in scene.random.sample(files, min(len(files), scene.random.randint(1, 4))):
            flip_file(path, scene.random)
            scene.round.injected["flips"] += 1
        scene.finish(keep)


def pair(scene: Scene) -> None:
    """Two or three drivers at once on one store, for the same result or for others; now and then one is killed."""
    keeps = [scene.random.choice((FIRST, FIRST, SECOND)) for _ in range(scene.random.randint(2, 3))]
    running: list[tuple[Driver, int]] = []
    for keep in keeps:
        running.append((scene.start(keep), keep))
        time.sleep(scene.random.choice((0, 0, scene.random.uniform(0, 2))))
    scene.round.injected["overlapping pairs"] += len(keeps) - 1
    if scene.random.random() < 0.4:
        time.sleep(scene.random.uniform(0, scene.truth.seconds))
        scene.killed(running.pop()[0])
    for driver, keep in running:
        scene.ended(driver, keep)
    for keep in sorted({*keeps}):
        scene.finish(keep)


def gc(scene: Scene) -> None:
    """Garbage is collected beside a run, again and again, with no grace; the run must not notice."""
    scene.store().check()  # which makes the store: there is nothing to collect in one that is not there
    if scene.random.random() < 0.5:
        scene.truth.copy(scene.url, scene.cache)  # which no version reaches, so that all of it may go until the run begins
    policy = scene.random.choice(((), (), ("--keep", "1"), ("--keep-results",)))
    collecting, stop = [0], Event()

    def collect() -> None:
        while not stop.is_set():
            scene.command("gc", "--delete", "--grace", "0s", *policy)
            collecting[0] += 1
            stop.wait(0.1)

    running = scene.start()
    time.sleep(scene.random.uniform(0, scene.truth.seconds / 2))
    beside = Thread(target=collect)
    beside.start()
    try:
        scene.ended(running)
        scene.ended(scene.start(SECOND), SECOND)
    finally:
        stop.set()
        beside.join()
    scene.round.injected["collections"] += collecting[0]
    scene.finish()


def disk(scene: Scene) -> None:
    """The disk of the store, or of the cache, fills up in the middle of a run, and has room again for the next."""
    with small_disk(scene.folder / "disk") as where:
        url = str(where / "store") if scene.place.name == "folder" else scene.url
        on = replace(scene, url=url, cache=where / "cache")
        running = on.start()
        time.sleep(scene.random.uniform(0.1, scene.truth.seconds))
        ballast = where / "ballast"
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(bytes(1 << 12)) == 1 << 12:  # until there is no room
                pass
        scene.round.injected["full disks"] += 1
        on.ended(running, may=(0, 1, 2))  # 2: that there is no room may be told before it begins
        ballast.unlink()
        on.finish()


def limited(scene: Scene) -> None:
    """No file may grow beyond a limit, as under a quota; the next run has none."""
    largest = scene.random.randint(1 << 10, 200 << 10)
    scene.round.injected["limits"] += 1
    scene.ended(scene.start(largest=largest), may=(0, 1))
    scene.finish()


def storm(scene: Scene) -> None:
    """Faults of the server and a killed driver beside another, at once."""
    assert scene.place.proxy is not None
    injected = Faults(scene.place.proxy, scene.random, scene.random.uniform(0.04, 0.15))
    one, other = scene.start(), scene.start(scene.random.choice((FIRST, SECOND)))
    scene.round.injected["overlapping pairs"] += 1
    time.sleep(scene.random.uniform(0.1, scene.truth.seconds))
    scene.killed(other)
    scene.ended(one)
    scene.place.proxy.reset()
    scene.round.injected["faults"] += injected.count
    scene.finish(FIRST)
    scene.finish(SECOND)


@contextmanager
def small_disk(folder: Path, size: str = "16m") -> Iterator[Path]:
    """A disk of this size, in a namespace of its own, which ends with its process: its folder. Raises Absent."""
    folder.mkdir()
    script = f"mount -t tmpfs -o size={size} tmpfs '{folder}' && echo mounted && read end"
    try:
        holder = subprocess.Popen(["unshare", "-rm", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    except FileNotFoundError:
        raise Absent("there is no program unshare, of util-linux") from None
    try:
        if holder.stdout is None or holder.stdout.readline() != "mounted\n":
            raise Absent("this system lets no user mount a disk of its own")
        yield Path(f"/proc/{holder.pid}/root{folder}")
    finally:
        holder.communicate("end\n")


KINDS: dict[str, Kind] = {
    "driver": Kind(driver, EVERYWHERE),
    "faults": Kind(faults, S3),
    "outage": Kind(outage, S3),
    "flips": Kind(flips, EVERYWHERE),
    "cache": Kind(cached_flips, S3),
    "pair": Kind(pair, EVERYWHERE),
    "gc": Kind(gc, EVERYWHERE),
    "disk": Kind(disk, ("folder", "moto")),
    "limit": Kind(limited, EVERYWHERE),
    "storm": Kind(storm, S3),
    "worker": Kind(clusters.worker, EVERYWHERE, ray=True),
    "driver-on-ray": Kind(clusters.driver_on_ray, EVERYWHERE, ray=True),
    "head": Kind(clusters.head, EVERYWHERE, ray=True),
    "gang": Kind(gang.gang, ("seaweedfs",), ray=True),
}
