"""Prediction layers that stay as they are, beside decoder layers that keep their number of experts."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.decompose.options import Decomposition
from moeflow.methods.graph import Model, Pass, Sample
from moeflow.methods.prune.searches import Search
from moeflow.methods.recipes import naee, unified
from moeflow.methods.slim.methods import Slimming
from moeflow.methods.trim.steps import Trimming
from moeflow.model.checkpoint import Tensors
from moeflow.run.pipeline import call, load, page
from moeflow.step import upstream
from tests import predicting, running
from tests.predicting import Predictions

ROOT = Path(__file__).parents[3]
PIPELINES = ROOT.glob("pipelines/*.py")
WAYS: dict[str, dict[str, Any]] = {
    "slim": {"slim": Slimming("round_to_nearest", group=8, packed=False)},
    "decompose": {"decompose": Decomposition(0.3, ranks="uniform", svd="vanilla")},
    "trim": {"trim": Trimming("moe_blocks", 1)},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three decoder layers, two of them with experts, and a prediction layer."""
    folder = tmp_path_factory.mktemp("source") / "model"
    return predicting.write("deepseek_v3", folder, num_hidden_layers=3, first_k_dense_replace=1)


def compressed(source: Path, folder: Path, mtp: str, **how: Any) -> Model:
    model = running.model_in(source, mtp=mtp)
    tokens = data.tokens(running.matrix_of(folder), model, Sample(8, 16))
    return unified.compress(model, tokens, Pass(batch=4, shard=4), order=next(iter(how)), **how).model


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mtp", ["keep", "prune"])
def test_a_prediction_layer_stays_as_it_is_and_loads_where_counts_stay(way: str, mtp: str, source: Path, tmp_path: Path) -> None:
    store, target = running.store_in(tmp_path), checkpoint.checkpoint_of(compressed(source, tmp_path, mtp, **WAYS[way]))
    running.run(store, target)
    store.fetch(target.key, tmp_path / "out")
    before, after = Tensors(source), Tensors(tmp_path / "out")
    own = [n for n in before if n.startswith("model.layers.3.")]
    assert own and all(torch.equal(before[n], after[n]) for n in own)
    loaded = Predictions(tmp_path / "out")
    ids_NL = torch.randint(3, 96, (1, 12), generator=torch.Generator().manual_seed(3))
    loaded.behind(loaded.states(ids_NL), ids_NL)


@pytest.mark.parametrize("mtp", ["keep", "prune"])
def test_packed_decoder_layers_are_refused_beside_a_prediction_layer(mtp: str, source: Path, tmp_path: Path) -> None:
    made = compressed(source, tmp_path, mtp, slim=Slimming("round_to_nearest", group=8))
    with pytest.raises(
        ValueError, match="decoder layer 1 is packed and multi-token-prediction layer 3 is not: .*; take mtp='drop'"
    ):
        checkpoint.checkpoint_of(made)


@pytest.mark.parametrize("mtp", ["keep", "prune"])
def test_no_decoder_layer_goes_from_before_a_prediction_layer(mtp: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="under which alone transformers loads them, so no decoder layer can go; take mtp='drop'"):
        compressed(source, tmp_path, mtp, trim=Trimming("decoder_layers", 1))


def test_other_counts_beside_a_prediction_layer_are_refused_however_they_came_to_be(source: Path, tmp_path: Path) -> None:
    model, dropped = running.model_in(source, mtp="keep"), running.model_in(source)
    tokens = data.tokens(running.matrix_of(tmp_path), dropped, Sample(8, 16))
    pruned = naee.prune(calibrate.run(dropped, tokens, Pass(batch=4, shard=4)), 6, Search("reap"))
    with pytest.raises(ValueError, match="prediction layer has 8 experts and the decoder layers 6: they load only with the same"):
        checkpoint.checkpoint_of(model.with_layers(dict(enumerate(pruned.layers))))


@pytest.mark.parametrize("pipeline", sorted(PIPELINES), ids=lambda p: p.stem)
def test_every_pipeline_takes_mtp_from_the_command_line(pipeline: Path, tmp_path: Path) -> None:
    build = load(pipeline)
    assert "mtp " in page(build)
    with pytest.raises(ValueError, match="-p mtp=slice"):
        call(build, ["mtp=slice", f"model={tmp_path}", *["budget.ratio=0.5"] * (pipeline.stem == "fit")])


def test_the_command_line_says_what_becomes_of_prediction_layers(source: Path, tmp_path: Path) -> None:
    words = [f"model={source}", f"tokens={running.matrix_of(tmp_path).spec}", f"heldout={running.matrix_of(tmp_path, seed=1).spec}"]
    words += [
        "keep=6",
        "search=reap",
        "calibration.sequences=8",
        "calibration.length=16",
        "heldout.sequences=8",
        "heldout.length=16",
    ]
    build = load(ROOT / "pipelines" / "mixtral.py")
    pruned = {s.params["layer"] for s in upstream([call(build, [*words, "mtp=prune"])]) if s.name == "rewrite.experts"}
    assert pruned == {1, 2, 3}
    assert not any(s.name == "predict.observe" for s in upstream([call(build, words)]))
    with pytest.raises(ValueError, match="mtp='keep': multi-token-prediction layer 3 has 8 experts"):
        call(build, [*words, "mtp=keep"])
