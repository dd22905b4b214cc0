"""A gang on a Ray cluster: one task without resources drives a `TorchTrainer`, whose workers are the gang's processes.

Ray Train places and starts them, and initialises torch.distributed. This module decides what an error means and
what is tried again, from where: a step that raises is not, a gang that lost a process or a node is.
"""

import functools
import logging
import os
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from moeflow.run.call import Call
from moeflow.run.gang import GRACE, Attempt, PeerLost, take_part, torn
from moeflow.run.materialize import stored
from moeflow.run.outcome import WorkerLost, brief, describe
from moeflow.run.ray.board import Answer
from moeflow.run.ray.nodes import free_orphans
from moeflow.run.ray.tasks import Failed, Made, Postponed, Refused, ToBoard, ask, failed, made
from moeflow.run.ray.travel import packed_error
from moeflow.run.work import work_folder
from moeflow.store import Store, partial
from moeflow.store.claims import Busy, claimed

QUIETLY = {  # Ray Train reads these where the trainer is made, and in its workers
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
# Each starts processes or moves the workers elsewhere, for features that no gang uses. What the first cleans up,
# `free_orphans` does, even without a dashboard.
UNUSED = {
    "PlacementGroupCleanerCallback",
    "DatasetsCallback",
    "WorkingDirectorySetupCallback",
    "ControllerMetricsCallback",
    "WorkerMetricsCallback",
}
PATIENCE = 7200  # seconds that torch.distributed waits for a peer, which may be downloading a large state


class Raised(Exception):
    """Carries what a step raised in a process through Ray Train; `torn`: a peer's end may have caused it."""

    def __init__(self, said: str, packed: bytes, torn: bool) -> None:
        super().__init__(said, packed, torn)
        self.said, self.packed, self.torn = said, packed, torn

    def __str__(self) -> str:
        return self.said


@ray.remote
def gang_task(call: Call, store: Store, board: Any, bundle: dict[str, float], run: str) -> Made | Failed | Refused | Postponed:
    """Drive a gang with `bundle` for each process. It resumes from what was saved as often as the board allows."""
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)
    os.environ.update(QUIETLY)
    lost: PeerLost | None = None
    try:
        with claimed(store, call.key, run), work_folder(store.cache / "work") as folder:
            while True:
                answer: Answer = ask(board.may_start.remote(call.key))
                if answer == "closed":
                    return Refused()
                if answer == "worn out":
                    raise WorkerLost(str(lost) if lost else "the node ran out of memory") from lost
                if lost is not None:
                    ToBoard(board).note(call.key, f"{lost}; it goes on from what was saved")
                try:
                    done = stored(call, store)
                    result = made(done, board) if done else _together(call, store, board, bundle, folder)
                except PeerLost as error:
                    lost = error
                else:
                    partial.drop(store, call.key)
                    return result
    except Busy as busy:
        return Postponed(str(busy))
    except Exception as error:
        return failed(error, board)


def _together(call: Call, store: Store, board: Any, bundle: dict[str, float], folder: Path) -> Made | Refused:
    """Start the gang once, when there is room for it. Raises what the step raises, and PeerLost."""
    from ray.train import ControllerError, TrainingFailedError, WorkerGroupError  # here: the driver need not wait for them

    while True:
        free_orphans()
        gang = Attempt.of(call, store)
        trainer = _trainer(functools.partial(_process, call, store, board, gang), gang.processes, bundle, folder / gang.attempt)
        try:
            with ThreadPoolExecutor(1) as beside:  # in the main thread it would take Ctrl-C away from Ray
                result: Made = beside.submit(trainer.fit).result().return_value
            return result
        except WorkerGroupError as error:
            judge(error.worker_failures)
        except ControllerError as error:
            if type(error.controller_failure).__name__ != "WorkerGroupStartupTimeoutError":
                raise PeerLost(brief(error.controller_failure)) from error
            if not ask(board.is_open.remote()):  # there was no room, and another step failed meanwhile
                return Refused()
        except (TrainingFailedError, RayError) as error:
            raise PeerLost(brief(error)) from error


def _trainer(process: Callable[[], Made | None], processes: int, bundle: dict[str, float], folder: Path) -> Any:
    """A `TorchTrainer` whose `fit` runs `process` in that many workers, and has the first one's result as `return_value`."""
    import ray.train
    import ray.train.torch

    train: Any = ray.train
    with_torch: Any = ray.train.torch

    class Trainer(with_torch.TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            return [c for c in super()._create_default_callbacks() if type(c).__name__ not in UNUSED]

    return Trainer(
        process,
        torch_config=with_torch.TorchConfig(timeout_s=PATIENCE),
        scaling_config=train.ScalingConfig(num_workers=processes, use_gpu="GPU" in bundle, resources_per_worker=bundle),
        run_config=train.RunConfig(
            name="gang",
            storage_path=str(folder),
            failure_config=train.FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
            logging_config=train.LoggingConfig("CRITICAL"),
        ),
    )


def _process(call: Call, store: Store, board: Any, gang: Attempt) -> Made | None:
    """Run one process of the gang, in a worker of the trainer."""
    from ray.train import get_context

    place = get_context()
    rank, local_rank = place.get_world_rank(), place.get_local_rank()
    try:
        done = take_part(call, store, ToBoard(board), gang, rank=rank, local_rank=local_rank)
    except BaseException as error:  # including SystemExit: the others wait for an answer
        said, packed, by_peer = describe(error), packed_error(error), torn(error)
        if by_peer:
            time.sleep(GRACE)  # time for the peer's own error or death to be seen
        raise Raised(said, packed, by_peer) from None
    return made(done, board) if done else None


def judge(failures: dict[int, Exception]) -> None:
    """Raise what the step raised, or PeerLost if a process was lost, because that may have caused the other errors."""
    gone = {rank: error for rank, error in failures.items() if not isinstance(error, Raised)}
    if gone:
        causes = {rank: getattr(error, "health_check_failure", error) for rank, error in gone.items()}
        raise PeerLost(", ".join(f"process {rank} was lost, {brief(cause)}" for rank, cause in causes.items()))
    raised = [error for error in failures.values() if isinstance(error, Raised)]
    for error in raised:
        if not error.torn:
            raise pickle.loads(error.packed)
    raise PeerLost(str(raised[0]))
