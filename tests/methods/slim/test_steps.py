"""Slimming in a whole model: what is stored is what the methods make of the routed tokens, and transformers computes it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moeflow import options
from moeflow.arch import Family
from moeflow.methods.data import steps as data_
from moeflow.methods.decompose.options import Decomposition
from moeflow.methods.fewer_active import steps as fewer_active
from moeflow.methods.finetune.recipe import Gang, Recipe
from moeflow.methods.graph import Model, Sample
from moeflow.methods.prune.searches import Search
from moeflow.methods.recipes import compare, moei2, naee, tune, unified
from moeflow.methods.records import Bits, Facts
from moeflow.methods.rewrite import link_all
from moeflow.methods.slim import experts, sparsegpt
from moeflow.methods.slim import steps as slim_steps
from moeflow.methods.slim.grid import Grid
from moeflow.methods.slim.masks import wanda
from moeflow.methods.slim.methods import METHODS, Slimming
from moeflow.methods.trim import steps as trim
from moeflow.model.checkpoint import Tensors, save
from moeflow.model.layout import Folder, headers, read_config
from moeflow.model.packed import PACKED, SCALE
from moeflow.step import Artifact, Context, Spec, Step, step, upstream
from tests import tiny
from tests.models import calibrated, close, loaded, logits, pulled
from tests.running import matrix_of, model_in, read, run, store_in, tensors_of
from tests.slimmed import FOUR, compensated, moments, nearest, plain, reports, routed


@pytest.fixture(params=tiny.families())
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tiny.write(request.param, tmp_path / "model")


def slimmed(source: Path, folder: Path, **how: Any) -> Path:
    calibration = calibrated(model_in(source), folder, between=False)
    return pulled(store_in(folder), unified.slim(calibration, Slimming(**how)), folder)


@pytest.mark.parametrize("how", [{"method": "gptq", **FOUR}, {"method": "awq", "bits": 8, "group": 0}], ids=["gptq", "awq"])
def test_packed_experts_load_and_compute_what_their_codes_say(source: Path, how: dict[str, Any], tmp_path: Path) -> None:
    """Through transformers' own integration, and streamed; from a third to a quarter of the experts' bytes."""
    out = slimmed(source, tmp_path, **how)
    config = read_config(Folder(out))
    assert config["model_type"] == read_config(Folder(source))["model_type"]
    assert config["quantization_config"]["format"] == "pack-quantized"
    names = headers(Folder(out))
    packed = sum(n.endswith(PACKED) for n in names)
    family = Family.of(config)
    assert packed == 3 * 8 * len(family.moe_layers)
    model = loaded(out)
    close(logits(model, tmp_path), logits(loaded(plain(out, tmp_path / "plain")), tmp_path))
    stems = tuple(family.experts(i) for i in family.moe_layers)
    bytes_of = [sum(t.nbytes for n, t in headers(Folder(f)).items() if n.startswith(stems)) for f in (source, out)]
    assert 0.25 < bytes_of[1] / bytes_of[0] < 0.45
    made = model.generate(torch.arange(3, 7)[None], max_new_tokens=2, do_sample=False)
    assert made.shape == (1, 6)
    again = model_in(out)
    assert again.layers[-1].spec.output.packed
    close(logits(loaded(pulled(store_in(tmp_path), again, tmp_path / "again")), tmp_path), logits(model, tmp_path))


@pytest.mark.parametrize(
    ("method", "source"),
    [
        *(pytest.param("awq", *f.values, marks=f.marks) for f in tiny.families()),
        *zip(METHODS, tiny.FAMILIES, strict=False),
        ("gptq", "deepseek_v3"),
    ],
    indirect=["source"],
)
def test_what_is_not_an_expert_stays_bit_for_bit(source: Path, method: str, tmp_path: Path) -> None:
    """Routers, gates, norms, attention and embeddings. AWQ moves a scale between a norm and all it feeds: routing stays."""
    how = {"pattern": "0.5"} if method in ("magnitude", "wanda", "sparsegpt") else {**FOUR, "packed": False}
    out = slimmed(source, tmp_path, method=method, inputs="parallel", **how)
    before, after = Tensors(source), Tensors(out)
    family = Family.of(read_config(Folder(source)))
    experts = {n for i in family.moe_layers for e in range(8) for n in family.expert(i, e)}
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert set(before) == set(after) and experts <= changed
    if method != "awq":
        assert changed == experts
        return
    for i in family.moe_layers:
        norm = family.norm(i) + "weight"
        scale = before[norm] / after[norm]
        fed = [n for n in (family.router(i), *(family.shared(i) or ())[:2], family.shared_gate(i)) if n]
        for name in fed:
            torch.testing.assert_close(after[name], before[name] * scale, rtol=1e-5, atol=1e-6)
        changed -= {n for n in changed if n.startswith(family.norm(i))} | set(fed)
    assert changed == experts


def test_each_expert_is_treated_by_the_tokens_really_routed_to_it(source: Path, tmp_path: Path) -> None:
    """Over all shards: in parallel on the dense model, in sequence behind slimmed layers, down behind slimmed gate and up."""
    config = read_config(Folder(source))
    family = Family.of(config)
    layer, before = family.moe_layers[-1], Tensors(source)
    parallel = slimmed(source, tmp_path, method="wanda", pattern="0.5", inputs="parallel")
    x, chosen = routed(source, tmp_path, layer)
    for expert in (0, 5):
        gate = family.expert(layer, expert)[0]
        known = wanda(before[gate], moments(x[chosen[:, expert]]), Slimming("wanda", pattern="0.5"))
        torch.testing.assert_close(Tensors(parallel)[gate], known, rtol=0, atol=0)
    (tmp_path / "two").mkdir()
    out = slimmed(source, tmp_path / "two", method="gptq", packed=False, inputs="sequential", **FOUR)
    after = Tensors(out)
    prefix = dict(before) | {n: after[n] for n in after if f"layers.{layer}." not in n}
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    save(prefix, mixed / "model.safetensors")
    (mixed / "config.json").write_text((source / "config.json").read_text())
    x, chosen = routed(mixed, tmp_path, layer)
    gate, up, down = family.expert(layer, 3)
    rows = x[chosen[:, 3]]
    grid = Grid(4, True, 8)
    close(after[gate], compensated(before[gate], grid, rows).dequantized())
    act = loaded(source).model.layers[layer].get_submodule(family.arch.block).experts.act_fn
    inner = act(rows @ after[gate].T) * (rows @ after[up].T)
    same = (after[down] - compensated(before[down], grid, inner).dequantized()).abs() < 1e-5
    assert same.float().mean() > 0.98
    third = next(r for r in reports(out) if r["layer"] == layer)["experts"][3]
    assert third["tokens"] == int(chosen[:, 3].sum()) and third["by"] == "gptq" and 0 < third["lost"]["down"] < 0.1


def test_an_expert_without_tokens_is_treated_as_was_asked_and_never_zeroed(tmp_path: Path) -> None:
    source = tiny.write("olmoe", tmp_path / "model")
    before = Tensors(source)
    family = Family.of(read_config(Folder(source)))
    for name, how in {
        "rounded": {"method": "gptq", "packed": False, "least": 10**6, **FOUR},
        "kept": {"method": "gptq", "packed": False, "least": 10**6, "rare": "keep", **FOUR},
        "awq": {"method": "awq", "packed": False, "least": 40, **FOUR},
        "masked": {"method": "sparsegpt", "pattern": "2:4", "least": 10**6},
    }.items():
        (tmp_path / name).mkdir()
        after = Tensors(slimmed(source, tmp_path / name, **how))
        for expert in range(8):
            for matrix in family.expert(1, expert):
                assert after[matrix].any()
                if name == "rounded":
                    assert torch.equal(after[matrix], nearest(before[matrix], Grid(4, True, 8)).dequantized())
                elif name == "kept":
                    assert torch.equal(after[matrix], before[matrix])
                elif name == "masked":
                    kept = after[matrix] != 0
                    assert torch.equal(after[matrix], before[matrix] * kept)
                    assert (kept.view(len(kept), -1, 4).sum(-1) == 2).all()
    by = {e["by"] for r in reports(next((tmp_path / "awq").glob("out-*"))) for e in r["experts"]}
    assert by == {"awq", "round_to_nearest"}


def test_a_head_that_is_tied_to_the_embedding_is_not_packed(tmp_path: Path) -> None:
    source = tiny.write("mixtral", tmp_path / "model", tie_word_embeddings=True)
    out = slimmed(source, tmp_path, method="round_to_nearest", **FOUR)
    close(logits(loaded(out), tmp_path), logits(loaded(plain(out, tmp_path / "plain")), tmp_path))


def test_scales_are_chosen_as_they_are_stored(tmp_path: Path) -> None:
    """In bf16, also where the calibration ran in fp32: what is loaded is what was weighed."""
    source = tiny.write("mixtral", tmp_path / "model", dtype=torch.bfloat16)
    calibration = calibrated(model_in(source), tmp_path, dtype="float32")
    out = pulled(store_in(tmp_path), unified.slim(calibration, Slimming(method="gptq", inputs="parallel", **FOUR)), tmp_path)
    name = Family.of(read_config(Folder(source))).expert(0, 0)[0]
    x, chosen = routed(source, tmp_path, 0)
    known = compensated(Tensors(source)[name].float(), Grid(4, True, 8), x[chosen[:, 0]], torch.bfloat16)
    assert Tensors(out)[name].dtype == torch.bfloat16
    assert torch.equal(Tensors(out)[name], known.dequantized(torch.bfloat16))
    stored = {n: t for file in out.glob("*.safetensors") for n, t in load_file(file).items()}
    assert torch.equal(stored[name + SCALE], known.scale_MG)


@pytest.mark.parametrize("how", [{"method": "gptq", "packed": False, **FOUR}, {"method": "sparsegpt", "pattern": "2:4"}])
def test_experts_treated_together_become_what_they_do_one_by_one(
    how: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, an expert whose inner activations are all zero among them."""
    source = tiny.write("olmoe", tmp_path / "model")
    name = Family.of(read_config(Folder(source))).expert(0, 2)[1]
    save({n: t * 0 if n == name else t for n, t in Tensors(source).items()}, next(source.glob("*.safetensors")))
    alone = Tensors(slimmed(source, tmp_path, **how))
    monkeypatch.setitem(experts.WORKING, "cpu", 1 << 20)
    monkeypatch.setitem(sparsegpt.BUDGET, "cpu", 1 << 20)
    (tmp_path / "together").mkdir()
    together = Tensors(slimmed(source, tmp_path / "together", **how))
    for matrix in together:
        assert ((together[matrix] - alone[matrix]).abs() < 1e-5).float().mean() > 0.99, matrix


