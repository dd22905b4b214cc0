"""Adapters are merged as PEFT merges them: what moeflow writes is what `merge_and_unload` makes of the same files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from moeflow.cli import app
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.graph import Model
from moeflow.run import StepFailed
from moeflow.sources import How, pin
from tests import tiny
from tests.models import pulled
from tests.running import facts_of, model_in, run, store_in

PIPELINE = Path(__file__).parents[2] / "bad_inputs_pipeline.py"
ATTENTION = ["q_proj", "v_proj", "o_proj"]
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny checkpoint of a family with two layers, made once."""
    root = tmp_path_factory.mktemp("bases")

    def made(family: str) -> Path:
        if not (root / family).exists():
            plain: dict[str, Any] = {"mlp_only_layers": []} if family.startswith("qwen") else {}
            tiny.write(family, root / family, num_hidden_layers=2, **plain)
        return root / family

    return made


def trained(base: Path, at: Path, **options: Any) -> Path:
    """An adapter of the checkpoint in a folder of its own, with random factors, as PEFT saves it."""
    model = AutoModelForCausalLM.from_pretrained(base)
    made = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False} | options))
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    made.save_pretrained(at)
    return at


def merged_by_peft(base: Path, adapter: Path, out: Path) -> dict[str, Tensor]:
    """The tensors of the merged model, by their names on disk."""
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    model.merge_and_unload().save_pretrained(out)
    return dict(load_file(out / "model.safetensors"))


def model_of(base: Path, adapter: Path | str, *, how: How | None = None) -> Model:
    return checkpoint.pinned(pin(str(base), kind="model", adapter=str(adapter), how=how))


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def check_alike(base: Path, adapter: Path, tmp_path: Path) -> int:
    """Compare moeflow's merging with PEFT's; return how many tensors changed."""
    theirs, plain = merged_by_peft(base, adapter, tmp_path / "theirs"), tensors_in(base)
    ours = tensors_in(pulled(store_in(tmp_path), model_of(base, adapter), tmp_path))
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    return sum(not torch.equal(ours[n], plain[n]) for n in ours)


