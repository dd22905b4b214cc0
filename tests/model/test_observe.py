"""What is recorded on the way through a model is what a second look at the whole model finds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM

from moeflow.arch import Family
from moeflow.model import passes
from moeflow.model.checkpoint import Tensors, read_moe, save
from moeflow.model.layout import Folder, file_of, read_config
from moeflow.model.spec import Recording
from tests import tiny

LAYERS = 3


def split(folder: Path, out: Path) -> list[tuple[int, Path]]:
    """A checkpoint as one file per layer and one for the rest."""
    tensors = Tensors(folder)
    (out / "rest").mkdir(parents=True)
    save({n: tensors[n] for n in tensors if ".layers." not in n}, out / "rest" / "rest.safetensors")
    for i in range(LAYERS):
        save({n: tensors[n] for n in tensors if n.startswith(f"model.layers.{i}.")}, out / f"layer-{i}.safetensors")
    return [(i, out / f"layer-{i}.safetensors") for i in range(LAYERS)]


def calibrated(folder: Path, out: Path, ids_NL: Tensor, recording: Recording = Recording(10**9)) -> dict[int, dict[str, Tensor]]:
    config, layers = read_config(Folder(folder)), split(folder, out)
    passes.embed(config, Folder(out / "rest"), ids_NL, out / "start.safetensors", dtype="float32")
    passes.through(
        config, out / "start.safetensors", layers, out / "end.safetensors", count=LAYERS, batch=2, dtype="float32",
        progress=lambda *_: None, recording=recording,
    )  # fmt: skip
    return {i: load_file(out / file_of(i)) for i in Family.of(config).moe_layers}


def ids(n: int = 6, length: int = 20) -> Tensor:
    return torch.randint(3, 96, (n, length), generator=torch.Generator().manual_seed(3))


@torch.inference_mode()
def test_recording_changes_no_bit_of_the_hidden_states(family: Path, tmp_path: Path) -> None:
    calibrated(family, tmp_path, ids())
    model = AutoModelForCausalLM.from_pretrained(family).eval()
    ends: list[Tensor] = []
    model.model.layers[-1].register_forward_hook(lambda m, args, out: ends.append(out))
    for part in ids().split(2):
        model(part, use_cache=False)
    assert torch.equal(load_file(tmp_path / "end.safetensors")["hidden_NLD"], torch.cat(ends))


@torch.inference_mode()
def test_what_is_recorded_is_what_the_whole_model_does(family: Path, tmp_path: Path) -> None:
    recorded = calibrated(family, tmp_path, ids())
    config = read_config(Folder(family))
    model = AutoModelForCausalLM.from_pretrained(family).eval()
    for i, mine in recorded.items():
        layer = model.model.layers[i]
        taken: dict[str, Tensor] = {}
        hooks = [
            layer.post_attention_layernorm.register_forward_pre_hook(lambda m, a, t=taken: t.update(residual=a[0].flatten(0, 1))),
            layer.get_submodule(Family.of(config).arch.block).register_forward_hook(
                lambda m, a, o, t=taken: t.update(x=a[0].flatten(0, 1), z=o.flatten(0, 1))
            ),
            layer.register_forward_hook(lambda m, a, o, t=taken: t.update(before=a[0].flatten(0, 1), after=o.flatten(0, 1))),
        ]
        model(ids(), use_cache=False)
        for hook in hooks:
            hook.remove()
        moe = read_moe(Tensors(family), config, i)
        x_TD, weights_TE = taken["x"], moe.weights(taken["x"]).double()
        norm_TE = moe.expert_outputs(x_TD).norm(dim=-1).double()
        routed_TE = torch.zeros_like(weights_TE).scatter_(1, moe.router.choose(moe.logits(x_TD))[1], 1.0)
        expected = {
            "x_RD": x_TD,
            "position_R": torch.arange(len(x_TD)),
            "logits_TE": moe.logits(x_TD).float(),
            "count_E": routed_TE.sum(0),
            "weight_E": weights_TE.sum(0),
            "score_E": moe.router.scores(moe.logits(x_TD)).double().sum(0),
            "norm_E": (routed_TE * norm_TE).sum(0),
            "reap_E": (weights_TE * norm_TE).sum(0),
            "reap_sq_E": (weights_TE * norm_TE).square().sum(0),
            "max_E": (weights_TE * norm_TE).amax(0),
            "output_sq": taken["z"].double().square().sum(),
            "cos_block": cosine_similarity(taken["residual"], taken["residual"] + taken["z"], dim=-1).double().sum(),
            "cos_layer": cosine_similarity(taken["before"], taken["after"], dim=-1).double().sum(),
            "tokens": torch.tensor(len(x_TD)),
            "sample": torch.tensor(len(x_TD)),
        }
        assert set(mine) == set(expected)
        for name, value in expected.items():
            torch.testing.assert_close(
                mine[name], value, rtol=2e-4, atol=2e-4, msg=lambda m, what=f"layer {i} {name}": f"{what}: {m}"
            )


def test_sums_of_two_shards_are_the_sums_of_one_run(tmp_path: Path) -> None:
    folder = tiny.write("qwen2_moe", tmp_path / "model")
    whole = calibrated(folder, tmp_path / "whole", ids())
    first, second = calibrated(folder, tmp_path / "a", ids()[:2]), calibrated(folder, tmp_path / "b", ids()[2:])
    for i in whole:
        for name in ("count_E", "weight_E", "score_E", "norm_E", "reap_E", "cos_block", "cos_layer", "output_sq"):
            torch.testing.assert_close(first[i][name] + second[i][name], whole[i][name])
        assert torch.equal(torch.cat([first[i]["x_RD"], second[i]["x_RD"]]), whole[i]["x_RD"])


def test_beyond_the_budget_only_tokens_of_rare_experts_are_kept(tmp_path: Path) -> None:
    folder = tiny.write("olmoe", tmp_path / "model")
    whole = calibrated(folder, tmp_path / "whole", ids())
    capped = calibrated(folder, tmp_path / "capped", ids(), Recording(30, per_expert=12))
    for i, mine in capped.items():
        position_R = mine["position_R"]
        assert int(mine["sample"]) == 30 and torch.equal(position_R[:30], torch.arange(30))
        assert torch.equal(mine["x_RD"], whole[i]["x_RD"][position_R])
        assert torch.equal(mine["count_E"], whole[i]["count_E"])
        index_Tk = whole[i]["logits_TE"].topk(3).indices
        nth_TE = torch.zeros(120, 8).scatter_(1, index_Tk, 1).cumsum(0)
        kept = [t for t in range(120) if t < 30 or any(nth_TE[t, e] <= 12 for e in index_Tk[t])]
        assert position_R.tolist() == kept and 30 < len(kept) < 120


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda t: t | {"model.layers.0.mlp.gate.weight": t["model.layers.0.mlp.gate.weight"][:-1]}, "gate.weight has shape"),
        (lambda t: {n: v for n, v in t.items() if "q_proj" not in n}, "no tensor self_attn.q_proj.weight"),
        (lambda t: t | {"model.layers.0.surprise": torch.zeros(1)}, "has surprise, which its config.json leaves no place for"),
    ],
)
def test_a_layer_that_does_not_fit_its_configuration_is_refused(change: Any, says: str, tmp_path: Path) -> None:
    folder = tiny.write("qwen3_moe", tmp_path / "model")
    (_, file), *_ = split(folder, tmp_path)
    save_file(change(load_file(file)), file)
    with pytest.raises(ValueError, match=says):
        passes.stream_of(read_config(Folder(folder)), "float32").layer(Tensors(file), 0)


def test_never_more_than_one_decoder_layer_is_resident(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gc
    import weakref

    from moeflow.model.stream import Stream

    folder = tiny.write("olmoe", tmp_path / "model")
    build, made, alive = Stream.layer, [], []

    def counted(self: Stream, *args: Any) -> Any:
        gc.collect()
        alive.append(sum(ref() is not None for ref in made))
        module = build(self, *args)
        made.append(weakref.ref(module))
        return module

    monkeypatch.setattr(Stream, "layer", counted)
    calibrated(folder, tmp_path, ids())
    assert alive == [0, 0, 0]