@pytest.mark.parametrize(
    "how", [{"method": "gptq", "shared": True, **FOUR}, {"method": "wanda", "pattern": "0.5", "inputs": "parallel"}]
)
def test_a_layer_divided_between_tasks_has_the_same_bytes(how: dict[str, Any], tmp_path: Path) -> None:
    source = tiny.write("deepseek_v2", tmp_path / "model")
    whole, divided = slimmed(source, tmp_path, **how), slimmed(source, tmp_path, tasks=3, **how)
    assert whole != divided and Folder(whole).names() == Folder(divided).names()
    for name in Folder(whole).names():
        assert (whole / name).read_bytes() == (divided / name).read_bytes(), name
    assert [e["expert"] for e in reports(divided)[0]["experts"]] == [*range(8), *(["shared"] if "shared" in how else [])]


def test_a_large_layer_is_divided_where_the_next_one_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = calibrated(model_in(tiny.write("mixtral", tmp_path / "model")), tmp_path, between=False)

    def tasks(**how: Any) -> list[int]:
        each = [s for s in upstream(unified.slim(calibration, Slimming(**how)).layers) if s.name == "slim.layer"]
        return [s.params["share"].get("tasks", 1) for s in each]

    gptq = {"method": "gptq", **FOUR}
    assert tasks(**gptq, inputs="sequential") == [1] * 3, "small ones are not"
    monkeypatch.setattr(slim_steps, "PER_TASK", calibration.model.layers[0].spec.output.expert_numel * 3 // 10)
    assert tasks(**gptq, inputs="sequential") == [4] * 12, "what is left over takes a task of its own"
    assert tasks(**gptq, inputs="sequential", tasks=1) == [1] * 3
    assert tasks(**gptq, inputs="parallel") == [1] * 3
    assert tasks(method="awq", bits=8, group=0, inputs="sequential") == [1] * 3
    monkeypatch.setattr(slim_steps, "PER_TASK", 1)
    assert tasks(**gptq, inputs="sequential") == [8] * 24, "an expert is treated by one task"


@step("test.bits", version=1, spec=lambda *, layers: Spec({"bytes": 100}))
def bits(context: Context, *, layers: dict[str, int]) -> None:
    Bits({int(i): width for i, width in layers.items()}, {2: 16}).write(context.out)


@step("test.taken", version=1, spec=lambda before, without: Spec(replace(before, fewest=0)))
def taken(context: Context, before: Artifact, without: Artifact) -> None:
    """A layer of which a run takes the block: the graph knows only that it may."""
    link_all(context, without)


def test_layers_whose_bits_are_decided_are_divided_to_the_same_bytes(tmp_path: Path) -> None:
    """One that is quantized, one that is left as it is, one without its block, and one with groups of its own."""
    model, store = model_in(tiny.write("mixtral", tmp_path / "model", num_hidden_layers=4)), store_in(tmp_path)
    without = taken(model.layers[1], trim.gone(model.essential, model.layers[1], layer=1))
    calibration, layers = calibrated(model, tmp_path, between=False), model.with_layers({1: without}).layers
    decision = bits(layers={"1": 4, "2": 8, "3": 4})

    def made(tasks: int) -> list[Step]:
        how = Slimming(method="gptq", bits=8, group=8, tasks=tasks)
        return [
            slim_steps.slimmed_as_decided(decision, model.essential, file, calibration.observed[i], at=i, how=how, dtype="float32")
            for i, file in enumerate(layers)
        ]

    whole, divided = made(1), made(3)
    run(store, *whole, *divided)
    assert [s.name for s in divided] == ["rewrite.joined"] * 4
    for one, other in zip(whole, divided, strict=True):
        a, b = (tensors_of(store, s) for s in (one, other))
        assert {*a} == {*b} and all(torch.equal(a[n], b[n]) for n in a)
        assert Facts.of(store.artifact(one.key)) == Facts.of(store.artifact(other.key))
    assert [any(n.endswith(PACKED) for n in headers(read(store, s))) for s in whole] == [False, False, True, True]


def test_what_changes_no_byte_of_a_layer_stays_out_of_its_key() -> None:
    """How the work is divided, and fields that the method does not read; those at their default are left out anyway."""
    in_key = options.plain(Slimming("sparsegpt", bits=2, group=64, activation_order=True, damp=0.1, tasks=4).of_a_layer)
    assert in_key == {"method": "sparsegpt", "damp": 0.1}
    assert options.plain(Slimming("gptq", pattern="0.5", bits=3, group=64).of_a_layer) == {"method": "gptq", "bits": 3, "group": 64}
    assert all(options.restored(options.plain(Slimming(name)), Slimming) == Slimming(name) for name in METHODS)


@pytest.mark.parametrize("how", [{"symmetric": False}, {"activation_order": True}], ids=["asymmetric", "by activation"])
def test_zero_points_and_the_order_by_activation_are_reached_by_their_names(how: dict[str, bool], tmp_path: Path) -> None:
    source = tiny.write("mixtral", tmp_path / "model")
    out = slimmed(source, tmp_path, method="gptq", packed=False, **how, **FOUR)
    x, chosen = routed(source, tmp_path, 0)
    gate = Family.of(read_config(Folder(source))).expert(0, 3)[0]
    grid, ordered = Grid(4, how.get("symmetric", True), 8), how.get("activation_order", False)
    known = compensated(Tensors(source)[gate], grid, x[chosen[:, 3]], activation_order=ordered)
    close(Tensors(out)[gate], known.dequantized())
    assert reports(out)[0].items() >= how.items()


def test_awq_keeps_an_expert_without_tokens_whole_but_for_the_scale_of_its_inputs(tmp_path: Path) -> None:
    source = tiny.write("olmoe", tmp_path / "model")
    after = Tensors(slimmed(source, tmp_path, method="awq", packed=False, least=40, rare="keep", **FOUR))
    before, family = Tensors(source), Family.of(read_config(Folder(source)))
    norm = family.norm(0) + "weight"
    few = 0
    for e in range(8):
        gate, _, down = family.expert(0, e)
        if torch.equal(after[down], before[down]):
            few += 1
            torch.testing.assert_close(after[gate], before[gate] * (before[norm] / after[norm]), rtol=1e-5, atol=1e-6)
    assert 0 < few < 8


def test_a_layer_that_a_run_left_without_experts_is_divided_too(tmp_path: Path) -> None:
    thin = trim.trim(calibrated(model_in(tiny.write("mixtral", tmp_path / "model")), tmp_path), trim.Trimming("moe_blocks", 1))
    whole, divided = (
        pulled(store_in(tmp_path), unified.slim(calibrated(thin, tmp_path), Slimming(method="gptq", tasks=n, **FOUR)), tmp_path)
        for n in (1, 3)
    )
    for name in Folder(whole).names():
        assert (whole / name).read_bytes() == (divided / name).read_bytes(), name


def test_shared_experts_are_treated_where_asked(tmp_path: Path) -> None:
    source = tiny.write("deepseek_v2", tmp_path / "model")
    out = slimmed(source, tmp_path, method="gptq", shared=True, **FOUR)
    names = headers(Folder(out))
    family = Family.of(read_config(Folder(source)))
    assert all(n + PACKED in names for n in family.shared(1) or ())
    close(logits(loaded(out), tmp_path), logits(loaded(plain(out, tmp_path / "plain")), tmp_path))
    again = model_in(out)
    close(logits(loaded(pulled(store_in(tmp_path), again, tmp_path / "again")), tmp_path), logits(loaded(out), tmp_path))


def test_a_shared_expert_that_awq_keeps_is_scaled_and_stays(tmp_path: Path) -> None:
    source = tiny.write("deepseek_v2", tmp_path / "model")
    how = {"method": "awq", "shared": True, "packed": False, **FOUR}
    out = slimmed(source, tmp_path, rare="keep", **how)
    assert set(Tensors(out)) == set(Tensors(source))
    assert [e["by"] for e in reports(out)[0]["experts"]][-1] == "keep"


def test_packed_experts_are_pruned_by_slicing_and_trimmed_and_skip(source: Path, tmp_path: Path) -> None:
    """Bit for bit: another search, Expert Drop or Layer Drop on a packed model moves codes and scales as they are."""
    store = store_in(tmp_path)
    calibration = calibrated(model_in(source), tmp_path)
    packed = unified.slim(calibration, Slimming(method="round_to_nearest", inputs="parallel", **FOUR))
    kept = naee.prune(calibrated(packed, tmp_path), 6, Search("reap"))
    out, whole = pulled(store, kept, tmp_path), pulled(store, packed, tmp_path)
    config = read_config(Folder(out))
    family = Family.of(config)
    choices = {c["layer"]: c["keep"] for c in json.loads((out / "moeflow.json").read_text())["choices"]}
    files = {f: {n: t for p in f.glob("*.safetensors") for n, t in load_file(p).items()} for f in (out, whole)}
    for i, keep in choices.items():
        for new, old in enumerate(keep):
            for a, b in zip(family.expert(i, new), family.expert(i, old), strict=True):
                for end in (PACKED, SCALE):
                    assert torch.equal(files[out][a + end], files[whole][b + end])
    assert config["model_type"] == read_config(Folder(source))["model_type"]
    close(logits(loaded(out), tmp_path), logits(loaded(plain(out, tmp_path / "plain")), tmp_path))
    uneven = trim.trim(
        calibrated(trim.trim(calibrated(packed, tmp_path), trim.Trimming("experts", 2, least=4)), tmp_path),
        trim.Trimming("moe_blocks", 1),
    )
    last = pulled(store, uneven, tmp_path)
    assert read_config(Folder(last))["model_type"].startswith("moeflow_")
    close(logits(loaded(last), tmp_path), logits(loaded(plain(last, tmp_path / "plain-last")), tmp_path))
    if read_config(Folder(source))["model_type"] != "phimoe":
        skips = pulled(store, fewer_active.skip(calibrated(packed, tmp_path), fewer_active.Skipping(1.5)), tmp_path)
        close(logits(loaded(skips), tmp_path), logits(loaded(plain(skips, tmp_path / "plain-skips")), tmp_path))


def test_what_was_trimmed_is_slimmed(source: Path, tmp_path: Path) -> None:
    """In the other order: layers that a run has left without experts stay as they are."""
    store = store_in(tmp_path)
    thin = trim.trim(calibrated(model_in(source), tmp_path), trim.Trimming("moe_blocks", 1))
    out = pulled(store, unified.slim(calibrated(thin, tmp_path), Slimming(method="gptq", **FOUR)), tmp_path)
    config = read_config(Folder(out))
    assert {"experts": 0, "gone": "moe"} in config["moeflow_layers"]
    close(logits(loaded(out), tmp_path), logits(loaded(plain(out, tmp_path / "plain")), tmp_path))


def test_what_cannot_be_slimmed_is_refused_in_one_line(tmp_path: Path) -> None:
    model = model_in(tiny.write("mixtral", tmp_path / "model"))
    calibration = calibrated(model, tmp_path)
    packed = unified.slim(calibration, Slimming(method="round_to_nearest", inputs="parallel", **FOUR))
    sparse = unified.slim(calibration, Slimming(method="magnitude", pattern="0.5", inputs="parallel"))
    for message, before, how in (
        ("method='prune' is not known; choose one of magnitude, wanda", calibration, {"method": "prune"}),
        ("inputs='both' is not known; choose one of parallel, sequential", calibration, {"method": "wanda", "inputs": "both"}),
        ("rare='zero' is not known; choose one of weights, keep", calibration, {"rare": "zero"}),
        ("least=0 tokens must be at least 1", calibration, {"least": 0}),
        ("bits=5 must be one of 2, 3, 4, 8", calibration, {"bits": 5}),
        ("group=7 does not divide 32 columns", calibration, {"group": 7}),
        (
            "pattern 2:5 asks for columns in groups of 5, which 32 is no multiple of",
            calibration,
            {"method": "wanda", "pattern": "2:5"},
        ),
        ("pattern 'half' must be the part of zeros", calibration, {"method": "wanda", "pattern": "half"}),
        ("damp=1.0 must lie between 0 and 1: it is a part of the mean diagonal", calibration, {"damp": 1.0}),
        ("columns=0 must be at least 1", calibration, {"columns": 0}),
        ("rare='keep' leaves whole experts beside packed ones", calibration, {"rare": "keep"}),
        ("bits=2 of 24 columns of .* fill no whole words", None, {"bits": 2}),
        ("layer 0 is packed in 4 bits, groups of 8; slim the model that it was made of", packed, {}),
        (r"layer 0 is slimmed already \(magnitude 0.5\); slim the model", sparse, {"method": "wanda", "pattern": "2:4"}),
        ("tasks=9: the 8 experts of layer 0 are divided between 1 to 8 tasks", calibration, {"tasks": 9}),
        ("tasks=-1 must be at least 0", calibration, {"tasks": -1}),
        ("tasks=2: awq treats all experts of layer 0 at once; give tasks=1", calibration, {"method": "awq", "tasks": 2}),
    ):
        if before is None:
            before = calibrated(model_in(tiny.write("olmoe", tmp_path / "olmoe")), tmp_path)
        elif isinstance(before, Model):
            before = calibrated(before, tmp_path)
        with pytest.raises(ValueError, match=message) as refused:
            unified.slim(before, Slimming(**({"method": "gptq", "inputs": "parallel", **FOUR} | how)))
        assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="layer 0 is packed in 4 bits, groups of 8; decompose the model"):
        moei2.decompose(calibrated(packed, tmp_path), Decomposition(ratio=0.2, ranks="uniform"))
    with pytest.raises(ValueError, match="layer 0 is packed in 4 bits, groups of 8, and mode='full' trains its weights"):
        tune.tune(packed, data_.tokens(matrix_of(tmp_path), packed, Sample(8, 16)), Recipe("full", steps=1, batch=2, rate=1e-3))


