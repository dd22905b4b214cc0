"""What a fine-tuning needs of a device, known before one is there: from configurations, without weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moeflow.arch import Config, Family
from moeflow.methods.finetune.recipe import Gang, Recipe
from moeflow.methods.graph import Model
from moeflow.methods.recipes import tune
from moeflow.model.layout import Folder, headers, read_config
from moeflow.model.memory import bytes_per_token
from moeflow.model.spec import LayerSpec, RestSpec, TokensSpec
from moeflow.step import Context, Spec, step

MIXTRAL_8X7B: Config = {
    "model_type": "mixtral", "dtype": "bfloat16", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
    "max_position_embeddings": 32768, "tie_word_embeddings": False,
}  # fmt: skip


def _layer(*, layer: int) -> Spec:
    d, f, kv = 4096, 14336, 1024
    family = Family.of(MIXTRAL_8X7B)
    prefix = family.prefix(layer)
    sides = {"q_proj": (d, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, d)}
    table = {f"{prefix}self_attn.{name}.weight": shape for name, shape in sides.items()}
    table |= {f"{prefix}{name}.weight": (d,) for name in ("input_layernorm", "post_attention_layernorm")}
    table[family.router(layer)] = (8, d)
    for e in range(8):
        table |= dict(zip(family.expert(layer, e), ((f, d), (f, d), (d, f)), strict=True))
    return Spec(LayerSpec(MIXTRAL_8X7B, layer, 8, {name: ("BF16", shape) for name, shape in table.items()}))


def _rest() -> Spec:
    table = {"model.embed_tokens.weight": (32000, 4096), "lm_head.weight": (32000, 4096), "model.norm.weight": (4096,)}
    return Spec(RestSpec(MIXTRAL_8X7B, {name: ("BF16", shape) for name, shape in table.items()}, {}))


@step("test.layer", version=1, spec=_layer)
def layer_of(context: Context, *, layer: int) -> None:
    """A layer of which only the spec is wanted."""


@step("test.rest", version=1, spec=_rest)
def rest_of(context: Context) -> None:
    """The rest, of which only the spec is wanted."""


@step("test.rows", version=1, spec=lambda: Spec(TokensSpec(1024, 4096)))
def rows_of(context: Context) -> None:
    """Rows of which only the number is wanted."""


def tuned(mode: str, gang: Gang, **how: Any) -> Any:
    rest = rest_of()
    model = Model(MIXTRAL_8X7B, rest, rest, tuple(layer_of(layer=i) for i in range(32)))
    recipe = Recipe(mode=mode, steps=100, batch=64, rate=1e-5, **how)
    return tune.tune(model, rows_of(), recipe, gang=gang, teacher=model if recipe.divergence else None)


def test_mixtral_8x7b_is_not_trained_whole_on_eight_gpus_of_80_gb_but_with_offload_or_lora_it_is() -> None:
    eight = dict(processes=8, checkpointing=True, device_memory=80 * 10**9)
    with pytest.raises(
        ValueError, match=r"needs 1\d\d\.\d GB on each of 8 devices, which have 80.0 GB .*; offload=True needs "
    ) as no:
        tuned("full", Gang(zero=3, **eight))
    assert "optimizer 70." in str(no.value), "12 bytes for each of 46.7 billion parameters, over eight"
    assert "\n" not in str(no.value)
    with pytest.raises(ValueError, match=r"optimizer 70.*zero=3, offload=True needs"):
        tuned("full", Gang(zero=2, **eight))
    for mode, gang in {"full": Gang(zero=3, offload=True, **eight), "lora": Gang(zero=3, **eight)}.items():
        resources = tuned(mode, gang).trained.resources
        assert 20e9 < resources.device <= 80e9 and resources.processes == 8
    with pytest.raises(ValueError, match="zero=3 needs "):
        tuned("lora", Gang(zero=2, **eight))


def test_the_micro_batch_is_the_largest_that_the_devices_hold_and_no_part_of_the_key() -> None:
    steps = [tuned("lora", Gang(8, zero=3, checkpointing=True, device_memory=gb * 10**9)).trained for gb in (48, 80)]
    micros = [s.resources.settings["micro"] for s in steps]
    assert 1 <= micros[0] < micros[1] <= 8
    assert steps[0].key == steps[1].key
    assert all(s.resources.device <= gb * 10**9 for s, gb in zip(steps, (48, 80), strict=True))


def test_where_nothing_else_helps_more_devices_or_less_training_is_advised() -> None:
    with pytest.raises(ValueError, match="; 16 processes with zero=3, checkpointing, micro=1 and offload would fit"):
        tuned("full", Gang(8, zero=3, checkpointing=True, offload=True, micro=1, device_memory=24 * 10**9))
    with pytest.raises(ValueError, match=r"; train less of it \(mode='lora' or 'router'\), or on larger devices"):
        tuned("full", Gang(8, zero=3, checkpointing=True, offload=True, micro=1, device_memory=4 * 10**9))


def test_activations_are_those_that_autograd_keeps(family: Path) -> None:
    config, tensors = read_config(Folder(family)), headers(Folder(family))
    model = AutoModelForCausalLM.from_pretrained(family).eval()
    model.config._experts_implementation = "eager"
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def kept(sequences: int) -> int:
        storages: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = model.model(torch.randint(3, 96, (sequences, 32), generator=torch.Generator().manual_seed(0)))
        assert out is not None
        return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())

    measured = (kept(6) - kept(2)) / (4 * 32)
    estimate = sum(
        bytes_per_token(config, {n: t.shape for n, t in tensors.items() if n.startswith(f"model.layers.{i}.")}, 4) for i in range(3)
    )
    assert 0.9 * measured < estimate < 1.5 * measured


def test_what_zero_sends_and_does_again_is_in_the_plan() -> None:
    """Rajbhandari et al., section 7: with ZeRO 3 weights are gathered twice and gradients sent once, else gradients twice."""

    def asked(mode: str, **gang: Any) -> Any:
        return tuned(mode, Gang(8, **gang)).trained.resources

    once = 100 * 2 * 46.7e9 * 7 / 8  # bytes of all weights, in each of 100 steps, but for a process's own part
    whole = asked("full", zero=3, micro=8)
    assert whole.exchanged == pytest.approx(3 * once, rel=0.01) and whole.times == 1 and whole.repeats == 0.5
    assert asked("full", zero=3, micro=4).exchanged == pytest.approx(6 * once, rel=0.01)
    assert asked("full", zero=2, micro=4).exchanged == pytest.approx(2 * once, rel=0.01)
    again = asked("lora", zero=3, micro=8, checkpointing=True, save_every=4)
    assert again.exchanged == pytest.approx(3 * once, rel=0.02) and again.times == 1.5 and again.repeats == 0.04
    assert asked("full", zero=3, micro=8, save_every=999).repeats == 1


def test_a_teacher_whose_predictions_are_whole_is_planned_by_its_head_and_logits() -> None:
    gang = Gang(8, zero=3, checkpointing=True, micro=1)
    cut, whole = (tuned("lora", gang, loss="kl", top=top).trained for top in (64, 0))
    head, logits = 2 * 32000 * 4096, 4096 * 32000
    more = whole.resources.device - cut.resources.device
    assert more == pytest.approx(1.1 * (2 * head + 12 * logits), rel=1e-3), (
        "its head in fp32 at most, and of each logit three copies"
    )
    tokens = 100 * 64 * 4096
    assert sum(whole.spec.operations.values()) - sum(cut.spec.operations.values()) == tokens * head
    assert whole.spec.reads - cut.spec.reads > 1024 * 4096 * (2 * 4096 - 516), "states in place of the likeliest tokens"


def test_a_training_counts_its_attention_and_a_gpu_what_its_driver_takes() -> None:
    whole = tuned("full", Gang(8, zero=3)).trained
    active = whole.inputs[0].spec.output.active
    tokens, forwards = 100 * 64 * 4096, 3  # a backward pass takes two
    assert sum(whole.spec.operations.values()) == tokens * forwards * (2 * active + 4 * 4096 * 32 * 4096)
    one, none = (tuned("lora", Gang(8, zero=3, micro=1, gpus=gpus)).trained.resources.device for gpus in (1, 0))
    assert one - none == 1 << 30
