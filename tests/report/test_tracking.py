"""A run's numbers are where people look for them: in TensorBoard, MLflow and W&B, each read back by its own code."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moeflow.cli import app
from moeflow.report import trackers
from moeflow.report.tracking import Tracked
from moeflow.run.progress import Show

ROOT = Path(__file__).parents[2]
PIPELINE = Path(__file__).parents[1] / "tracked_pipeline.py"
WANTED = {
    "run/done": 3.0, "run/steps": 3.0, "original/bytes": 2048.0, "compressed/bytes": 1024.0, "finetune/loss": 2.0,
    "finetune/heldout/prose": 2.5,
}  # fmt: skip
"""The last values of some scalars."""


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("comet:here", "'comet' is no tracker; write one of tensorboard:DIR, mlflow:URI, wandb:PROJECT"),
        ("tensorboard", "say where, as in tensorboard:DIR"),
        ("mlflow:", "say where, as in mlflow:URI"),
        *([] if importlib.util.find_spec("wandb") else [("wandb:mine", "wandb is not installed here: pip install wandb")]),
    ],
)
def test_a_tracker_that_cannot_be_is_refused_before_the_run(word: str, said: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["run", str(PIPELINE), "--store", str(tmp_path / "store"), "--track", word])
    assert (done.exit_code, done.stderr) == (2, f"error: --track {word}: {said}\n")
    assert not (tmp_path / "store" / "versions").exists()


def test_a_tracker_that_fails_costs_the_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said once, whatever it raises, and the version is published."""

    def broken(where: str, run: str) -> trackers.Tracker:
        raise RuntimeError(f"{where} is full")

    monkeypatch.setitem(trackers.TRACKERS, "here", trackers.Kind("json", "DIR", broken))
    done = CliRunner().invoke(app, ["run", str(PIPELINE), "--store", str(tmp_path / "store"), "--track", "here:disk"])
    assert done.exit_code == 0 and "tracked_pipeline@1" in done.stdout
    assert [line for line in done.stderr.splitlines() if "--track" in line] == [
        "warning: --track here:disk cannot be written to, and is left out from here on: RuntimeError: disk is full"
    ]


