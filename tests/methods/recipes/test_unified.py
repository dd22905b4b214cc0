"""What is computed for each stage of the unified framework."""

from pathlib import Path
from typing import Any

import pytest

from moeflow.methods.checkpoint.steps import checkpoint_of
from moeflow.methods.graph import Pass
from moeflow.methods.recipes import unified
from moeflow.methods.trim.steps import Trimming
from moeflow.run import pipeline
from moeflow.step import Step, upstream
from tests import running, tiny
from tests.models import calibrated
from tests.pipelines.words import SMALL as small_words

PIPELINES = Path(__file__).parents[3] / "pipelines"


def of_name(target: Step, name: str) -> list[Step]:
    return [s for s in upstream([target]) if s.name == name]


@pytest.mark.parametrize(
    ("how", "recorded"),
    [
        (Trimming("experts", 2), {"inputs": 0}),
        (Trimming("moe_blocks", 1), {"inputs": 0}),
        (Trimming("decoder_layers", 1), {"inputs": 0, "between": 32}),
    ],
)
def test_a_calibration_for_a_trimming_records_no_input_of_a_moe_block(
    how: Trimming, recorded: dict[str, Any], tmp_path: Path
) -> None:
    model = running.model_in(tiny.write("mixtral", tmp_path / "model"))
    tokens = calibrated(model, tmp_path).tokens
    small = unified.compress(model, tokens, Pass(batch=2, shard=4, record=64, per_expert=8), order="trim", trim=how)
    observed = of_name(checkpoint_of(small.model), "calibrate.observe")
    assert observed and all(o.params["recording"] == recorded for o in observed)


@pytest.mark.parametrize(
    ("words", "name", "params"),
    [
        (["trim=decoder_layers", "trim.rule=discrete"], "trim.decoder_layers", {"rule": "discrete", "drop": 1}),
        (["trim=decoder_layers"], "trim.decoder_layers", {"rule": "consecutive", "drop": 1}),
        (["trim=experts", "trim.across=layer"], "trim.experts", {"across": "layer", "keep": 7}),
        (["trim=experts", "trim.criterion=reap"], "trim.scores", {"criterion": "reap"}),
        (["trim=moe_blocks"], "trim.moe_blocks", {"drop": 1}),
    ],
)
def test_every_way_of_the_paper_to_trim_is_reached_from_the_command_line(
    words: list[str], name: str, params: dict[str, Any], tmp_path: Path
) -> None:
    source, matrix = tiny.write("mixtral", tmp_path / "model"), running.matrix_of(tmp_path)
    small = [*small_words, "order=trim", "trim.dropped=1"]
    build = pipeline.load(PIPELINES / "mixtral_unified.py")
    target = pipeline.call(build, [f"model={source}", f"tokens={matrix.spec}", *small, *words])
    steps = of_name(target, name)
    assert steps and all(s.params | params == s.params for s in steps)
