"""Where a run's numbers can be looked at: TensorBoard, MLflow, W&B. Each writes parameters, and scalars by name and step.

A tracker is one row of TRACKERS: its package, which is imported when the run begins and not before, and what the words behind its
name say.
"""

import importlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from moeflow.extras import lacking


class Scalar(NamedTuple):
    """A number, its name, the step that it belongs to, and when it came, in seconds since the epoch."""

    name: str
    value: float
    step: int
    time: float


class Tracker(Protocol):
    """What is open for one run."""

    def told(self, about: Mapping[str, str]) -> None:
        """What the run is: its pipeline, parameters and result, by name."""

    def scalars(self, some: Sequence[Scalar]) -> None:
        """At most a thousand; they can be looked at when this returns."""

    def close(self, *, failed: bool) -> None: ...


class TensorBoard:
    """Event files in a folder of the run's own. torch, which has a writer of its own, is not loaded."""

    def __init__(self, folder: str, run: str) -> None:
        writer = importlib.import_module("tensorboard.summary.writer.event_file_writer")
        self._event = importlib.import_module("tensorboard.compat.proto.event_pb2").Event
        self._summary = importlib.import_module("tensorboard.compat.proto.summary_pb2").Summary
        self._tensor = importlib.import_module("tensorboard.compat.proto.tensor_pb2").TensorProto
        at = Path(folder).expanduser() / f"{run}-{time.strftime('%Y%m%d-%H%M%S')}"
        self._writer = writer.EventFileWriter(str(at))

    def told(self, about: Mapping[str, str]) -> None:
        for name, word in about.items():
            value = self._summary.Value(tag=name, tensor=self._tensor(dtype=7, string_val=[word.encode()]))
            value.metadata.plugin_data.plugin_name = "text"
            self._add(value, 0, time.time())

    def scalars(self, some: Sequence[Scalar]) -> None:
        for name, value, step, at in some:
            self._add(self._summary.Value(tag=name, simple_value=value), step, at)
        self._writer.flush()  # else it keeps them for two minutes

    def close(self, *, failed: bool) -> None:
        self._writer.close()

    def _add(self, value: Any, step: int, at: float) -> None:
        self._writer.add_event(self._event(wall_time=at, step=step, summary=self._summary(value=[value])))


class MLflow:
    """A run of the experiment `moeflow` on a tracking server, or in a local database or folder."""

    def __init__(self, uri: str, run: str) -> None:
        client = importlib.import_module("mlflow.tracking").MlflowClient
        self._client = client(tracking_uri=uri)
        experiment = self._client.get_experiment_by_name("moeflow")
        number = experiment.experiment_id if experiment else self._client.create_experiment("moeflow")
        self._metric = importlib.import_module("mlflow.entities").Metric
        self._run = self._client.create_run(number, run_name=run).info.run_id

    def told(self, about: Mapping[str, str]) -> None:
        for name, word in about.items():
            self._client.log_param(self._run, _plain(name), word[:500])

    def scalars(self, some: Sequence[Scalar]) -> None:
        self._client.log_batch(self._run, metrics=[self._metric(_plain(s.name), s.value, int(s.time * 1000), s.step) for s in some])

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


class Wandb:
    """A run of a project on W&B; WANDB_MODE=offline keeps it on this machine."""

    def __init__(self, project: str, run: str) -> None:
        entity, _, name = project.rpartition("/")
        self._run = importlib.import_module("wandb").init(project=name, entity=entity or None, name=run, reinit="create_new")
        self._known: set[str] = set()

    def told(self, about: Mapping[str, str]) -> None:
        self._run.config.update(dict(about), allow_val_change=True)

    def scalars(self, some: Sequence[Scalar]) -> None:
        for name, value, step, _ in some:
            at = f"{name.rpartition('/')[0] or name}/step"  # its own steps go up only, whatever is logged in between
            if name not in self._known:
                self._known.add(name)
                self._run.define_metric(name, step_metric=at)
            self._run.log({name: value, at: step})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


@dataclass(frozen=True)
class Kind:
    """A tracker: its package, what follows its name, and how it is opened with that and the name of a run."""

    package: str
    takes: str
    open: Callable[[str, str], Tracker]


TRACKERS = {
    "tensorboard": Kind("tensorboard", "DIR", TensorBoard),
    "mlflow": Kind("mlflow", "URI", MLflow),
    "wandb": Kind("wandb", "PROJECT", Wandb),
}


def check(word: str) -> None:
    """Raise ValueError unless the word names a tracker whose package is installed here, and where it is to write."""
    name, colon, where = word.partition(":")
    forms = ", ".join(f"{n}:{kind.takes}" for n, kind in TRACKERS.items())
    if name not in TRACKERS:
        raise ValueError(f"--track {word}: {name!r} is no tracker; write one of {forms}")
    if not colon or not where:
        raise ValueError(f"--track {word}: say where, as in {name}:{TRACKERS[name].takes}")
    if why := lacking([TRACKERS[name].package]):
        raise ValueError(f"--track {word}: {why}")


def opened(word: str, run: str) -> Tracker:
    """The tracker that a word names, for a run of this name."""
    name, _, where = word.partition(":")
    return TRACKERS[name].open(where, run)


def _plain(name: str) -> str:
    """A name as MLflow takes it."""
    return re.sub(r"[^A-Za-z0-9_\-./ ]+", " ", name).strip()
