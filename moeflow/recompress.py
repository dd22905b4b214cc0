"""Scheduled re-compression: the newest checkpoint of a fine-tune becomes a version, is judged, and gets the label if it passes.

A scheduler calls this again and again; each call looks at the source first, and mostly there is nothing new. What was done is a
record in the store, under a digest of what was asked and of what lay there, so a call that was interrupted is done again, and
continues from what is stored.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from enum import IntEnum
from pathlib import Path
from typing import Any

from moeflow.home import home
from moeflow.job import Job, Ready
from moeflow.report import promotion
from moeflow.report.drift import Drift, drift_lines, drift_of
from moeflow.report.figures import sayable
from moeflow.report.gate import refusal
from moeflow.report.promotion import Considered, NotPassed
from moeflow.run import StepFailed, recipe
from moeflow.run.intake import brought
from moeflow.run.opening import pipeline_file
from moeflow.run.progress import Show
from moeflow.run.words import count, span
from moeflow.sources.newest import Checkpoint, newest
from moeflow.sources.newest import brought as brought_here
from moeflow.store import NotStored, Store, StoreError, gc, versions
from moeflow.store.claims import Busy, claimed
from moeflow.store.errors import LabelMoved, MissingSource
from moeflow.store.patience import wait_out
from moeflow.store.runs import Mark
from moeflow.store.store import arriving

DONE = "recompressed/"


class Exit(IntEnum):
    """The exit codes of `moeflow recompress`; 75 is what schedulers know as a failure that may pass (EX_TEMPFAIL)."""

    PROMOTED = 0
    FAILED = 1
    WRONG = 2
    NOTHING_NEW = 3
    REFUSED = 4
    LATER = 75


class Later(Exception):
    """It cannot be done now, and may be later: half a checkpoint, another run at work, a place that does not answer."""


class NothingNew(Exception):
    """What lies there was compressed before, as it is asked for now."""


@dataclass(frozen=True)
class Request:
    """What is to be compressed again and again, and which label it is for."""

    file: Path
    source: str
    label: str
    name: str
    params: tuple[str, ...] = ()
    gate: tuple[str, ...] = ()
    """The bounds, as `--gate` takes them; files are read."""
    marker: str = ""
    """The name of the file that a checkpoint's writer leaves at the end; "" for one that is watched until it stands still."""
    settle: float = 30.0
    """Seconds between two looks at a checkpoint without a marker."""
    engine: str = ""
    """What is to load it, as in vllm,tp=2; "" for no engine in particular."""

    def __post_init__(self) -> None:
        versions.check_name(self.name)
        versions.check_name(self.label)
        if self.label == self.name:
            raise ValueError(f"--promote {self.label}: a label needs another name than the versions that it points at; see --name")
        if "/" in self.marker:
            raise ValueError(f"--marker {self.marker!r}: name a file in the checkpoint's own folder, as in --marker DONE")

    def digest(self, there: Checkpoint) -> str:
        """What is asked, of what lies there: a second time there is nothing new to it."""
        text = pipeline_file(self.file).read_text()
        asked = [self.name, self.label, list(self.params), list(self.gate), text, there.uri, there.mark]
        asked += [self.engine] if self.engine else []
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


@dataclass
class Result:
    """What a call has come to."""

    exit: Exit
    why: str = ""
    source: str = ""
    version: str = ""
    was: str = ""
    """The version that the label pointed at before; "" for none."""
    steps: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    considered: Considered | None = None
    drift: Drift | None = None
    removed: tuple[str, ...] = ()
    """The versions that were cleaned up."""

    def json(self) -> dict[str, Any]:
        """The result as a notice: what happened, the comparison, and what the gate says."""
        event = {Exit.PROMOTED: "promoted", Exit.REFUSED: "refused", Exit.NOTHING_NEW: "nothing new", Exit.LATER: "later"}
        told: dict[str, Any] = {
            "event": event.get(self.exit, "failed"), "exit": int(self.exit), "why": self.why, "source": self.source,
            "version": self.version, "was": self.was, "steps": self.steps, "seconds": round(self.seconds, 3),
            "removed": list(self.removed),
        }  # fmt: skip
        if self.considered is not None:
            told |= {"label": self.considered.label, "gate": [asdict(d) for d in self.considered.decisions]}
        if self.drift is not None:
            told |= {"figures": list(self.drift.figures), "overlap": self.drift.overlap}
            told |= {"layers": [asdict(one) for one in self.drift.layers]}
        said: dict[str, Any] = sayable(told)
        return said


