"""A plan as a table for people: a line for each step name, or for each step."""

from collections import defaultdict
from collections.abc import Callable

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from moeflow.run.plan import Plan, Row
from moeflow.run.words import count, many, size

PEAKS: tuple[Callable[[Row], int], ...] = (lambda row: row.memory, lambda row: row.device)


def plan_table(plan: Plan, *, every: bool = False, plain: bool = False) -> Table:
    """With `every` a line for each step, else for each step name. Bytes and operations are those of the steps that would run."""
    made = Table(box=None if plain else SIMPLE, pad_edge=False)
    made.add_column("step")
    for title in ("run", "stored", "same content", "reads", "writes", "operations", "memory", "GPU memory"):
        made.add_column(title, justify="right")
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in plan.rows:
        groups[row.key if every else row.name].append(row)
    for name, rows in groups.items():
        states = [r.state for r in rows]
        numbers = [states.count("run"), states.count("stored"), states.count("same content")]
        made.add_row(
            Text(rows[0].label if every else name),
            *(f"{n:,}" if n else "" for n in numbers),
            *(size(n) if n else "" for n in (sum(r.reads for r in rows), sum(r.writes for r in rows))),
            many(sum(r.operations for r in rows)),
            *(
                size(n) if n else ""
                for n in (max((bytes_of(r) for r in rows if r.state == "run"), default=0) for bytes_of in PEAKS)
            ),
        )
    return made


def plan_lines(plan: Plan) -> list[str]:
    """The totals, and the steps' notes, warnings and problems; a line each."""
    stored = len(plan.keys("stored")) + len(plan.keys("same content"))
    lines = [
        f"{count(len(plan.rows), 'step')}: {len(plan.keys('run')):,} to run, {stored:,} stored; reads {size(plan.reads)}"
        f", writes {size(plan.writes)}, {_computes(plan)}at most {size(plan.memory)} of memory{_gpu(plan)} in one step"
    ]
    running = [r for r in plan.rows if r.state == "run"]
    lines += dict.fromkeys(f"{r.name}: {_gang(r)}" for r in running if r.processes)
    lines += dict.fromkeys(f"{r.name}: {note}" for r in running for note in r.notes)
    lines += [f"warning: {warning}" for warning in plan.warnings]
    lines += [f"cannot work: {problem}" for problem in plan.problems]
    return lines


def _computes(plan: Plan) -> str:
    return f"computes {many(plan.operations)} operations, " if plan.operations else ""


def _gpu(plan: Plan) -> str:
    return f" and {size(plan.device)} of a GPU's" if plan.device else ""


def _gang(row: Row) -> str:
    """For example `8 processes, 41.3 GiB on each device`."""
    device = f", {size(row.device)} on each device" if row.device else ""
    return count(row.processes, "process", "es") + device
