"""From what lies at a source to layer files, and what is refused before any work is done."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeflow.arch import Family
from moeflow.methods import graph as graph_
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.model.checkpoint import Tensors
from moeflow.model.stream import HIDDEN, Stream
from moeflow.run import StepFailed
from tests import running, tiny
from tests.models import graph, loaded, pulled
from tests.running import model_in, store_in


def sharded(folder: Path, per_shard: int = 20) -> Path:
    """The checkpoint cut into shards that straddle layers, as the hub's are."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = [names[i : i + per_shard] for i in range(0, len(names), per_shard)]
    weight_map = {}
    for i, part in enumerate(parts):
        file = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_shards_that_straddle_layers_become_one_file_per_layer(tmp_path: Path) -> None:
    folder = tiny.write("deepseek_v2", tmp_path / "model")
    whole = load_file(folder / "model.safetensors")
    model = running.model_in(sharded(folder))
    store = running.store_in(tmp_path)
    running.run(store, *model.layers, model.rest)
    rewritten: dict[str, torch.Tensor] = {}
    for i, layer in enumerate(model.layers):
        names = running.tensors_of(store, layer)
        assert all(n.startswith(f"model.layers.{i}.") for n in names)
        rewritten |= names
    rewritten |= load_file(store.artifact(model.rest.key).file("rest.safetensors"))
    assert set(rewritten) == set(whole) and all(torch.equal(rewritten[n], whole[n]) for n in whole)


def test_a_fine_tune_that_left_a_layer_alone_leaves_its_file_s_contents(tmp_path: Path) -> None:
    """Early cutoff: what depends on an untouched layer only is not computed again, although the shard it lies in changed."""
    folder = sharded(tiny.write("mixtral", tmp_path / "model"))
    store = running.store_in(tmp_path)
    before = running.model_in(folder)
    running.run(store, *before.layers)
    changed = next(f for f in sorted(folder.glob("*.safetensors")) if any("layers.1." in n for n in load_file(f)))
    tensors = load_file(changed)
    tensors["model.layers.1.input_layernorm.weight"] = tensors.get("model.layers.1.input_layernorm.weight", torch.ones(32)) + 1
    name = next(n for n in tensors if "layers.1." in n)
    tensors[name] = tensors[name] + 1
    save_file({n: t for n, t in tensors.items() if n in load_file(changed)}, changed, metadata={"format": "pt"})
    after = running.model_in(folder)
    running.run(store, *after.layers)
    digests = [[store.manifest(m.layers[i].key).digest for i in range(3)] for m in (before, after)]
    assert digests[0][2] == digests[1][2] and digests[0][1] != digests[1][1]


def edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def cut(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-64])