def find(request: Request, store: Store, *, say: Callable[[str], None]) -> Checkpoint:
    """The newest complete checkpoint that was not done yet. Raises NothingNew, Later, and ValueError for what is refused."""

    def look() -> tuple[Checkpoint | None, Checkpoint | None]:
        return wait_out(lambda: newest(request.source, request.marker), store.patience, "the source")

    there, arriving = look()
    if there is None or store.blobs.stat(_record(request, there)) is not None:
        if arriving is not None:
            raise Later(f"{arriving.uri} is not complete: {arriving.lacks}")
        assert there is not None, "a source without a checkpoint is refused"
        raise NothingNew(f"{there.uri} was compressed before, and has not changed")
    if arriving is not None:
        say(f"{arriving.uri} is newer and not complete ({arriving.lacks}); {there.uri} is taken")
    if request.marker or not request.settle or ("://" not in there.uri and not Path(there.uri).is_dir()):
        return there  # a commit on the hub stands still
    say(f"{there.uri} is new; it is looked at again in {span(request.settle)}")
    time.sleep(request.settle)
    again, _ = look()
    if again is None or (again.uri, again.mark) != (there.uri, there.mark):
        raise Later(f"{there.uri} changed between two looks, so it is still being written")
    return there


def converted(there: Checkpoint) -> Path:
    """The folder with the checkpoint that DeepSpeed's own code makes of ZeRO shards, in moeflow's home on this machine.

    Raises ValueError with what DeepSpeed says of shards that it cannot put together.
    """
    out = home() / "converted" / there.mark[:32]
    if out.is_dir():
        return out
    with tempfile.TemporaryDirectory() as scratch, arriving(out) as half:
        folder = brought_here(there, Path(scratch))
        command = [sys.executable, "-P", "-m", "moeflow.methods.finetune.zero", str(folder), str(half)]
        env = os.environ | {"DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu")}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
            raise ValueError(f"{there.uri} holds the shards of a DeepSpeed ZeRO run, which DeepSpeed cannot convert: {said}")
    return out


def words(request: Request, there: Checkpoint) -> list[str]:
    """The parameters of the pipeline for this checkpoint. Raises ValueError for an adapter whose base is not known."""
    own = next((w for w in request.params if w.startswith("model=")), "")
    if there.kind != "adapter":
        if own:
            raise ValueError(f"-p {own}: --source says what is compressed; leave -p model=... away")
        more = ["source=copy"] * (there.kind == "zero")  # into the store, because no other machine has the folder
        more += ["adapter=none"] * recipe.is_recipe(request.file)  # the one of the recipe's version is not this checkpoint's
        given = {w.partition("=")[0] for w in request.params}
        model = converted(there) if there.kind == "zero" else there.uri
        return [f"model={model}", *(w for w in more if w.partition("=")[0] not in given), *request.params]
    if not own and not there.base:
        raise ValueError(
            f"{there.uri} is an adapter that names no model as its base; say it with -p model=BASE, or save it with "
            "base_model_name_or_path in its adapter_config.json"
        )
    base = own or f"model={there.base}"
    return [base, f"adapter={there.uri}", *(w for w in request.params if w != own)]


@contextmanager
def alone(request: Request, store: Store, there: Checkpoint) -> Iterator[None]:
    """Hold the label's place for one run at a time. Raises Later if another run that lives has it, NothingNew if one was first."""
    mark = Mark(store, [])
    try:
        with claimed(store, f"recompress-{request.label}", mark.name):
            if store.blobs.stat(_record(request, there)) is not None:
                raise NothingNew(f"{there.uri} was compressed by another run meanwhile")
            yield
    except Busy:
        raise Later(f"another run is compressing for {request.label} now") from None
    finally:
        mark.end()


