"""What plans are made of."""

from pathlib import Path

import pytest

from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.data import steps as data
from moeflow.methods.graph import Pass, Sample
from moeflow.methods.recipes import naee
from moeflow.model.spec import PRECISIONS, ObservedSpec, element_bytes
from moeflow.step import upstream
from tests import running, tiny


def test_a_number_has_eight_four_or_two_bytes_in_the_precision_of_a_run() -> None:
    assert {n: element_bytes({}, n) for n in PRECISIONS} == {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
    assert element_bytes({"dtype": "bfloat16"}, "auto") == 2 and element_bytes({}, "auto") == 4


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_choice_is_planned_to_read_the_recorded_inputs_at_the_size_that_they_have(dtype: str, tmp_path: Path) -> None:
    model = running.model_in(tiny.write("mixtral", tmp_path / "model"))
    matrix = data.tokens(running.matrix_of(tmp_path), model, Sample(8, 64))
    pruned = naee.prune(calibrate.run(model, matrix, Pass(batch=4, shard=4, dtype=dtype)), keep=6)  # type: ignore[arg-type]
    chosen = [s for s in upstream(pruned.choices) if s.name.startswith("prune.")]
    assert chosen
    for step in chosen:
        observed = [i.spec.output for i in step.inputs if isinstance(i.spec.output, ObservedSpec)]
        layer = next(i.spec.output for i in step.inputs if hasattr(i.spec.output, "block_bytes"))
        recorded = sum(s.rows for s in observed) * int(model.config["hidden_size"]) * element_bytes(model.config, dtype)
        assert 0 <= step.spec.reads - recorded - layer.headers - layer.block_bytes < 10_000