@pytest.mark.parametrize(
    ("mode", "zero"),
    [("lora", 0), pytest.param("full", 2, marks=pytest.mark.slow), ("experts", 3)],
    ids=["lora", "full", "experts divided by ZeRO-3"],
)
def test_zeros_of_experts_stay_zeros_through_training(mode: str, zero: int, tmp_path: Path) -> None:
    """And what is not zero is trained."""
    calibration = calibrated(model_in(tiny.write("deepseek_v2", tmp_path / "model")), tmp_path)
    sparse = unified.slim(calibration, Slimming(method="wanda", pattern="2:4", shared=True, inputs="parallel"))
    data = data_.tokens(matrix_of(tmp_path), sparse, Sample(8, 16))
    how = Recipe(mode=mode, targets=("attention", "experts", "shared"), steps=3, batch=2, rate=1e-2, decay=0.1)
    tuned = tune.tune(sparse, data, how, gang=Gang(zero=zero))
    store = store_in(tmp_path)
    before, after = Tensors(pulled(store, sparse, tmp_path)), Tensors(pulled(store, tuned.model, tmp_path))
    family = Family.of(read_config(before.files))  # type: ignore[arg-type]
    shared = [] if mode == "experts" else list(family.shared(1) or ())
    for name in [*family.expert(1, 0), *family.expert(2, 7), *shared]:
        assert torch.equal(after[name] == 0, before[name] == 0) and (before[name] == 0).float().mean() == 0.5
        assert not torch.equal(after[name], before[name])


def test_the_report_says_that_zeros_save_nothing_at_rest(tmp_path: Path) -> None:
    calibration = calibrated(model_in(tiny.write("mixtral", tmp_path / "model")), tmp_path)
    sparse = unified.slim(calibration, Slimming(method="wanda", pattern="0.5", inputs="parallel"))
    store = store_in(tmp_path)
    (size,) = (
        r
        for r in compare.reports(
            calibration.model, sparse, compare.HeldOut("", 2, 16), calibration.passed, tokens=calibration.tokens
        )
        if r.name == "evaluate.size"
    )
    run(store, size)
    report = json.loads(store.artifact(size.key).file("report.json").read_text())
    assert report["notes"] == ["zeros of wanda 0.5 are stored as weights: they save no bytes at rest"]
