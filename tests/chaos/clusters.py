"""The kinds of trouble on a Ray cluster: killed workers, drivers and heads. One head serves all rounds that leave it alive."""

import shutil
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

from tests.chaos.driver import Program
from tests.chaos.scene import Scene
from tests.run import cluster

LOST = 150.0  # seconds in which a driver ends whose head has died: the 90 that are promised, on a busy machine
SLOW = 420.0  # and a run on a cluster whose workers are killed: each that is started imports torch again


class Heads:
    """A Ray head as operators start one, another one when it was killed."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self.address, self.process = "", psutil.Process()

    def up(self) -> str:
        """The address of a living head."""
        if not self.address:
            folder = Path(tempfile.mkdtemp(prefix="mf"))  # short, because sockets lie in it
            self._stack.callback(shutil.rmtree, folder, ignore_errors=True)
            self.address, self.process = self._stack.enter_context(cluster.head(folder))
        return self.address

    def services(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]

    def workers(self) -> list[psutil.Process]:
        """The processes that run a step now."""
        return [p for p in self.services() if cluster.title(p).startswith("ray::") and "." in cluster.title(p).partition("(")[0]]

    def kill(self, name: str) -> None:
        """SIGKILL a service by its name, or all."""
        for service in self.services():
            with suppress(psutil.NoSuchProcess):
                if name in ("all", service.name()):
                    service.kill()

    def close(self) -> None:
        self._stack.close()
        self.address = ""


heads = Heads()


def worker(scene: Scene) -> None:
    """One to three workers are killed while they run a step; the run goes on."""
    running = scene.start_on(heads.up())
    for _ in range(scene.random.randint(1, 3)):
        time.sleep(scene.random.uniform(0, 1))
        if workers := _working(running):
            with suppress(psutil.NoSuchProcess):
                scene.random.choice(workers).kill()
                scene.round.injected["kills"] += 1
        time.sleep(scene.random.uniform(0, 3))
    scene.ended(running, limit=SLOW)
    scene.finish()


def driver_on_ray(scene: Scene) -> None:
    """The driver is killed while its steps run on a cluster, which outlives it; another one goes on there."""
    running = scene.start_on(heads.up())
    _working(running)
    time.sleep(scene.random.uniform(0, 6))
    scene.killed(running)
    scene.ended(scene.start_on(heads.up()), limit=SLOW)
    scene.finish()


def head(scene: Scene) -> None:
    """The head, or one of its services, is killed under a run, which ends with our line; the next goes on elsewhere."""
    running = scene.start_on(heads.up())
    _working(running)
    time.sleep(scene.random.uniform(0, 4))
    if running.lives():
        heads.kill(scene.random.choice(("gcs_server", "raylet", "all")))
        scene.round.injected["kills"] += 1
    code = scene.ended(running, may=(0, 1), limit=LOST)
    heads.close()
    if code and scene.random.random() < 0.5:
        scene.ended(scene.start_on(heads.up()), limit=SLOW)
    scene.finish()


def _working(running: Program, patience: float = 90.0) -> list[psutil.Process]:
    """The workers that run a step, as soon as there are any; none if the run ends before, or no worker comes in so many seconds."""
    until = time.monotonic() + patience
    while running.lives() and time.monotonic() < until:
        if workers := heads.workers():
            return workers
        time.sleep(0.05)
    return []