def test_a_trainings_loss_is_there_while_it_trains_and_comes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training waits for the tracker to have its first loss."""
    here = Notes(tmp_path / "looked-at")
    monkeypatch.setitem(trackers.TRACKERS, "here", trackers.Kind("json", "DIR", lambda where, run: here))
    words = ["run", str(PIPELINE), "--store", str(tmp_path / "store"), "--runner", "process", "--track", "here:disk"]
    done = CliRunner().invoke(app, [*words, "-p", f"until={here.seen}"])
    assert done.exit_code == 0, done.output
    losses = [(s.step, s.value) for s in here.some if s.name == "finetune/loss"]
    assert losses == [(1, 4.0), (2, 3.0), (3, 2.0)], "none again from training.json, which has them, too"
    names = [s.name for s in here.some]
    assert names.index("finetune/loss") < names.index("seconds/finetune.train") < names.index("finetune/rate")
    assert here.about["version"] == "tracked_pipeline@1" and here.closed == [False]
    here.some.clear()
    CliRunner().invoke(app, [*words, "-p", f"until={here.seen}"])
    assert [s.step for s in here.some if s.name == "finetune/loss"] == [1, 2, 3], "of a training that was stored, too"


class Notes:
    """A tracker that keeps what it gets, and touches a file when it has a loss."""

    def __init__(self, seen: Path) -> None:
        self.seen, self.some, self.closed = seen, list[trackers.Scalar](), list[bool]()
        self.about: dict[str, str] = {}

    def told(self, about: Mapping[str, str]) -> None:
        self.about |= about

    def scalars(self, some: Sequence[trackers.Scalar]) -> None:
        self.some += some
        if any(s.name == "finetune/loss" for s in some):
            self.seen.touch()

    def close(self, *, failed: bool) -> None:
        self.closed.append(failed)


def test_a_tracker_that_hangs_or_breaks_midway_neither_stops_a_run_nor_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    said, ended = [], threading.Event()

    class Hanging(Notes):
        def scalars(self, some: Sequence[trackers.Scalar]) -> None:
            ended.wait(60)

    class Breaking(Notes):
        def scalars(self, some: Sequence[trackers.Scalar]) -> None:
            sys.exit("out of files")

    class Said(Show):
        def say(self, text: str) -> None:
            said.append(text)

    for name, kind in (("hangs", Hanging), ("breaks", Breaking)):
        monkeypatch.setitem(trackers.TRACKERS, name, trackers.Kind("json", "DIR", lambda where, run, kind=kind: kind(Path())))
    with Tracked(["hangs:x", "breaks:y"], "run", Said(), {}, patience=0.2) as tracked:
        for at in range(5000):
            tracked.scalars("finetune.train-0", at, {"loss": 1.0})
    ended.set()
    assert len(said) == 2
    assert "warning: --track breaks:y cannot be written to, and is left out from here on: SystemExit: out of files" in said
    (hangs,) = [text for text in said if "hangs:x" in text]
    assert re.fullmatch(r"warning: --track hangs:x does not answer: its last [\d,]+ numbers are not waited for", hangs)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> str:
    """A Python that sees the packages of this one and has a tracker besides, fetched by pip."""
    folder, packages = tmp_path_factory.mktemp("trackers") / "env", request.param
    venv.create(folder, with_pip=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "shared.pth").write_text("".join(f"{path}\n" for path in sys.path if path.endswith("site-packages")))
    words = [str(folder / "bin" / "python"), "-m", "pip", "install", "-qq", "--disable-pip-version-check", *packages.split()]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(f"pip did not bring {packages} within five minutes")
    if done.returncode:
        pytest.skip(f"pip cannot bring {packages} here: {done.stderr.strip().splitlines()[-1:]}")
    return str(folder / "bin" / "python")


def tracked(python: str, where: str, folder: Path, **environment: str) -> None:
    """Run the pipeline with this tracker, in a process of this Python."""
    words = [python, str(PIPELINE), "--store", str(folder / "store"), "--runner", "process", "--track", where]
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--track" not in done.stderr, done.stderr


def told(python: str, code: str, *words: str, cwd: Path) -> dict[str, float]:
    done = subprocess.run([python, "-c", code, *words], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    made: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return made


@pytest.mark.slow
@pytest.mark.parametrize("python", ["tensorboard"], indirect=True)
def test_tensorboard_shows_a_run_its_figures_and_its_fine_tuning(python: str, tmp_path: Path) -> None:
    tracked(python, f"tensorboard:{tmp_path / 'board'}", tmp_path)
    code = (
        "import sys, json; from tensorboard.backend.event_processing.event_accumulator import EventAccumulator as A\n"
        "a = A(sys.argv[1]); a.Reload(); assert 'pipeline' in a.Tags()['tensors'] or 'pipeline/text_summary' in a.Tags()\n"
        "assert [e.step for e in a.Scalars('finetune/loss')] == [1, 2, 3]\n"
        "print(json.dumps({t: a.Scalars(t)[-1].value for t in a.Tags()['scalars']}))"
    )
    (folder,) = (tmp_path / "board").iterdir()
    made = told(python, code, str(folder), cwd=tmp_path)
    assert WANTED.items() <= made.items() and made["compressed/kl[prose]"] == 0.25


@pytest.mark.slow
@pytest.mark.parametrize("python", ["mlflow-skinny sqlalchemy alembic"], indirect=True)
def test_mlflow_has_a_run_its_figures_and_its_fine_tuning(python: str, tmp_path: Path) -> None:
    """In a database in a file."""
    where = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tracked(python, f"mlflow:{where}", tmp_path)
    code = (
        "import sys, json; from mlflow.tracking import MlflowClient as C; c = C(tracking_uri=sys.argv[1])\n"
        "(run,) = c.search_runs([c.get_experiment_by_name('moeflow').experiment_id])\n"
        "assert run.info.status == 'FINISHED' and run.data.params['steps'] == '3', run\n"
        "assert run.data.params['version'] == 'tracked_pipeline@1'\n"
        "assert [m.step for m in c.get_metric_history(run.info.run_id, 'finetune/loss')] == [1, 2, 3]\n"
        "print(json.dumps(run.data.metrics))"
    )
    made = told(python, code, where, cwd=tmp_path)
    assert WANTED.items() <= made.items() and made["compressed/kl prose"] == 0.25


@pytest.mark.slow
@pytest.mark.parametrize("python", ["wandb"], indirect=True)
def test_wandb_keeps_a_run_offline(python: str, tmp_path: Path) -> None:
    tracked(python, "wandb:mine", tmp_path, WANDB_MODE="offline", WANDB_DIR=str(tmp_path), WANDB_SILENT="true")
    (kept,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert all(name.encode() in kept.read_bytes() for name in (*WANTED, "tracked_pipeline"))
