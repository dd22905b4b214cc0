"""One process of a gang: its context, what it saves, and whether an error is its own fault or a peer's.

Knows neither Ray nor torch, nor who starts the processes: `children.py` on this machine, `ray/gang.py` on a cluster.
"""

import fcntl
import shutil
import uuid
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from moeflow.run.call import Call
from moeflow.run.materialize import Done, Reporter, Running, carry_out, commit
from moeflow.run.outcome import describe
from moeflow.run.words import count
from moeflow.run.work import shared_folder, work_folder
from moeflow.store import Store, StoreError, partial
from moeflow.store.partial import Snapshot
from moeflow.store.patience import heard

GRACE = 5.0  # seconds to wait for a peer's own error or death, after an error that it may have caused
# What torch's RuntimeErrors from collectives say when a peer has gone; those of NCCL have types of their own.
TORN = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "remote process exited")


class PeerLost(Exception):
    """A process of a gang was lost, and its step did not raise: the gang may start again from what was saved."""


@dataclass(frozen=True)
class Attempt:
    """One start of a gang: `attempt` is its unique name, `snapshots` are those it may continue from, newest first.

    The snapshots are listed once, before any process runs, so that all processes continue from the same one.
    """

    attempt: str
    processes: int
    snapshots: tuple[Snapshot, ...]
    other: int = 0  # processes of a gang whose snapshot this one cannot resume; 0 if there is none

    @staticmethod
    def of(call: Call, store: Store) -> "Attempt":
        processes, snapshots = call.resources.processes, partial.snapshots(store, call.key)
        mine = tuple(s for s in snapshots if s.processes == processes)
        return Attempt(uuid.uuid4().hex, processes, mine, snapshots[0].processes if snapshots and not mine else 0)


class Member(Running):
    """The Context of one process of a gang. It uploads what it saves while its step goes on."""

    def __init__(self, call: Call, store: Store, report: Reporter, work: Path, shared: Path, gang: Attempt, place: tuple[int, int]):
        super().__init__(call, store, report, work)
        self.rank, self.local_rank = place
        self.processes, self.settings = gang.processes, call.resources.settings
        self._gang, self._shared = gang, shared
        self._copy = work / "saving"
        self._uploads = ThreadPoolExecutor(1)
        self._upload: Future[None] | None = None
        self._saved = -1

    def progress(self, done: int, total: int, unit: str, detail: str = "") -> None:
        if self.rank == 0:
            super().progress(done, total, unit, detail)

    def scalars(self, at: int, values: Mapping[str, float]) -> None:
        if self.rank == 0:
            super().scalars(at, values)

    def note(self, text: str) -> None:
        if self.rank == 0:
            super().note(text)

    def save(self, folder: Path, at: int = 0) -> None:
        if at <= self._saved:
            raise ValueError(f"save(at={at}) after at={self._saved}; pass a number that grows, such as the optimizer step")
        self.uploaded()
        self._saved = at
        shutil.rmtree(self._copy, ignore_errors=True)  # it exists if the disk was full last time
        shutil.copytree(folder, self._copy)  # because the step may change what it saved, even in place
        self._upload = self._uploads.submit(self._keep, Snapshot(at, self._gang.attempt, self.processes))

    def resume(self) -> Path | None:
        if self._gang.other:
            before, now = count(self._gang.other, "process", "es"), count(self.processes, "process", "es")
            self.note(f"an interrupted run of {before} cannot be continued by {now}: it starts again")
        if not self._gang.snapshots:
            return None
        into = self._shared / "resumed"
        with (self._shared / "fetching").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the first of this machine's processes downloads for all
            if not into.exists():
                partial.load_parts(self._store, self._call.key, self._gang.snapshots, into)
        self.resumed = into.exists()
        return into if self.resumed else None

    def uploaded(self) -> None:
        """Wait for the running upload. Raises what stopped it."""
        upload, self._upload = self._upload, None
        if upload is not None:
            upload.result()

    def end(self) -> None:
        """Wait until the last state is in the store; note it if that fails."""
        try:
            self.uploaded()
        except (StoreError, OSError) as error:
            self.note(f"its last state was not kept: {describe(error)}")

    def _keep(self, snapshot: Snapshot) -> None:
        partial.save_part(self._store, self._call.key, self._copy, snapshot, self.rank)
        shutil.rmtree(self._copy)


def take_part(call: Call, store: Store, report: Reporter, gang: Attempt, *, rank: int, local_rank: int) -> Done | None:
    """Run `call` as one process of a gang. Rank 0 stores its output and returns that; the others return None.

    Raises what the step raises, and StoreError; what was saved before that is in the store.
    """
    function = call.function  # first, because a limit on threads reaches only libraries that are loaded
    root = store.cache / "work"
    with heard(report.waits), shared_folder(root, gang.attempt) as shared, work_folder(root) as work:
        context = Member(call, store, report, work, shared, gang, (rank, local_rank))
        try:
            seconds = carry_out(function, call, store, context)
        finally:
            context.end()
        return commit(call, store, context, seconds) if rank == 0 else None


def torn(error: BaseException | None) -> bool:
    """Whether an error says that a peer could not be reached, so that it may be the peer's fault."""
    visited: set[int] = set()
    while error is not None and id(error) not in visited:
        visited.add(id(error))
        name = type(error).__name__
        if name.startswith("Dist") and type(error).__module__.startswith("torch"):  # DistBackendError, DistNetworkError, ...
            return True
        if isinstance(error, RuntimeError) and any(words in str(error) for words in TORN):
            return True
        error = error.__cause__ or error.__context__
    return False
