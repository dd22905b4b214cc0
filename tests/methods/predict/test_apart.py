"""A prediction layer that is kept apart from the decoder layers, under names of its own, as Qwen3-Next and Mellum have it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moeflow.arch import Arch
from moeflow.arch.found import Found
from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.graph import Calibration, Model, Pass, Sample
from moeflow.methods.predict.steps import predicted
from moeflow.methods.prune.searches import Search
from moeflow.methods.recipes import naee
from moeflow.model.checkpoint import Tensors
from moeflow.sources import pin
from moeflow.store import Store
from tests import layouts, predicting, running, tiny
from tests.predicting import Predictions

DRAFTS = ("mellum", "exaone_moe")
"""The families that `generate(use_mtp=True)` drafts with; Qwen3-Next's linear attention cannot go back to before a draft."""
_SHARED = "model.layers.{layer}.mlp.shared_expert"
_LOOKED: dict[str, Arch] = {
    "mellum": layouts.arch("mellum", "mlp", "gate", experts_key="num_local_experts", normalize="always"),
    "qwen3_next": replace(
        layouts.arch("qwen3_next", "mlp", "gate", shared_gate=f"{_SHARED}_gate.weight", normalize="always"),
        shared=tuple(f"{_SHARED}.{m}_proj.weight" for m in ("gate", "up", "down")),
    ),
}
FOUND = {name: Found(replace(arch, moe=(0, 1, 2), expert_width=24)) for name, arch in _LOOKED.items()}
"""What looking at these families tells, which takes seconds; any other is looked at."""
FAMILIES = [pytest.param(f, marks=() if f in ("qwen3_next", "mellum") else pytest.mark.slow) for f in predicting.APART]


