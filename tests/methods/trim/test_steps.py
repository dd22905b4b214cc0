"""Trimming: what goes is what the statistics say, what stays computes what it did, and transformers loads it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from moeflow.arch import Family
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data_
from moeflow.methods.fewer_active import steps as fewer_active
from moeflow.methods.finetune.recipe import Recipe
from moeflow.methods.graph import Model, Pass, Sample
from moeflow.methods.recipes import compare, naee, tune
from moeflow.methods.trim import steps as trim
from moeflow.model.checkpoint import Tensors, read_moe
from moeflow.model.layout import Folder, headers, read_config
from moeflow.step import Step
from moeflow.store import Store
from tests import tiny
from tests.models import PLAIN, calibrated, close, ids_of, loaded, logits, pulled
from tests.running import facts_of, matrix_of, model_in, reports, run, store_in


@pytest.fixture(params=tiny.families())
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tiny.write(request.param, tmp_path / "model", num_hidden_layers=4, **PLAIN.get(request.param, {}))


def decided(store: Store, model: Model) -> dict[str, Any]:
    key = model.choices[-1].key
    return json.loads(store.artifact(key).file("trim.json").read_text())


class Reference(nn.Module):
    """A layer's MoE block with only some of its experts, computed by `MoELayer`, which is proven against each family elsewhere."""

    def __init__(self, folder: Path, layer: int, keep: Sequence[int]) -> None:
        super().__init__()
        config = read_config(Folder(folder))
        family, moe = Family.of(config), read_moe(Tensors(folder), config, layer)
        self.moe = moe.keep(list(keep)) if keep else moe
        self.routed = bool(keep)
        groups, topk_groups = family.group_limit
        reach = min(family.top_k, len(keep) // groups * topk_groups)
        self.moe = replace(self.moe, router=replace(self.moe.router, top_k=reach))

    def forward(self, x_NLD: Tensor) -> Tensor:
        x_TD = x_NLD.flatten(0, 1)
        alone_TD = self.moe.shared_output(x_TD)
        y_TD = self.moe(x_TD) if self.routed else torch.zeros_like(x_TD) if alone_TD is None else alone_TD
        return y_TD.view_as(x_NLD)


def expected(folder: Path, where: Path, kept: Mapping[int, Sequence[int]]) -> Tensor:
    """What the original model predicts where each layer has only these experts."""
    model, family = loaded(folder), Family.of(read_config(Folder(folder)))
    for layer, keep in kept.items():
        model.model.layers[layer].set_submodule(family.arch.block, Reference(folder, layer, keep))
    return logits(model, where)


def least_of(folder: Path) -> int:
    """The fewest experts that the router of this family can do with."""
    config = read_config(Folder(folder))
    return {"deepseek_v3": 4, "deepseek_v2": 2, "phimoe": 2}.get(config["model_type"], 1)


def test_experts_of_the_lowest_score_go_from_each_layer_also_below_top_k(source: Path, tmp_path: Path) -> None:
    """Down to what the router can do with; the same number everywhere is the family's own format, with another top-k."""
    store, keep = store_in(tmp_path), least_of(source)
    calibration = calibrated(model_in(source), tmp_path)
    out = pulled(store, trimmed := trim.trim(calibration, trim.Trimming("experts", 8 - keep, across="layer")), tmp_path)
    record, config = decided(store, trimmed), read_config(Folder(source))
    scores = router_scores(source, tmp_path)
    groups, topk_groups = Family.of(config).group_limit
    for layer, score_E in scores.items():
        best = [g * len(score_E) // groups + score_E.view(groups, -1)[g].argsort(descending=True) for g in range(groups)]
        assert record["keep"][str(layer)] == sorted(int(e) for b in best for e in b[: keep // groups])
    model = loaded(out)
    assert model.config.model_type == config["model_type"]
    assert model.config.num_experts_per_tok == min(config["num_experts_per_tok"], keep // groups * topk_groups)
    close(logits(model, tmp_path), expected(source, tmp_path, {int(i): k for i, k in record["keep"].items()}))


def router_scores(folder: Path, where: Path) -> dict[int, Tensor]:
    """Expert Drop's score of every expert, from the routers of the whole model: of DeepSeek's, where it is chosen only."""
    model, config = loaded(folder), read_config(Folder(folder))
    family = Family.of(config)
    score_of: dict[int, Tensor] = {}

    def hook(layer: int, router: Any, x: Tensor, out: Any) -> None:
        logits_TE, weights_Tk, index_Tk = out
        if config["model_type"].startswith("deepseek"):
            score_of[layer] = torch.zeros_like(logits_TE).scatter(1, index_Tk, weights_Tk).double().mean(0)
        else:
            score_of[layer] = logits_TE.float().softmax(-1).double().mean(0)

    for i in family.moe_layers:
        router = model.model.layers[i].get_submodule(family.arch.block).get_submodule(family.arch.block_router)
        router.register_forward_hook(lambda r, x, out, i=i: hook(i, r, x[0], out))
    logits(model, where)
    return score_of


def test_across_the_model_layers_may_lose_all_experts(source: Path, tmp_path: Path) -> None:
    """The lowest scores of the whole model; an empty layer keeps its shared expert, or passes the residual stream."""
    store = store_in(tmp_path)
    config = read_config(Folder(source))
    family = Family.of(config)
    layers, (groups, _) = family.moe_layers, family.group_limit
    experts = family.num_experts
    model = model_in(faint(source, tmp_path / "faint", layers[-1]))
    keep = experts - experts / len(layers) if least_of(source) <= groups else experts - 2
    trimmed = trim.trim(calibrated(model, tmp_path), trim.Trimming("experts", experts - keep, criterion="reap", least=0))
    out = pulled(store, trimmed, tmp_path)
    record = decided(store, trimmed)
    kept = {int(i): k for i, k in record["keep"].items()}
    assert sum(map(len, kept.values())) == round(keep * len(layers))
    assert all(len(k) % groups == 0 for k in kept.values())
    assert all(not k or len(k) >= least_of(source) for k in kept.values())
    low = [s for i in kept for e, s in enumerate(record["scores"][str(i)]) if e not in kept[i]]
    high = [s for i in kept for e, s in enumerate(record["scores"][str(i)]) if e in kept[i]]
    if groups == 1 and least_of(source) == 1:
        assert max(low) <= min(high)
    assert len(kept[layers[-1]]) == (0 if least_of(source) <= groups else least_of(source))
    close(logits(loaded(out), tmp_path), expected(tmp_path / "faint", tmp_path, kept))
    assert json.loads((out / "moeflow.json").read_text())["choices"][0]["trim"] == "experts"
    done = facts_of(out, "rewrite.experts")
    assert {i: done.get(i, [{"keep": list(range(experts))}])[0]["keep"] for i in kept} == kept
    again = model_in(out)
    assert layers[-1] not in again.moe_layers or kept[layers[-1]]
    close(logits(loaded(pulled(store, again, tmp_path)), tmp_path), logits(loaded(out), tmp_path))


def faint(source: Path, out: Path, layer: int) -> Path:
    """The checkpoint with experts in `layer` that add next to nothing."""
    model = loaded(source)
    with torch.no_grad():
        model.model.layers[layer].mlp.experts.down_proj *= 1e-3
    model.save_pretrained(out)
    return out


def test_moe_blocks_go_whose_layers_turn_the_residual_stream_least(source: Path, tmp_path: Path) -> None:
    store = store_in(tmp_path)
    family = Family.of(read_config(Folder(source)))
    trimmed = trim.trim(calibrated(model_in(source), tmp_path, between=False), trim.Trimming("moe_blocks", 1))
    out = pulled(store, trimmed, tmp_path)
    record = decided(store, trimmed)
    model = loaded(source)
    cosines: dict[int, float] = {}

    def hook(layer: int, before: Tensor, after: Tensor) -> None:
        cosines[layer] = float(cosine_similarity(before.double(), after.double(), dim=-1).mean())

    for i in family.moe_layers:
        layer, stream = model.model.layers[i], {}
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _, x, stream=stream: stream.update(before=x[0]))
        layer.register_forward_hook(lambda _, x, out, i=i, stream=stream: hook(i, stream["before"], out))
    logits(model, tmp_path)
    assert {int(i): pytest.approx(v, abs=1e-6) for i, v in record["similarity"].items()} == cosines
    gone = sorted(sorted(cosines, key=lambda i: -cosines[i])[:1])
    assert record["drop"] == gone
    whole = loaded(source)
    for i in gone:
        whole.model.layers[i].set_submodule(family.arch.block, Nothing())
    close(logits(loaded(out), tmp_path), logits(whole, tmp_path))
    names = headers(Folder(out))
    assert not any(n.startswith((family.moe(i), family.norm(i))) for n in names for i in gone)
    before = headers(Folder(source))
    kept = [n for n in before if not any(n.startswith((family.moe(i), family.norm(i))) for i in gone)]
    assert {n: names[n].shape for n in kept} == {n: t.shape for n, t in names.items()}
    again = trim.trim(calibrated(model_in(out), tmp_path), trim.Trimming("moe_blocks", 1))
    assert model_in(out).moe_layers == [i for i in family.moe_layers if i not in gone]
    assert not set(decided_by(store, again, tmp_path)["drop"]) & set(gone)


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0


def decided_by(store: Store, model: Model, folder: Path) -> dict[str, Any]:
    pulled(store, model, folder)
    return decided(store, model)


@pytest.mark.parametrize("rule", ["discrete", "consecutive"])
def test_decoder_layers_go_that_turn_the_hidden_states_least(source: Path, rule: str, tmp_path: Path) -> None:
    """The gap is exact, the rest is renumbered, and what is left is the family's own, with a smaller cache."""
    store = store_in(tmp_path)
    config = read_config(Folder(source))
    first = Family.of(config).moe_layers[0]
    trimmed = trim.trim(calibrated(model_in(source), tmp_path), trim.Trimming("decoder_layers", 2, rule=rule))
    out = pulled(store, trimmed, tmp_path)
    record = decided(store, trimmed)
    model = loaded(source)
    with torch.inference_mode():
        states = [h.double() for h in hidden(model, ids_of(tmp_path))]
    gap = 2 if rule == "consecutive" else 1
    cosines = [float(cosine_similarity(states[i], states[i + gap], dim=-1).mean()) for i in range(len(states) - gap)]
    assert list(record["similarity"].values()) == pytest.approx(cosines, abs=1e-6)
    order = sorted(range(first, len(cosines)), key=lambda i: -cosines[i])
    gone = sorted(order[:2]) if rule == "discrete" else [order[0], order[0] + 1]
    assert record["drop"] == gone
    model.model.layers = nn.ModuleList(layer for i, layer in enumerate(model.model.layers) if i not in gone)
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = i
    model.config.num_hidden_layers -= 2
    small = loaded(out)
    assert small.config.model_type == config["model_type"] and small.config.num_hidden_layers == 2
    close(logits(small, tmp_path), logits(model, tmp_path))
    made = small.generate(ids_of(tmp_path)[:1, :4], max_new_tokens=2, return_dict_in_generate=True, do_sample=False)
    assert len(made.past_key_values.layers) == 2


def hidden(model: Any, ids: Tensor) -> list[Tensor]:
    """The hidden states before every layer and behind the last, without the final norm."""
    states: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda _, x, fields: states.append(x[0] if x else fields["hidden_states"]), with_kwargs=True
        )
    model.model.norm.register_forward_pre_hook(lambda _, x: states.append(x[0]))
    model(ids)
    return states


def test_bf16_does_not_blur_the_cosines(tmp_path: Path) -> None:
    """Eight layers that hardly turn anything, in bf16: their cosines differ by less than bf16 tells apart, and are told apart."""
    source = tiny.write("mixtral", tmp_path / "model", num_hidden_layers=8)
    model = loaded(source)
    for i, layer in enumerate(model.model.layers):
        for name, weight in layer.named_parameters():
            if "down_proj" in name:
                weight.data *= 0.05 * (1 + 0.1 * i)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "near")
    store = store_in(tmp_path)
    record = decided_by(
        store, trim.trim(calibrated(model_in(tmp_path / "near"), tmp_path), trim.Trimming("moe_blocks", 1)), tmp_path
    )
    values = list(record["similarity"].values())
    assert len({round(v * 256) / 256 for v in values}) < len(set(values)) == 8


@pytest.mark.slow
def test_trimmings_follow_each_other_where_a_run_decides(tmp_path: Path) -> None:
    source, store = tiny.write("deepseek_v2", tmp_path / "model", num_hidden_layers=6), store_in(tmp_path)
    calibration = calibrated(model_in(source), tmp_path)
    fewer = trim.trim(calibration, trim.Trimming("experts", 2, least=0))
    thin = trim.trim(calibrated(fewer, tmp_path), trim.Trimming("moe_blocks", 2))
    short = trim.trim(calibrated(thin, tmp_path), trim.Trimming("decoder_layers", 1))
    last = trim.trim(calibrated(short, tmp_path), trim.Trimming("moe_blocks", 1))
    out = pulled(store, last, tmp_path)
    model = loaded(out)
    assert model.config.num_hidden_layers == 5
    stored = [json.loads(store.artifact(c.key).file("trim.json").read_text()) for c in last.choices]
    assert (
        [t["trim"] for t in stored]
        == ["experts", "moe_blocks", "decoder_layers", "moe_blocks"]
        == [t["trim"] for t in json.loads((out / "moeflow.json").read_text())["choices"]]
    )
    target = checkpoint.checkpoint_of(last).reporting(
        *compare.reports(calibration.model, last, compare.HeldOut("", 4, 16), Pass(2), tokens=calibration.tokens)
    )
    run(store, target)
    rows = reports(store, target)
    assert rows["bytes"]["compressed"] < rows["bytes"]["original"]
    close(torch.tensor(rows["loss (token matrix)"]["compressed"]), loss_of(model, tmp_path))


def loss_of(model: Any, folder: Path) -> Tensor:
    ids = ids_of(folder)
    with torch.inference_mode():
        loss: Tensor = model(ids, labels=ids).loss
    return loss


def test_what_cannot_be_trimmed_is_refused_in_one_line(tmp_path: Path) -> None:
    model = model_in(tiny.write("mixtral", tmp_path / "model"))
    calibration = calibrated(model, tmp_path)
    grouped = calibrated(model_in(tiny.write("deepseek_v3", tmp_path / "grouped")), tmp_path)
    mixed = calibrated(model_in(tiny.write("qwen2_moe", tmp_path / "mixed")), tmp_path)
    two = calibrated(model_in(tiny.write("phimoe", tmp_path / "two")), tmp_path)
    for message, make in {
        "dropped=3 moe_blocks must lie between 0 and 2: the model has 3 layers with experts": lambda: trim.trim(
            calibration, trim.Trimming("moe_blocks", 3)
        ),
        "dropped=-1 and least=None must not be negative": lambda: trim.trim(calibration, trim.Trimming("moe_blocks", -1)),
        "dropped=3 decoder_layers must lie between 0 and 2: the model has 3 layers that may go": lambda: trim.trim(
            calibration, trim.Trimming("decoder_layers", 3)
        ),
        "rule='best' is not known; choose one of discrete, consecutive": lambda: trim.trim(
            calibration, trim.Trimming("decoder_layers", 1, rule="best")
        ),
        "calibrate with between=True": lambda: trim.trim(
            calibrated(model, tmp_path, between=False), trim.Trimming("decoder_layers", 1)
        ),
        "mlp_only_layers differs by layer: a layer cannot take another's place; drop MoE blocks": lambda: trim.trim(
            mixed, trim.Trimming("decoder_layers", 1)
        ),
        "dropped=9 experts of a layer must lie between 0 and the 8 that there are": lambda: trim.trim(
            calibration, trim.Trimming("experts", 9)
        ),
        "dropped=5.5 experts of each layer is no whole number": lambda: trim.trim(
            calibration, trim.Trimming("experts", 5.5, across="layer")
        ),
        "across='all' is not known; choose one of model, layer": lambda: trim.trim(
            calibration, trim.Trimming("experts", 4, across="all", least=0)
        ),
        "criterion='luck' is not known; choose one of random": lambda: trim.trim(
            calibration, trim.Trimming("experts", 4, criterion="luck", least=0)
        ),
        "keep=3 must be a multiple of the router's 2 groups": lambda: trim.trim(
            grouped, trim.Trimming("experts", 5, across="layer")
        ),
        "keep=2 leaves 1 experts in each of 2 groups, which are ranked by their best 2": lambda: trim.trim(
            grouped, trim.Trimming("experts", 6, across="layer")
        ),
        "keep=1: a phimoe weighs two experts against each other; keep at least 2": lambda: trim.trim(
            two, trim.Trimming("experts", 7, across="layer")
        ),
        "1 experts are to stay in all, fewer than least=1 in each of 3 layers": lambda: trim.trim(
            calibration, trim.Trimming("experts", 7.6, least=1)
        ),
        "dropped=8 leaves no expert in 3 layers; at least one layer": lambda: trim.trim(
            calibration, trim.Trimming("experts", 8, across="layer")
        ),
        "a token gets 1 of the 1 experts of layer 0, which leaves none to stand for": lambda: fewer_active.attach(
            trim.trim(calibration, trim.Trimming("experts", 7, across="layer"))
        ),
        "a token may get one expert of layer 0 only, and none to skip": lambda: fewer_active.skip(
            calibrated(trim.trim(calibration, trim.Trimming("experts", 7, across="layer")), tmp_path)
        ),
        "whether layer 0 keeps its experts is decided by a run that trims the model; prune first": lambda: naee.prune(
            calibrated(trim.trim(calibration, trim.Trimming("moe_blocks", 1)), tmp_path), keep=4
        ),
        "whether layer 0 keeps its experts is decided by a run .* drop experts first": lambda: trim.trim(
            calibrated(trim.trim(calibration, trim.Trimming("moe_blocks", 1)), tmp_path), trim.Trimming("experts", 4, least=0)
        ),
        "layer 0 skips experts by a threshold .* drop experts the model without it": lambda: trim.trim(
            calibrated(fewer_active.skip(calibration), tmp_path), trim.Trimming("experts", 4, least=0)
        ),
    }.items():
        with pytest.raises(ValueError, match=message) as refused:
            make()
        assert "\n" not in str(refused.value)
    assert trim.trim(calibration, trim.Trimming("decoder_layers", 0)) is model


def test_a_trimmed_model_is_trained(tmp_path: Path) -> None:
    source, store = tiny.write("mixtral", tmp_path / "model"), store_in(tmp_path)
    thin = trim.trim(calibrated(model_in(source), tmp_path), trim.Trimming("moe_blocks", 1))
    data = data_.tokens(matrix_of(tmp_path), thin, Sample(8, 16))
    tuned = tune.tune(thin, data, Recipe(mode="full", steps=2, batch=2, rate=1e-3))
    out = pulled(store, tuned.model, tmp_path)
    assert read_config(Folder(out))["moeflow_layers"].count({"experts": 0, "gone": "moe"}) == 1
    assert {done[-1]["mode"] for done in facts_of(out, "finetune.layer").values()} == {"full"}
    assert isinstance(tuned.trained, Step) and torch.isfinite(logits(loaded(out), tmp_path)).all()