def planned(request: Request, job: Job, store: Store, there: Checkpoint) -> Ready:
    """The run, checked before a step starts; `job` says how it runs. Raises ValueError, CannotRun."""
    try:
        return replace(job, given=words(request, there)).ready_in(store)
    except MissingSource as error:
        if there.kind != "adapter" or there.uri in str(error):
            raise
        raise ValueError(f"{there.uri} is an adapter, and its base cannot be had: {error}; give it with -p model=BASE") from error


def run(request: Request, store: Store, there: Checkpoint, ready: Ready, shown: Show) -> Result:
    """Compress, judge and promote. Raises StepFailed and what else a run raises."""
    began, prepared = time.monotonic(), ready.prepared
    most = len(prepared.plan.keys("run"))
    try:
        prepared = brought(prepared, progress=shown, options=ready.job.options, here=there.kind == "zero")
        if most:
            left, same = (len(prepared.plan.keys(state)) for state in ("run", "same content"))
            told = f"plan: of {count(most, 'step')} behind the new files at most {left} are to run"
            shown.say(f"{told}, {same} have the contents of before")
        source = {"uri": there.uri, "kind": there.kind, "mark": there.mark} | ({"base": there.base} if there.base else {})
        done = replace(ready, prepared=prepared).go(shown, {"source": source})
    except BaseException as error:
        prepared.mark.end()
        if isinstance(error, StepFailed) and isinstance(error.cause, MissingSource):
            raise Later(f"{there.uri} changed while it was read: {error.cause}") from error
        raise
    result = _judged(request, store, done.ref)
    result.source, result.seconds = there.uri, time.monotonic() - began
    result.steps = {"run": len(done.outcome.ran), "stored": done.outcome.reused, "most": most}
    store.blobs.create(_record(request, there), json.dumps({"version": result.version, "exit": int(result.exit)}).encode())
    return result


def _judged(request: Request, store: Store, ref: str) -> Result:
    """Ask the gate, and move the label. Raises Later if another run moves it meanwhile."""
    considered = promotion.consider(store, ref, request.label, request.gate)
    there = considered.there
    served = versions.resolve(store, there.ref) if there else None
    before = served if isinstance(served, versions.Version) else None
    drift = drift_of(store, before, considered.version, considered.figures, considered.promoted)
    result = Result(Exit.PROMOTED, "", "", ref, there.ref if there else "", considered=considered, drift=drift)
    try:
        promotion.promote(store, considered)
    except NotPassed:
        result.exit, result.why = Exit.REFUSED, refusal(considered.decisions)
    except LabelMoved as error:
        raise Later(str(error)) from error
    return result


def clean(request: Request, store: Store, keep: int) -> tuple[str, ...]:
    """Delete what is not needed for the newest `keep` versions of this name, and for labels. Returns the versions that went."""
    gone = gc.delete(store, gc.gc(store, gc.Policy(keep=keep, name=request.name)))
    return tuple(v.ref for v in gone.versions)


def cleaned(request: Request, store: Store, keep: int | None, result: Result, say: Callable[[str], None]) -> None:
    """Clean up, if it is asked for; what cannot be deleted is said, and changes nothing of the result."""
    try:
        result.removed = clean(request, store, keep) if keep else ()
    except (StoreError, NotStored, OSError) as error:
        say(f"warning: cleaning up failed ({' '.join(str(error).split())}); the next call tries again, as does moeflow gc")


def lines(result: Result) -> list[str]:
    """What a call has come to, for people: the drift, what the gate says, and where the label is."""
    told = drift_lines(result.drift) if result.drift else []
    if result.considered is not None:
        told += [f"gate: {'ok' if d.state == 'holds' else 'no'}  {d.why}" for d in result.considered.decisions]
        label, was = result.considered.label, f", which was {result.was}" if result.was else ""
        promoted = f"{label} is {result.version}{was}"
        told.append(promoted if result.exit is Exit.PROMOTED else f"{result.version} is not promoted: {result.why}")
    told += [f"cleaned up: {', '.join(result.removed)}"] if result.removed else []
    return told


def _record(request: Request, there: Checkpoint) -> str:
    return f"{DONE}{request.digest(there)}.json"