def misname(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    first = next(iter(index["weight_map"]))
    index["weight_map"]["model.layers.0.ghost"] = index["weight_map"][first]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def drop_tensor(folder: Path, name: str) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"].pop(name)
    save_file({n: t for n, t in load_file(file).items() if n != name}, file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def lose(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[0].unlink()


@pytest.mark.parametrize(
    "spoil, says",
    [
        (cut, "is truncated: it holds .* of .* bytes; fetch it again"),
        (misname, "index.json names model.layers.0.ghost in .*, which does not hold it"),
        (lose, "index.json names model-00001-of-.*, which .* does not hold"),
        (lambda f: edit(f, num_local_experts=6), "layer 0 has 6 experts, its tensors say 8"),
        (lambda f: edit(f, num_hidden_layers=4), "config.json says 4 layers, but the checkpoint has no tensor of layer 3"),
        (lambda f: edit(f, num_hidden_layers=2), "tensors of layer 2, but config.json says 2 layers"),
        (
            lambda f: edit(f, hidden_size=64),
            r"where config.json asks for \(8, 64\)|config.json says hidden_size=64|asks for \(96, 64\)",
        ),
        (lambda f: edit(f, vocab_size=97), r"where config.json asks for \(97, 32\)"),
        pytest.param(lambda f: edit(f, model_type="gpt2"), "is a 'gpt2', which is not supported", marks=pytest.mark.slow),
        (
            lambda f: edit(f, tie_word_embeddings=False) or drop_tensor(f, "lm_head.weight"),
            "no tensor lm_head.weight; it is incomplete",
        ),
        (lambda f: drop_tensor(f, "model.norm.weight"), "no tensor model.norm.weight"),
        (
            lambda f: (f / "config.json").write_text('{"model_type": "mix'),
            "config.json at .* is cut short or no JSON .*; fetch it again",
        ),
        (lambda f: (f / "config.json").write_text('{"model_type": "mixtral"}'), "config.json at .* lacks num_hidden_layers"),
        (
            lambda f: edit(f, quantization_config={"quant_method": "fp8"}),
            "is in FP8 without square blocks .*; dequantize it to bf16 first",
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused_when_the_graph_is_built(spoil: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    folder = sharded(tiny.write("mixtral", tmp_path / "model"))
    spoil(folder)
    with pytest.raises(ValueError, match=says):
        running.model_in(folder)


def test_nan_weights_stop_the_step_that_reads_them_and_are_named(tmp_path: Path) -> None:
    folder = tiny.write("mixtral", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    store, model = running.store_in(tmp_path), running.model_in(folder)
    with pytest.raises(StepFailed, match=r"model.layers.1.self_attn.q_proj.weight holds NaN or infinite weights"):
        running.run(store, *model.layers)
    assert store.has(model.layers[0].key) and not store.has(model.layers[1].key)


def with_prediction_layer(folder: Path) -> Path:
    """A DeepSeek-V3 as published: behind its decoder layers one that predicts the token after the next."""
    tensors = load_file(folder / "model.safetensors")
    extra = {n.replace("layers.2.", "layers.3."): t.clone() for n, t in tensors.items() if "layers.2." in n}
    extra |= {f"model.layers.3.{n}.weight": torch.ones(32) for n in ("enorm", "hnorm", "shared_head.norm")}
    extra |= {"model.layers.3.eh_proj.weight": torch.randn(32, 64), "model.layers.3.embed_tokens.weight": torch.randn(96, 32)}
    save_file(tensors | extra, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder, num_nextn_predict_layers=1)
    return folder


@pytest.mark.parametrize("mtp", ["drop", "keep", "prune"])
def test_the_prediction_layer_of_deepseek_v3_is_kept_or_dropped_as_told(mtp: str, tmp_path: Path) -> None:
    folder = with_prediction_layer(tiny.write("deepseek_v3", tmp_path / "model"))
    before = Tensors(folder)
    model = running.model_in(folder, mtp=mtp)
    store, target = running.store_in(tmp_path), checkpoint.checkpoint_of(model)
    outcome = running.run(store, target)
    store.fetch(target.key, tmp_path / "out")
    after = Tensors(tmp_path / "out")
    kept = {n for n in before if mtp != "drop" or "layers.3." not in n}
    assert set(after) == kept and all(torch.equal(before[n], after[n]) for n in kept)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == (0 if mtp == "drop" else 1)
    said = [n for s in outcome.steps for n in s.notes]
    assert any("prediction layers [3] are dropped" in n for n in said) == (mtp == "drop") == (model.rest.spec.notes != ())


def test_dropping_the_prediction_layer_is_the_default_and_says_so(tmp_path: Path) -> None:
    folder = with_prediction_layer(tiny.write("deepseek_v3", tmp_path / "model"))
    assert running.model_in(folder).rest.spec.notes == (
        "multi-token-prediction layers [3] are dropped (mtp='keep' keeps them as they are, mtp='prune' prunes them, too)",
    )
    with pytest.raises(ValueError, match="mtp='slice'; choose 'drop', 'keep' or 'prune'"):
        running.model_in(folder, mtp="slice")


@pytest.mark.parametrize("key", ["num_nextn_predict_layers", "num_mtp_layers"])
def test_prediction_layers_are_counted_under_either_name(key: str, tmp_path: Path) -> None:
    folder = with_prediction_layer(tiny.write("deepseek_v3", tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    del config["num_nextn_predict_layers"]
    (folder / "config.json").write_text(json.dumps(config | {key: 1}))
    assert len(running.model_in(folder, mtp="prune").extra) == 1
    dropped = running.model_in(folder)
    assert dropped.extra == () and dropped.config[key] == 0


@pytest.mark.parametrize("name", ["mtp.fc.weight", "model.mtp.layers.0.mlp.experts.0.up_proj.weight", "model.mtp_block.0.x.weight"])
def test_prediction_layers_outside_the_numbering_are_dropped_with_a_note_and_otherwise_refused(name: str, tmp_path: Path) -> None:
    folder = tiny.write("qwen3_moe", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: torch.zeros(4, 4)}, folder / "model.safetensors", metadata={"format": "pt"})
    model = running.model_in(folder)
    assert model.rest.spec.notes == (f"multi-token prediction ({name} and so on, 1 tensors) is dropped",)
    assert not any(name in step.spec.output.tensors for step in (*model.layers, model.rest))
    for mtp in ("keep", "prune"):
        with pytest.raises(ValueError, match=f"mtp='{mtp}': .* is called {name} and so on, .*; take mtp='drop'"):
            running.model_in(folder, mtp=mtp)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda t: t.pop("model.layers.3.enorm.weight"), "layer 3 at .* has no model.layers.3.enorm.weight, where .* asks for"),
        (
            lambda t: t.update({"model.layers.3.eh_proj.weight": torch.ones(32, 32)}),
            r"layer 3 at .* has \(32, 32\) .*eh_proj.weight",
        ),
        (lambda t: t.pop("model.layers.3.mlp.experts.4.up_proj.weight"), "layer 3 at .*: the checkpoint has no tensor"),
        (
            lambda t: [t.pop(n) for n in list(t) if ".3.mlp.experts.7." in n],
            "layer 3 at .* config.json says .* 8 experts, .* 7 experts",
        ),
        (lambda t: t.pop("model.layers.3.self_attn.o_proj.weight"), "layer 3 at .* is like no decoder layer with experts .*o_proj"),
    ],
)
def test_a_prediction_layer_that_transformers_could_not_load_is_refused_unless_it_is_dropped(
    spoil: Callable[[dict[str, torch.Tensor]], object], says: str, tmp_path: Path
) -> None:
    folder = with_prediction_layer(tiny.write("deepseek_v3", tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    spoil(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert running.model_in(folder).extra == ()
    for mtp in ("keep", "prune"):
        with pytest.raises(ValueError, match=says) as refused:
            running.model_in(folder, mtp=mtp)
        assert "\n" not in str(refused.value)


def test_fewer_prediction_layers_than_config_json_says_are_refused_and_none_is_noted(tmp_path: Path) -> None:
    folder = with_prediction_layer(tiny.write("deepseek_v3", tmp_path / "model"))
    edit(folder, num_nextn_predict_layers=2)
    with pytest.raises(ValueError, match="says 2 multi-token-prediction layers, and the tensors are of 1; correct it, or take"):
        running.model_in(folder, mtp="prune")
    none = running.model_in(tiny.write("mixtral", tmp_path / "other"), mtp="prune")
    assert none.rest.spec.notes == ("the model has no multi-token-prediction layers, so mtp='prune' changes nothing",)


def test_a_model_given_by_its_files_alone_is_found_without_an_index(tmp_path: Path) -> None:
    folder = tiny.write("olmoe", tmp_path / "model")
    assert len(running.model_in(folder).layers) == 3
    assert isinstance(running.model_in(folder), graph_.Model)


def test_a_configuration_that_changed_without_effect_runs_nothing_of_the_calibration_again(tmp_path: Path) -> None:
    folder = tiny.write("mixtral", tmp_path / "model")
    store, matrix = running.store_in(tmp_path), running.matrix_of(tmp_path)
    running.run(store, graph(running.model_in(folder), matrix))
    edit(folder, transformers_version="5.99", use_cache=False, _name_or_path="elsewhere")
    again = running.run(store, graph(running.model_in(folder), matrix))
    ran = {s.name for s in again.steps if s.state == "run"}
    assert not any(n.startswith(("calibrate", "prune", "rewrite", "data", "checkpoint.layer")) for n in ran)
    assert "checkpoint.assemble" in ran


def test_a_model_type_that_transformers_does_not_know_has_the_architecture_of_one_that_it_does(tmp_path: Path) -> None:
    """Kimi-K2 is a DeepSeek-V3 by another name, which its result keeps."""
    tiny.write("deepseek_v3", tmp_path / "model")
    place = tmp_path / "model" / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"model_type": "kimi_k2"}))
    model = model_in(tmp_path / "model")
    store = store_in(tmp_path)
    out = pulled(store, model, tmp_path)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "kimi_k2" and Family.of(config).arch.model_type == "deepseek_v3"
    stream = Stream(config)
    tensors = Tensors(out)
    states = {HIDDEN: stream.embed(tensors, torch.tensor([[3, 4, 5]]))}
    for layer in range(stream.family.num_layers):
        states = stream.run(stream.layer(only(tensors, stream.family.prefix(layer)), layer), layer, states)
    place.write_text(json.dumps(config | {"model_type": "deepseek_v3"}))
    want = loaded(tmp_path / "model")(torch.tensor([[3, 4, 5]])).logits
    torch.testing.assert_close(stream.logits(tensors)(states[HIDDEN]), want, rtol=1e-5, atol=1e-5)


def only(tensors: Tensors, prefix: str) -> dict[str, torch.Tensor]:
    return {n: tensors[n] for n in tensors if n.startswith(prefix)}