@pytest.fixture(scope="module", params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return predicting.write_apart(request.param, tmp_path_factory.mktemp(request.param) / request.param)


def model_in(folder: Path, mtp: str) -> Model:
    return checkpoint.pinned(pin(str(folder), kind="model"), found=FOUND.get(folder.name), mtp=mtp)


def calibrated(model: Model, folder: Path) -> Calibration:
    return calibrate.run(model, data.tokens(running.matrix_of(folder), model, Sample(8, 16)), Pass(batch=4, shard=4))


def written(model: Model, folder: Path) -> tuple[Path, Store]:
    store, target = running.store_in(folder), checkpoint.checkpoint_of(model)
    running.run(store, target)
    store.fetch(target.key, folder / "out")
    return folder / "out", store


def said(folder: Path, *inside: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    for key in inside:
        config = config[key]
    return config


def same(one: Path, other: Path) -> bool:
    before, after = Tensors(one), Tensors(other)
    return {*before} == {*after} and all(torch.equal(before[n], after[n]) for n in before)


def loads(folder: Path, *, drafts: bool) -> None:
    loaded = Predictions(folder)
    ids_NL = torch.randint(3, 96, (1, 12), generator=torch.Generator().manual_seed(3))
    assert all(t.isfinite().all() for t in loaded.behind(loaded.states(ids_NL), ids_NL))
    if drafts:
        alone = loaded.model.generate(ids_NL, max_new_tokens=6, do_sample=False)
        assert torch.equal(loaded.model.generate(ids_NL, max_new_tokens=6, do_sample=False, use_mtp=True), alone)


def test_it_stays_bit_for_bit_and_transformers_is_told_of_it(source: Path, tmp_path: Path) -> None:
    out, _ = written(model_in(source, "keep"), tmp_path)
    assert same(source, out)
    config = said(out)
    assert config["num_mtp_layers"] == 1 and len(config["mtp_layer_types"]) == 1
    assert {k: config[k] for k in said(source)} == said(source)
    loads(out, drafts=source.name in DRAFTS)


def test_it_is_dropped_by_default_and_a_note_says_how_it_stays(source: Path) -> None:
    (note,) = model_in(source, "drop").rest.spec.notes
    count = sum(n.startswith("mtp.") for n in Tensors(source))
    assert note.startswith(f"multi-token prediction (mtp.fc.weight and so on, {count} tensors) is dropped (mtp='keep' keeps")


def test_it_records_what_it_gets_in_transformers(source: Path, tmp_path: Path) -> None:
    kept, _ = written(model_in(source, "keep"), tmp_path)
    seen = predicted(calibrated(model_in(source, "prune"), tmp_path)).predicted
    store = running.store_in(tmp_path)
    running.run(store, *(part.step for part in seen[3]))
    recorded = [Tensors(store.artifact(part.step.key))["x_RD"] for part in seen[3]]
    ids_NL = torch.from_numpy(running.array_of(running.matrix_of(tmp_path)))
    theirs = Predictions(kept)
    with theirs.inputs() as inputs:
        theirs.behind(theirs.states(ids_NL), ids_NL)
    torch.testing.assert_close(torch.cat(recorded), inputs[0], rtol=1e-4, atol=1e-5)


def test_it_is_pruned_to_the_count_of_the_others_and_loads(source: Path, tmp_path: Path) -> None:
    pruned = naee.prune(calibrated(model_in(source, "prune"), tmp_path), 6, Search("reap"))
    out, store = written(pruned, tmp_path)
    keep = json.loads(store.artifact(pruned.choices[-1].key).file("choice.json").read_text())["keep"]
    before, after = Tensors(source), Tensors(out)
    assert {n for n in after if n.startswith("mtp.")} < {n for n in before if n.startswith("mtp.")} and len(keep) == 6
    assert torch.equal(after["mtp.layers.0.mlp.gate.weight"], before["mtp.layers.0.mlp.gate.weight"][keep])
    for new, old in enumerate(keep):
        for matrix in ("gate", "up", "down"):
            name = f"mtp.layers.0.mlp.experts.{{}}.{matrix}_proj.weight"
            assert torch.equal(after[name.format(new)], before[name.format(old)])
    loads(out, drafts=source.name in DRAFTS)


def test_it_keeps_its_names_where_layers_differ(tmp_path: Path) -> None:
    source = predicting.write_apart("mellum", tmp_path / "mellum")
    keep = {0: [0, 1, 2, 4], 1: [1, 2, 3, 4, 5, 7], 2: [0, 1, 2, 3, 4, 5], 3: [2, 3, 4, 5, 6, 7]}
    out, _ = written(layouts.pruned_to(model_in(source, "prune"), keep), tmp_path)
    assert said(out)["model_type"] == "moeflow_mellum"
    assert not any(n.startswith("model.layers.3.") for n in Tensors(out))
    loads(out, drafts=True)
    again = model_in(out, "keep")
    assert same(out, written(again, tmp_path / "again")[0])


STACKED = ("qwen3_5_moe", "qwen3_5_moe in stacks")


def wrapped(kind: str, folder: Path) -> Path:
    made = layouts.write(kind, folder)
    predicting.put_apart(made, "model.language_model.", 1)
    return made


@pytest.mark.parametrize("kind", STACKED)
@pytest.mark.parametrize("other", [False, True], ids=["as the decoder layers", "other than the decoder layers"])
def test_beside_a_multimodal_model_it_stays_in_stacks_or_one_by_one(kind: str, other: bool, tmp_path: Path) -> None:
    folder = wrapped(kind, tmp_path / "model")
    if other:
        theirs = layouts.raw(wrapped(STACKED[1 - STACKED.index(kind)], tmp_path / "other"))
        head = {n: t for n, t in theirs.items() if n.startswith("mtp.")}
        layouts.edit(folder, lambda own: {n: t for n, t in own.items() if not n.startswith("mtp.")} | head)
    found = layouts.KINDS[kind].found
    out, _ = written(layouts.model_in(folder, found, mtp="keep"), tmp_path / "kept")
    assert same(folder, out)
    assert (said(out, "text_config")["num_mtp_layers"], said(out, "text_config")["mtp_layer_types"]) == (1, ["full_attention"])
    keep = {i: [e for e in range(8) if e not in (i, 5)] for i in range(3)}
    less, _ = written(layouts.pruned_to(layouts.model_in(folder, found, mtp="prune"), keep), tmp_path / "pruned")
    assert {n.split("experts.")[0] for n in Tensors(less)} == {n.split("experts.")[0] for n in Tensors(folder)}
    assert said(less, "text_config")["num_experts"] == 6
    before, after = by_expert(folder), by_expert(less)
    assert len(after) == 6 and all(torch.equal(after[new], before[old]) for new, old in enumerate(keep[2]))


def by_expert(folder: Path) -> dict[int, torch.Tensor]:
    """The down matrix of each expert of the prediction layer."""
    tensors, stem = Tensors(folder), "mtp.layers.0.mlp.experts."
    if f"{stem}down_proj" in tensors:
        return dict(enumerate(tensors[f"{stem}down_proj"]))
    return {int(n.removeprefix(stem).split(".")[0]): tensors[n] for n in tensors if n.startswith(stem) and "down_proj" in n}


ELSEWHERE = {
    "ernie4_5_moe": ("model.mtp_block.0.mlp.up_proj", "model.mtp_emb_norm.0", "model.mtp_linear_proj.0"),
    "mimo_v2_flash": ("model.mtp.layers.0.enorm", "model.mtp.layers.0.eh_proj", "model.mtp.layers.0.self_attn.q_proj"),
    "several layers": (
        "mtp.fc",
        "mtp.norm",
        "mtp.pre_fc_norm_embedding",
        "mtp.pre_fc_norm_hidden",
        "mtp.layers.0.x",
        "mtp.layers.1.x",
    ),
    "an embedding of its own": ("mtp.embed_tokens", "mtp.fc", "mtp.layers.0.mlp.gate"),
}
"""Names of prediction layers that transformers does not load."""


@pytest.mark.parametrize("published", ELSEWHERE)
def test_what_transformers_does_not_load_is_dropped_or_refused(published: str, tmp_path: Path) -> None:
    names = [f"{n}.weight" for n in ELSEWHERE[published]]
    folder = tiny.write("mixtral", tmp_path / "model")
    layouts.edit(folder, lambda tensors: tensors | {n: torch.ones(32, 32) for n in names})
    dropped = model_in(folder, "drop")
    (note,) = dropped.rest.spec.notes
    assert note == f"multi-token prediction ({min(names)} and so on, {len(names)} tensors) is dropped"
    assert not any("mtp" in n for n in Tensors(written(dropped, tmp_path)[0]))
    for mtp in ("keep", "prune"):
        refused(folder, mtp, f"mtp='{mtp}': the multi-token prediction at .* is called {min(names)} and so on")


def test_numbered_layers_of_a_count_that_transformers_does_not_know_are_dropped_or_refused(tmp_path: Path) -> None:
    """As MiniMax-M2 counts them."""
    folder = tiny.write("mixtral", tmp_path / "model")
    layouts.edit(folder, lambda tensors: tensors | {"model.layers.3.enorm.weight": torch.ones(32)})
    predicting.edit(folder, num_mtp_modules=1)
    out, _ = written(model_in(folder, "drop"), tmp_path)
    assert said(out)["num_mtp_modules"] == 0 and "model.layers.3.enorm.weight" not in Tensors(out)
    refused(folder, "prune", "mtp='prune': transformers knows no multi-token prediction of a mixtral, .* says num_mtp_modules")


def test_a_layer_that_is_like_no_decoder_layer_is_refused(tmp_path: Path) -> None:
    """As a dense one (EXAONE) and a damaged one are."""
    folder = predicting.write_apart("mellum", tmp_path / "mellum")
    layouts.edit(folder, lambda tensors: {n: t for n, t in tensors.items() if n != "mtp.layers.0.self_attn.q_norm.weight"})
    refused(folder, "keep", "layer 3 at .* is like no decoder layer with experts .mtp.layers.0.self_attn.q_norm.weight")
    folder = predicting.write_apart("mellum", tmp_path / "other" / "mellum")
    layouts.edit(folder, lambda tensors: tensors | {"mtp.fc.weight": torch.ones(32, 32)})
    refused(folder, "keep", r"layer 3 at .* has \(32, 32\) mtp.fc.weight, where config.json asks for \(32, 64\)")


def refused(source: Path, mtp: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"{why}.*take mtp='drop'") as told:
        model_in(source, mtp)
    assert "\n" not in str(told.value)


@pytest.mark.slow
def test_the_kind_of_layer_follows_from_its_tensors_where_config_json_has_an_interval(tmp_path: Path) -> None:
    """As Qwen3-Next is published."""
    layers = ["linear_attention", "full_attention"] * 2
    folder = predicting.write_apart("qwen3_next", tmp_path / "model", num_hidden_layers=4, layer_types=layers)
    predicting.put_apart(folder, "model.", 3)
    config = {k: v for k, v in said(folder).items() if k != "layer_types"} | {"full_attention_interval": 2}
    (folder / "config.json").write_text(json.dumps(config))
    pruned = naee.prune(calibrated(model_in(folder, "prune"), tmp_path), 6, Search("reap"))
    out, _ = written(pruned, tmp_path)
    assert said(out)["mtp_layer_types"] == ["full_attention"] and "layer_types" not in said(out)
    loads(out, drafts=False)
