"""A fine-tuning by two processes of DeepSpeed, as a job on a Ray head: one process is killed, then the head, then it goes on."""

import secrets
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from moeflow.run.pipeline import call, load
from moeflow.step import upstream
from moeflow.store import Store, names
from tests.chaos.driver import ROOT, Driver, Program
from tests.chaos.scene import Scene
from tests.run import cluster

PIPELINE = Path("pipelines") / "mixtral.py"
MEASURED = "training.json"
LONG = 600.0  # seconds for a job that trains
SIZES = (
    "calibration.sequences=8", "calibration.length=16", "calibration.batch=2", "heldout.sequences=2", "heldout.length=16",
    "tune=lora", "tune.rows=12", "tune.batch=4", "tune.steps=40", "tune.rate=1e-2", "tune.length=16",
    "gang.processes=2", "gang.zero=2", "gang.save_every=2",
)  # fmt: skip


class Job(Program):
    """A head with one job: `python pipelines/mixtral.py`."""

    def command(self, words: list[str]) -> list[str]:
        return [sys.executable, "-m", "tests.chaos.job", shlex.join([sys.executable, str(PIPELINE), *words])]

    def head(self) -> list[psutil.Process]:
        """The processes of the head, none before it is started and after it is gone."""
        said = next((line for line in self.out.read_text().splitlines() if line.startswith("head ")), "")
        with suppress(psutil.NoSuchProcess):
            return _family(int(said.removeprefix("head "))) if said else []
        return []

    def ranks(self) -> list[psutil.Process]:
        """The processes that train."""
        return [p for p in self.head() if cluster.title(p).startswith("ray::RayTrainWorker")]


def gang(scene: Scene) -> None:
    """The job loses a rank, goes on from its snapshot, loses the whole head, and is submitted again to another one."""
    words = [w for given in _words(scene) for w in ("-p", given)]
    right = _right(tuple(words), scene.folder.parent)
    run = [*words, "--store", scene.url, "--name", "chaos-gang", "--json"]
    secret = secrets.token_hex(32)

    def start() -> Job:
        said = scene.folder / "said"
        return Job(run, said, MOEFLOW_CACHE=str(scene.cache), RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secret)

    job = start()
    if _until(job, lambda: job.ranks() and [*scene.store().blobs.list("partial/")]):
        time.sleep(scene.random.uniform(0, 2))
        ranks = job.ranks()
        _kill(ranks[:1])
        scene.round.injected["kills"] += len(ranks[:1])
        _until(job, lambda: {p.pid for p in job.ranks()} - {p.pid for p in ranks})
        time.sleep(scene.random.uniform(0, 15))
    _kill(job.head())
    scene.round.injected["kills"] += 1
    lost = job.wait(scene.limit)
    scene.round.ends["killed"] += 1
    if lost.hung:
        scene.round.hangs.append("the job's client outlived its head")
    again = start().wait(LONG)
    scene.round.ends[str(again.code)] += 1
    scene.round.retries += 1
    if again.code:
        scene.round.wrong.append(f"the job that was submitted again ended with {again.code}: {again.out[-600:]} {again.line}")
    found = _digests(scene.store(), right)
    scene.round.mismatches += [f"{key} holds {found.get(key)}" for key in right if found.get(key) != right[key]]


def _words(scene: Scene) -> list[str]:
    model, tokens, *_ = (word.partition("=")[2] for word in scene.truth.words)
    return [f"model={model}", f"tokens={tokens}", f"heldout={tokens}", f"tune.text={tokens}", *SIZES]


@cache
def _right(words: tuple[str, ...], folder: Path) -> Mapping[str, str]:
    """The digests of an undisturbed run, in one process and the children that train, of all that the checkpoint is made of."""
    store = Store.open(str(folder / "undisturbed-gang"))
    run = ["run", str(PIPELINE), *words, "--store", store.url, "--runner", "process", "--json"]
    ended = Driver(run, folder / "said").wait(LONG)
    if ended.code:
        raise RuntimeError(f"the undisturbed run ended with {ended.code}: {ended.said[-500:]}")
    target: Any = call(load(ROOT / PIPELINE), words[1::2])
    return _digests(store, [s.key for s in upstream([target])])


def _digests(store: Store, keys: Iterable[str]) -> dict[str, str]:
    """The digest of each artifact's files, without the one in which a training says how long it took."""
    manifests = store.manifests(keys)
    return {k: names.digest_of({n: f.sha256 for n, f in m.files.items() if n != MEASURED}) for k, m in manifests.items()}


def _family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _until(job: Job, happens: Callable[[], Any], patience: float = LONG) -> bool:
    """Whether it happens while the job lives, within so many seconds."""
    end = time.monotonic() + patience
    while job.lives() and time.monotonic() < end:
        if happens():
            return True
        time.sleep(0.3)
    return False
