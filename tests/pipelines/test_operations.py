"""Every step says before it runs how many operations it takes, and the sum is what transformers' own model asks for."""

import re
from pathlib import Path

import pytest

from benchmarks.scale import passes
from moeflow.model import operations
from moeflow.model.cost import forward_flops
from moeflow.run import pipeline
from moeflow.step import Step, step_of, upstream
from tests import running
from tests.pipelines import words

ROOT = Path(__file__).parents[2]
TASKS = ROOT / "tests" / "tasks"
TEXTS = ["tokens=python:stdlib/a*.py", "heldout=python:stdlib/t*.py", *words.SMALL]
TUNED = ["tune.text=python:stdlib/a*.py", *words.TUNED, "tune.loss=kl"]
MOVES = {"calibrate.embed"}
"""Steps that ask for a GPU and compute nothing: they look rows up."""


def steps_of(name: str, *params: str) -> list[Step]:
    model = f"model={running.SMALL}"
    target = pipeline.call(pipeline.load(ROOT / "pipelines" / f"{name}.py"), [model, *TEXTS, *params])
    return upstream([target, *target.reports])


def test_every_step_that_asks_for_a_gpu_says_its_operations() -> None:
    steps = [
        *steps_of("mixtral", "keep=6", "skipping=none"),
        *steps_of("mixtral_moei2", "search.span=2", *words.GENETIC, *TUNED),
        *steps_of("mixtral_moei2", "decomposition.svd=whitened", "decomposition.ranks=global", "tune=none"),
        *steps_of("mixtral_unified", "slim.group=16", "trim=none"),
        *steps_of("mixtral", "keep=6", f"tasks={TASKS}/numbers.jsonl,{TASKS}/closing.yaml", f"prompts={TASKS}/prompts.jsonl"),
        *steps_of("mixtral", "keep=6", "serving=nowhere"),
        *steps_of("fit", "budget.ratio=0.25", "offers.group=16", "offers.measured=128", "recover.rows=64", "gang.gpus=0"),
    ]
    asked = {s.name for s in steps if s.resources.gpus} - MOVES
    assert not {s.name for s in steps if s.name in asked and not sum(s.spec.operations.values())}
    marked = {
        name
        for file in (ROOT / "moeflow" / "methods").glob("*/steps.py")
        for name in re.findall(r'^@step\("([\w.]+)"[^\n]*gpus=1', file.read_text(), re.M)
    }
    assert marked - asked - MOVES <= {"evaluate.written", "predict.observe"}, "of demonstrations and of other models"


def test_a_pass_takes_as_many_operations_as_transformers_own_model(family: Path) -> None:
    model, length = running.model_in(family), 16
    layers = [layer.spec.output for layer in model.layers]
    (of_head,) = operations.head(model.rest.spec.output, 2 * length, "auto").values()
    assert operations.forward(layers, 2, length) + of_head == pytest.approx(2 * forward_flops(model.config, length), rel=0.05)


def test_a_fork_is_one_more_pass_behind_the_layer_where_it_begins() -> None:
    steps = steps_of("fit", "budget.ratio=0.25", "offers.group=16", "offers.measured=128", "offers.rounds=1", "calibration.stage=2")
    (advance, *_) = (s for s in steps if s.name == "calibrate.advance")
    of_layer = sum(advance.spec.operations.values()) / len(advance.inputs[2:])
    per_token = of_layer / advance.spec.output.sequences / advance.spec.output.length
    sweeps = [s for s in steps if s.name == "calibrate.forks"]
    assert sum(sum(n for _, n in begun_in(s)) > 0 for s in sweeps) >= 2
    for sweep in sweeps:
        first, tokens = sweep.params["how"]["first"], 16 * sum(n for _, n in sweep.params["how"]["rows"])
        begun, (rest, *_) = begun_in(sweep), sweep.inputs
        head = operations.head(step_of(rest).spec.output, tokens * (1 + sum(n for _, n in begun)), "auto")
        passes = (sum(sweep.spec.operations.values()) - sum(head.values())) / per_token / tokens
        assert passes == pytest.approx(sum(1 + sum(n for at, n in begun if at <= i) for i in range(first, 4)), rel=0.01)


def test_fit_waits_for_five_passes_over_the_model_however_much_it_offers() -> None:
    options = "budget.ratio=0.25", "offers.group=16", "offers.measured=128", "calibration.stage=1"
    few, many = (passes(steps_of("fit", *options, *more)) for more in (("offers.bits=[4]", "offers.ranks=[0.3]"), ()))
    assert few == many and 4 < many <= 5


def begun_in(sweep: Step) -> list[tuple[int, int]]:
    """The layers in which forks begin, and how many."""
    alternatives = enumerate(sweep.params["alternatives"], sweep.params["how"]["first"])
    return [(layer, len(of_layer["names"])) for layer, of_layer in alternatives if of_layer]
