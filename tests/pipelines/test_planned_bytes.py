"""What a plan says of a run's bytes is what the run then reads and writes, within a tenth."""

from pathlib import Path

import pytest

from moeflow.run import in_process, pipeline
from moeflow.run.plan import plan
from moeflow.step import Step, upstream
from moeflow.store import Store
from tests import running
from tests.pipelines import words

ROOT = Path(__file__).parents[2]
SHORT = ["calibration.sequences=16", "calibration.length=64", "calibration.batch=4", "heldout.sequences=4", "heldout.length=64"]
FIT = ["budget.ratio=0.25", "calibration.shard=8", "offers.group=16", "offers.measured=512"]
RUNS = [
    ("mixtral", ["keep=6"]),
    # by lm_loss, experts of a pruned model are left out one by one, and how many it has left is not known when a plan is made
    ("mixtral_moei2", ["decomposition.importance=recon", "calibration.record=1024", "tune=none", *words.GENETIC]),
    ("mixtral_unified", ["order=slim", "slim=gptq", "slim.group=16", "slim.inputs=sequential", "slim.target=model"]),
    ("fit", [*FIT, "offers.counts=[0.75]", "offers.ranks=[0.3]", "offers.bits=[4]", "offers.rounds=1"]),
    pytest.param("fit", FIT, marks=pytest.mark.slow),
]  # fmt: skip


def built(name: str, params: list[str]) -> Step:
    texts = [f"model={running.SMALL}", "tokens=python:stdlib/a*.py", "heldout=python:stdlib/t*.py"]
    return pipeline.call(pipeline.load(ROOT / "pipelines" / f"{name}.py"), [*texts, *SHORT, *params])


@pytest.mark.parametrize(("name", "params"), RUNS)
def test_a_run_reads_and_writes_what_its_plan_says(name: str, params: list[str], tmp_path: Path) -> None:
    store, target = Store.open(str(tmp_path / "store")), built(name, params)
    targets = [target, *(r for r in target.reports if r.name != "evaluate.speed")]  # which takes long, and reads whole files
    planned = plan(targets, store)
    outcome = in_process.run(targets, store)
    assert sum(s.reads for s in outcome.steps) == pytest.approx(planned.reads, rel=0.1)
    assert sum(s.writes for s in outcome.steps) == pytest.approx(planned.writes, rel=0.1)
    made = store.manifests(s.key for s in upstream(targets)).values()
    counted = {m.key: {kind for kind, n in m.operations.items() if n} for m in made if not m.same_as}
    assert all(bool(counted[row.key] - {"text"}) == bool(row.operations) for row in planned.rows if row.key in counted)