PATTERNS: dict[str, Any] = {
    "target_modules": ATTENTION,
    "use_rslora": True,
    "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "v_proj": 8},
    "alpha_pattern": {"^model.layers.0.self_attn.o_proj": 3, r".*\.1\..*\.v_proj": 16},
}
KINDS: dict[str, tuple[str, dict[str, Any], int]] = {
    "attention": ("mixtral", {"target_modules": ATTENTION}, 6),
    "rank-stabilised, with patterns": ("mixtral", PATTERNS, 6),
    "one layer": ("mixtral", {"target_modules": ATTENTION, "layers_to_transform": [1]}, 3),
    "fused experts": ("mixtral", {"target_modules": [], "target_parameters": FUSED}, 2 * 8 * 3),
    "one stack of fused experts": ("qwen3_moe", {"target_modules": ATTENTION, "target_parameters": FUSED[1:]}, 2 * 8 + 6),
    "fused experts with patterns": (
        "olmoe",
        {"target_modules": [], "target_parameters": FUSED, "rank_pattern": {"experts.down_proj": 2},
         "alpha_pattern": {"gate_up_proj": 9}, "use_rslora": True},
        2 * 8 * 3,
    ),
    "routers": ("mixtral", {"target_modules": [], "target_parameters": ["gate.weight"], "alpha_pattern": {"gate.weight": 9}}, 2),
    "all that is linear, of attention with latents": ("deepseek_v3", {"target_modules": "all-linear"}, 2 * 5 + 1 + 8 * 3),
    "the embedding and the head": ("phimoe", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}, 4),
    "whole modules": ("qwen2_moe", {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}, 4),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_merged_is_what_peft_merges(kind: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    family, options, changed = KINDS[kind]
    adapter = trained(bases(family), tmp_path / "adapter", **options)
    assert check_alike(bases(family), adapter, tmp_path) == changed


def per_expert(base: Path, at: Path, names: tuple[str, ...], **changes: Any) -> Path:
    """An adapter as PEFT saved it when experts were modules of their own, with transformers 4."""
    torch.manual_seed(3)
    factors: dict[str, Tensor] = {}
    for name, tensor in tensors_in(base).items():
        stem = name.removesuffix(".weight")
        if ".experts." in name and stem.rpartition(".")[2] in names:
            m, n = tensor.shape
            factors[f"base_model.model.{stem}.lora_A.weight"] = torch.randn(4, n) * 0.2
            factors[f"base_model.model.{stem}.lora_B.weight"] = torch.randn(m, 4) * 0.2
    at.mkdir()
    save_file(factors, at / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": [*names], "bias": "none"}
    (at / "adapter_config.json").write_text(json.dumps(about | changes))
    return at


def test_adapters_of_single_experts_are_merged_as_peft_merges_them(bases: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = per_expert(bases("mixtral"), tmp_path / "adapter", ("w1", "w2", "w3"))
    assert check_alike(bases("mixtral"), adapter, tmp_path) == 2 * 8 * 3


def test_an_adapter_lies_beside_the_weights_or_elsewhere_and_the_result_is_the_same(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base, adapter = bases("mixtral"), trained(bases("mixtral"), tmp_path / "adapter", target_modules=ATTENTION)
    both = Path(shutil.copytree(base, tmp_path / "both"))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(adapter / name, both)
    results = [
        pulled(store_in(tmp_path), model, tmp_path / str(i))
        for i, model in enumerate((model_of(both, "merge"), model_of(base, adapter), model_of(both, "merge", how="copy")))
    ]
    one, *others = ({p.name: p.read_bytes() for p in result.iterdir()} for result in results)
    assert all(one == other for other in others) and not any("adapter" in name for name in one)


def test_every_pipeline_takes_an_adapter_as_a_word(bases: Callable[[str], Path], adapter_of_mixtral: Path, tmp_path: Path) -> None:
    def planned(*words: str) -> Result:
        given = [w for word in words for w in ("-p", word)]
        return CliRunner().invoke(app, ["plan", str(PIPELINE), "--store", str(tmp_path / "store"), *given], catch_exceptions=False)

    base = bases("mixtral")
    merged = planned(f"model={base}", f"adapter={adapter_of_mixtral}")
    assert merged.exit_code == 0 and "checkpoint.merged_layer" in merged.stdout and "is merged into 2 tensors" in merged.stdout
    assert "checkpoint.merged_layer" not in planned(f"model={base}", "adapter=none").stdout
    for words, says in (
        (f"adapter={tmp_path}/no", "there is no such file"),
        ("adapter=merge", "holds no adapter"),
    ):
        refused = planned(f"model={base}", words)
        assert refused.exit_code == 2 and says in refused.stderr and len(refused.stderr.splitlines()) == 1
    alone = planned(f"model={adapter_of_mixtral}")
    assert alone.exit_code == 2 and f"-p model={base} -p adapter={adapter_of_mixtral}" in alone.stderr
    assert "the LoRA adapter (PEFT)" in CliRunner().invoke(app, ["plan", str(PIPELINE), "--help"]).stdout


def test_a_merged_layer_says_so_and_only_changed_layers_have_other_keys(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("mixtral")
    adapter = trained(base, tmp_path / "adapter", target_modules=ATTENTION, layers_to_transform=[1])
    plain, merged = model_in(base), model_of(base, adapter)
    assert plain.rest.key == merged.rest.key and plain.layers[0].key == merged.layers[0].key
    assert plain.layers[1].key != merged.layers[1].key and merged.layers[1].name == "checkpoint.merged_layer"
    assert f"the adapter at {adapter}, trained on {base}, is merged into 3 tensors" in merged.rest.notes
    out = pulled(store_in(tmp_path), merged, tmp_path)
    assert facts_of(out) == {1: [{"step": "checkpoint.merged_layer", "tensors": 3, "scales": [1.5]}]}
    torch.manual_seed(1)
    whole = {n: torch.randn_like(t) for n, t in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(whole, adapter / "adapter_model.safetensors")
    again = model_of(base, adapter)
    assert again.layers[0].key == merged.layers[0].key and again.layers[1].key != merged.layers[1].key
    assert merged.layers[1].spec.reads > plain.layers[1].spec.reads


def test_a_bf16_model_is_rounded_once(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = tiny.write("mixtral", tmp_path / "base", num_hidden_layers=1, dtype=torch.bfloat16)
    adapter = trained(base, tmp_path / "adapter", target_modules=["q_proj"], lora_alpha=4)
    ours = tensors_in(pulled(store_in(tmp_path), model_of(base, adapter), tmp_path))
    name = "model.layers.0.self_attn.q_proj"
    factors = {n: t.float() for n, t in load_file(adapter / "adapter_model.safetensors").items()}
    a, b = (factors[f"base_model.model.{name}.lora_{f}.weight"] for f in "AB")
    exact = tensors_in(base)[f"{name}.weight"].float() + b @ a
    assert torch.equal(ours[f"{name}.weight"], exact.to(torch.bfloat16))


def test_factors_of_older_releases_of_peft_multiply_to_the_transpose(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """Before 0.19.1 PEFT took the experts of transformers for [inputs, outputs], whatever they are."""
    base = bases("mixtral")
    adapter = trained(base, tmp_path / "adapter", target_modules=[], target_parameters=FUSED)
    new = tensors_in(pulled(store_in(tmp_path), model_of(base, adapter), tmp_path / "new"))
    factors = load_file(adapter / "adapter_model.safetensors")
    swapped: dict[str, Tensor] = {}
    for name, b in ((n, t) for n, t in factors.items() if "lora_B" in n):
        a, count = factors[name.replace("lora_B", "lora_A")], 8
        # E stands before R in the rows of A, and behind it in the columns of B
        a_ERN, b_MRE = a.reshape(count, -1, a.shape[1]), b.reshape(b.shape[0], -1, count)
        swapped[name.replace("lora_B", "lora_A")] = b_MRE.permute(2, 1, 0).reshape(a.shape[0], -1).contiguous()
        swapped[name] = a_ERN.permute(2, 1, 0).reshape(a.shape[1], -1).contiguous()
    save_file(swapped, adapter / "adapter_model.safetensors")
    old = tensors_in(pulled(store_in(tmp_path), model_of(base, adapter), tmp_path / "old"))
    assert all(torch.allclose(old[n], new[n], atol=1e-6) for n in new)


def about(**changes: Any) -> Callable[[Path], None]:
    """The adapter's configuration has these entries, or not, where one is `...`."""

    def spoil(at: Path) -> None:
        config = json.loads((at / "adapter_config.json").read_text()) | changes
        (at / "adapter_config.json").write_text(json.dumps({n: v for n, v in config.items() if v is not ...}))

    return spoil


def held(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    """The adapter's tensors are changed."""

    def spoil(at: Path) -> None:
        tensors = dict(load_file(at / "adapter_model.safetensors"))
        change(tensors)
        save_file(tensors, at / "adapter_model.safetensors")

    return spoil


Q = "base_model.model.model.layers.0.self_attn.q_proj."
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "DoRA": (about(use_dora=True), "says use_dora=true, which is no plain LoRA; merge it with PEFT"),
    "aLoRA": (about(alora_invocation_tokens=[1]), "says alora_invocation_tokens=a list, which is no plain LoRA"),
    "trained tokens": (about(trainable_token_indices=[1]), "says trainable_token_indices=a list"),
    "biases": (about(bias="all"), "says bias='all', which is no plain LoRA"),
    "a bias of B": (about(lora_bias=True), "says lora_bias=true"),
    "a kind of tomorrow": (about(use_xlora=True), "says use_xlora=true, which is no plain LoRA"),
    "IA3": (about(peft_type="IA3"), "of an adapter of kind 'IA3', and moeflow merges LORA"),
    "no kind": (about(peft_type=...), "of an adapter of kind null, and moeflow merges LORA"),
    "PiSSA": (about(init_lora_weights="pissa_niter_4"), "init_lora_weights='pissa_niter_4' began by changing the model's own"),
    "a rank of zero": (about(r=0), "r is 0, which cannot be"),
    "a rank that is a word": (about(r="8"), "r is '8', which cannot be"),
    "an alpha that is none": (about(lora_alpha="x"), "lora_alpha is 'x', which cannot be"),
    "another rank": (about(r=2), r"q_proj.lora_A.weight has rank 4 where adapter_config.json says 2; correct one"),
    "a pattern that is none": (about(alpha_pattern={"q_proj(": 2}), r"has 'q_proj\(', which is no pattern"),
    "patterns in a list": (about(rank_pattern=[1]), "rank_pattern is a list, which cannot be"),
    "one factor": (held(lambda t: t.pop(f"{Q}lora_B.weight")), "has only one factor of model.layers.0.self_attn.q_proj, no lora_B"),
    "a factor of another model": (
        held(lambda t: t.update({f"{Q}lora_B.weight": torch.ones(64, 4)})),
        r"do not fit model.layers.0.self_attn.q_proj.weight \(32, 32\); it is of another model",
    ),
    "a factor that was not gathered": (held(lambda t: t.update({f"{Q}lora_B.weight": torch.ones(0)})), "ZeRO-3"),
    "a magnitude": (held(lambda t: t.update({f"{Q}lora_magnitude_vector": torch.ones(32)})), "is no factor of a plain LoRA"),
    "a bias of a factor": (held(lambda t: t.update({f"{Q}lora_B.bias": torch.ones(32)})), "is no factor of a plain LoRA"),
    "a layer too many": (
        held(lambda t: t.update({n.replace("layers.0", "layers.9"): x.clone() for n, x in [*t.items()] if Q in n})),
        "changes model.layers.9.self_attn.q_proj, of which the model has no plain weight",
    ),
    "a module of another model": (
        held(lambda t: t.update({"base_model.model.vision.proj.weight": torch.ones(2)})), "for which the model has no tensor"),
    "an enlarged vocabulary": (
        held(lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(99, 32)})),
        r"has shape \(99, 32\) where the model has \(96, 32\); if the vocabulary was enlarged",
    ),
    "nothing": (held(lambda t: t.clear()), "changes nothing"),
    "no tensors": (lambda at: (at / "adapter_model.safetensors").unlink(), "holds no adapter_model.safetensors"),
    "no configuration": (lambda at: (at / "adapter_config.json").unlink(), "holds no adapter: it has no adapter_config.json"),
    "a pickle": (
        lambda at: (at / "adapter_model.safetensors").rename(at / "adapter_model.bin"),
        "holds no adapter_model.safetensors, only a pickle, which can run code when read",
    ),
    "damaged tensors": (lambda at: (at / "adapter_model.safetensors").write_bytes(b"x"), "is truncated or no safetensors"),
    "a damaged configuration": (lambda at: (at / "adapter_config.json").write_text("{"), "is cut short or no JSON"),
}  # fmt: skip


@pytest.fixture(scope="module")
def adapter_of_mixtral(bases: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(bases("mixtral"), tmp_path_factory.mktemp("good") / "adapter", target_modules=["q_proj"])


@pytest.mark.parametrize("name", BAD)
def test_an_adapter_that_is_not_understood_is_refused_in_one_line_before_anything_runs(
    name: str, bases: Callable[[str], Path], adapter_of_mixtral: Path, tmp_path: Path
) -> None:
    spoil, says = BAD[name]
    at = Path(shutil.copytree(adapter_of_mixtral, tmp_path / "adapter"))
    spoil(at)
    with pytest.raises(ValueError, match=says) as told:
        model_of(bases("mixtral"), at)
    assert "\n" not in str(told.value) and len(str(told.value)) < 700


def test_square_experts_need_peft_s_version_to_be_merged(tmp_path: Path) -> None:
    base = tiny.write("mixtral", tmp_path / "base", num_hidden_layers=1, intermediate_size=32)
    adapter = trained(base, tmp_path / "adapter", target_modules=[], target_parameters=FUSED)
    assert check_alike(base, adapter, tmp_path) == 8 * 3
    about(peft_version="0.18.0")(adapter)
    older = tensors_in(pulled(store_in(tmp_path), model_of(base, adapter), tmp_path / "older"))
    stem = "base_model.model.model.layers.0.mlp.experts.lora_"
    factors = load_file(adapter / "adapter_model.safetensors")
    a_RN, b_MR = factors[f"{stem}A.weight"][:4], factors[f"{stem}B.weight"][:, ::8]
    name = "model.layers.0.block_sparse_moe.experts.0.w2.weight"
    torch.testing.assert_close(older[name], tensors_in(base)[name] + 1.5 * (b_MR @ a_RN).T)
    about(peft_version=...)(adapter)
    with pytest.raises(ValueError, match="names no peft_version, which tells how factors of square experts multiply"):
        model_of(base, adapter)


def test_a_tied_head_and_a_model_that_is_no_longer_plain_are_refused(bases: Callable[[str], Path], tmp_path: Path) -> None:
    tied = tiny.write("mixtral", tmp_path / "tied", num_hidden_layers=2, tie_word_embeddings=True)
    adapter = trained(bases("mixtral"), tmp_path / "adapter", target_modules=["lm_head"])
    with pytest.raises(
        ValueError, match="holds .*lm_head.*, for which the model has no tensor, because its head is tied to the embedding"
    ):
        model_of(tied, adapter)
    base = tiny.write("mixtral", tmp_path / "fewer", num_hidden_layers=2, num_local_experts=5)
    adapter = trained(bases("mixtral"), tmp_path / "fused", target_modules=[], target_parameters=FUSED)
    with pytest.raises(ValueError, match="do not fit 5 experts; it is of another model"):
        model_of(base, adapter)


def test_an_adapter_with_damaged_numbers_fails_the_layer_and_names_the_tensor(
    bases: Callable[[str], Path], adapter_of_mixtral: Path, tmp_path: Path
) -> None:
    at = Path(shutil.copytree(adapter_of_mixtral, tmp_path / "adapter"))
    held(lambda t: t[f"{Q}lora_B.weight"].fill_(float("nan")))(at)
    with pytest.raises(StepFailed, match=r"q_proj.weight holds NaN or infinite weights with the adapter merged"):
        run(store_in(tmp_path), model_of(bases("mixtral"), at).layers[0])
