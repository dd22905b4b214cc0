"""What `plan` says of a real pruning, against what then happens."""

from pathlib import Path

from moeflow.run import in_process
from moeflow.run.plan import plan
from tests import running
from tests.models import graph


def test_a_plan_names_the_steps_and_bytes_of_what_then_happens(family: Path, tmp_path: Path) -> None:
    model, store = running.model_in(family), running.store_in(tmp_path)
    target = graph(model, running.matrix_of(tmp_path), keep=6)
    targets = [target, *target.reports]
    planned = plan(targets, store)
    outcome = in_process.run(targets, store)
    assert planned.keys("run") == outcome.ran and not planned.problems
    done = {s.key: s for s in outcome.steps}
    for row in planned.rows:
        step = done[row.key]
        slack = 4096 + 0.02 * step.writes
        assert abs(row.writes - step.writes) <= slack, row
        assert abs(row.reads - step.reads) <= 6144 + 0.02 * step.reads, row
    again = plan(targets, store)
    assert again.keys("run") == [] and again.reads == again.writes == 0


def test_a_plan_for_another_ratio_runs_only_what_comes_behind_the_calibration(family: Path, tmp_path: Path) -> None:
    model, store, matrix = running.model_in(family), running.store_in(tmp_path), running.matrix_of(tmp_path)
    first, second = (graph(model, matrix, keep=k) for k in (6, 8))
    in_process.run([first, *first.reports], store)
    names = {r.name for r in plan([second, *second.reports], store).rows if r.state == "run"}
    assert not any(n.startswith(("sources", "data", "checkpoint.layer", "calibrate.observe", "calibrate.embed")) for n in names)
    assert names >= {"prune.choose", "rewrite.experts", "checkpoint.assemble", "evaluate.quality"}
