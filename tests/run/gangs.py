"""Steps of several processes that really talk to each other, and whose bytes do not depend on how many they are."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moeflow.step import Context, step
from tests.run.toy import log, sized


@contextmanager
def together(context: Context) -> Iterator[Any]:
    """torch.distributed, initialised as the runner has told."""
    import torch.distributed as dist

    started = not dist.is_initialized()
    if started:
        dist.init_process_group("gloo")
    assert (dist.get_rank(), dist.get_world_size()) == (context.rank, context.processes)
    assert int(os.environ["LOCAL_RANK"]) == context.local_rank
    yield dist
    if started:
        dist.destroy_process_group()


def total(dist: Any, value: int) -> int:
    import torch

    summed = torch.tensor([value])
    dist.all_reduce(summed)
    return int(summed)


@step("gang.sum", version=1, spec=sized)
def sum_(
    context: Context,
    number: Any,
    *,
    to: int,
    die_at: int = 0,
    marker: str = "",
    hold: int = 0,
    until: str = "",
    trace: str = "",
) -> None:
    """The squares up to `to` times a number, each process adding its share of every one and keeping what it has.

    At `die_at` the last process kills itself, unless `marker` says that one did; from `hold` on all wait for the file `until`.
    """
    times = int(number.file("n").read_text())
    with together(context) as dist:
        kept = context.resume()
        begin, so_far = 0, 0
        if kept is not None:
            states = [(kept / f"rank-{rank}").read_text() for rank in range(context.processes)]
            assert len(set(states)) == 1 and len(list(kept.iterdir())) == context.processes
            begin, so_far = map(int, states[0].split())
        log(trace, f"{context.rank} of {context.processes} from {begin}")
        for n in range(begin + 1, to + 1):
            so_far += times * total(dist, len(range(context.rank, n * n, context.processes)))
            state = context.scratch / "state"
            state.mkdir(exist_ok=True)
            (state / f"rank-{context.rank}").write_text(f"{n} {so_far}")
            context.save(state, at=n)
            context.progress(n, to, "squares", detail=f"sum {so_far}")
            context.scalars(n, {"sum": so_far})
            dist.barrier()  # the states before this one are in the store now
            if n == die_at and marker and context.rank == context.processes - 1 and not Path(marker).exists():
                Path(marker).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            while n >= hold > 0 and not Path(until).exists():
                time.sleep(0.02)
        context.note(f"summed up to {to}")
        dist.barrier()
    (context.out / "sum").write_text(str(so_far))
    if context.rank == 0:
        context.link(number, "n")
    else:
        (context.out / "mine").write_text(str(context.rank))


@step("gang.raise", version=1)
def raise_(context: Context, *, rank: int, trace: str = "") -> None:
    """One process raises while the others wait for it; their connections break as its own are closed."""
    log(trace, f"{context.rank}")
    context.note("all was well")
    with together(context) as dist:
        if context.rank == rank:
            dist.destroy_process_group()
            time.sleep(0.2)
            raise ArithmeticError(f"a bad expert on rank {context.rank}")
        total(dist, 1)


@step("gang.keep", version=1)
def keep(context: Context, *, to: int, hold: int = 0, until: str = "", trace: str = "") -> None:
    """Counts, each process for itself and without torch, keeping what it has; from `hold` on it waits for the file `until`."""
    kept = context.resume()
    begin = int((kept / f"rank-{context.rank}").read_text()) if kept else 0
    place = f"{os.environ['RANK']} of {os.environ['WORLD_SIZE']}"
    log(trace, f"{place} from {begin} with {dict(context.settings)} and {os.environ['OMP_NUM_THREADS']} threads in {kept}")
    for n in range(begin + 1, to + 1):
        state = context.scratch / "state"
        state.mkdir(exist_ok=True)
        (state / f"rank-{context.rank}").write_text(str(n))
        context.save(state, at=n)
        while n >= hold > 0 and not Path(until).exists():
            time.sleep(0.02)
    (context.out / "n").write_text(str(to))


@step("gang.save_again", version=1)
def save_again(context: Context) -> None:
    for at in (2, 2):
        context.save(context.scratch, at=at)


@step("gang.vanish", version=1)
def vanish(context: Context) -> None:
    """Ends without a word, but for the last that a library said."""
    os.write(2, b"a library aborts\n")
    os._exit(3)


@step("gang.leave", version=1)
def leave(context: Context) -> None:
    raise SystemExit("enough")
