"""Prediction layers of families of other kinds, of experts in stacks, and beside a multimodal model's text model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.graph import Model, Pass, Sample
from moeflow.methods.prune.searches import Search
from moeflow.methods.recipes import naee
from moeflow.model.checkpoint import Tensors
from tests import layouts, predicting, running
from tests.predicting import Predictions

SHORT = {"num_hidden_layers": 3, "first_k_dense_replace": 1}


def stacked(folder: Path) -> Path:
    """The checkpoint with its experts in stacks, as transformers holds them."""
    tensors = load_file(folder / "model.safetensors")
    for stem in sorted({n.partition("0.gate_proj.weight")[0] for n in tensors if n.endswith("experts.0.gate_proj.weight")}):
        count = sum(n.startswith(stem) for n in tensors) // 3
        gate, up, down = ([tensors.pop(f"{stem}{e}.{m}_proj.weight") for e in range(count)] for m in ("gate", "up", "down"))
        tensors[f"{stem}gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)])
        tensors[f"{stem}down_proj"] = torch.stack(down)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def pruned(model: Model, folder: Path, keep: int) -> Model:
    tokens = data.tokens(running.matrix_of(folder), model, Sample(8, 16))
    return naee.prune(calibrate.run(model, tokens, Pass(batch=4, shard=4)), keep, Search("reap"))


def written(model: Model, folder: Path) -> Path:
    store, target = running.store_in(folder), checkpoint.checkpoint_of(model)
    running.run(store, target)
    store.fetch(target.key, folder / "out")
    return folder / "out"


def loads(folder: Path) -> None:
    loaded = Predictions(folder)
    ids_NL = torch.randint(3, 96, (1, 12), generator=torch.Generator().manual_seed(3))
    assert all(t.isfinite().all() for t in loaded.behind(loaded.states(ids_NL), ids_NL))


def test_experts_in_stacks_are_pruned_as_one_by_one_and_stay_in_stacks(tmp_path: Path) -> None:
    plain = predicting.write("deepseek_v3", tmp_path / "plain", **SHORT)
    stacks = stacked(predicting.write("deepseek_v3", tmp_path / "stacks", **SHORT))
    one, other = (
        written(pruned(running.model_in(source, mtp="prune"), tmp_path, 6), tmp_path / f"of_{source.name}")
        for source in (plain, stacks)
    )
    want, have = Tensors(stacked_copy(one, tmp_path / "copy")), Tensors(other)
    assert {*want} == {*have} and all(torch.equal(want[n], have[n]) for n in want)
    assert have["model.layers.3.mlp.experts.down_proj"].shape[0] == 6
    assert json.loads((one / "config.json").read_text()) == json.loads((other / "config.json").read_text())


def stacked_copy(checkpoint: Path, folder: Path) -> Path:
    folder.mkdir()
    source = Tensors(checkpoint)
    save_file({n: source[n] for n in source}, folder / "model.safetensors")
    return stacked(folder)


def test_other_counts_are_refused_in_stacks_too(tmp_path: Path) -> None:
    source = stacked(predicting.write("deepseek_v3", tmp_path / "model", **SHORT))
    less = pruned(running.model_in(source), tmp_path, 6)
    with pytest.raises(ValueError, match="prediction layer has 8 experts and the decoder layers 6: they load only with the same"):
        checkpoint.checkpoint_of(running.model_in(source, mtp="keep").with_layers(dict(enumerate(less.layers))))


@pytest.mark.parametrize("mtp", [*(pytest.param(m, marks=pytest.mark.slow) for m in ("drop", "keep")), "prune"])
def test_a_family_that_is_looked_at(mtp: str, tmp_path: Path) -> None:
    source = predicting.write("glm4_moe", tmp_path / "model", **SHORT)
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    del config["moeflow_arch"]
    (source / "config.json").write_text(json.dumps(config))
    model = running.model_in(source, mtp=mtp)
    out = written(model if mtp == "keep" else pruned(model, tmp_path, 6), tmp_path)
    made: dict[str, Any] = json.loads((out / "config.json").read_text())
    changed = {} if mtp == "keep" else {"n_routed_experts": 6}
    assert made == config | changed | ({"num_nextn_predict_layers": 0} if mtp == "drop" else {})
    before, after = Tensors(source), Tensors(out)
    assert any(n.startswith("model.layers.3.") for n in after) == (mtp != "drop")
    if mtp == "keep":
        assert {*before} == {*after} and all(torch.equal(before[n], after[n]) for n in before)
    if mtp != "drop":
        loads(out)


def test_what_is_not_numbered_is_dropped_beside_a_multimodal_model(tmp_path: Path) -> None:
    folder = layouts.write("qwen3_5_moe", tmp_path / "model")
    layouts.edit(folder, lambda tensors: tensors | {"mtp.fc.weight": torch.ones(32, 64), "mtp.norm.weight": torch.ones(32)})
    found = layouts.KINDS["qwen3_5_moe"].found
    out = written(layouts.model_in(folder, found), tmp_path)
    before, after = layouts.raw(folder), layouts.raw(out)
    assert {*before} - {*after} == {"mtp.fc.weight", "mtp.norm.weight"} and all(torch.equal(after[n], before[n]) for n in after)
    with pytest.raises(ValueError, match="mtp='keep': the multi-token prediction at .* is called mtp.fc.weight and so on"):
        layouts.model_in(folder, found, mtp="keep")
