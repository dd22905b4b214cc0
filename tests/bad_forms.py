"""The rows of `test_bad_inputs.py` with quantized matrices, stacks of experts, or a multimodal model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from moeflow.model.packed import BLOCK_SCALE as FP8
from moeflow.model.packed import BLOCKS, PACKED, SCALE, SCALES, SHAPE
from tests import layouts, tiny
from tests.bad_inputs import Row, row
from tests.spoiling import INDEX, SHARD, Spoil, absent, added, config, index, tensor

SIZES: dict[str, Any] = {"num_hidden_layers": 2, "vocab_size": 512}
Tensors = dict[str, Tensor]


def rewritten(folder: Path, change: Callable[[Tensors], Tensors], **configuration: Any) -> Path:
    """The checkpoint in one file with other tensors, and other entries in its config.json."""
    layouts.edit(folder, change)
    layouts.configure(folder, lambda config: config | configuration)
    return folder


def in_stacks(folder: Path) -> Path:
    tiny.write("qwen3_moe", folder / "hub", **SIZES)
    AutoModelForCausalLM.from_pretrained(folder / "hub").save_pretrained(folder, save_original_format=False)
    for file in (folder / "hub").iterdir():
        file.unlink()
    (folder / "hub").rmdir()
    return folder


def in_fp8(folder: Path) -> Path:
    """Blocks of 8 x 8, scaled by one; matrices have sides of 8, 16, 24, ..."""

    def change(tensors: Tensors) -> Tensors:
        made: Tensors = {}
        for name, t in tensors.items():
            quantized = ".layers." in name and t.dim() == 2 and ".mlp.gate." not in name
            scale = {f"{name}_scale_inv": torch.ones(-(-t.shape[0] // 8), -(-t.shape[-1] // 8))} if quantized else {}
            made |= {name: t.to(torch.float8_e4m3fn) if quantized else t} | scale
        return made

    said = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [8, 8]}
    return rewritten(tiny.write("deepseek_v3", folder, **SIZES), change, quantization_config=said)


def packed(folder: Path) -> Path:
    """Experts of four bits in groups of 8."""

    def change(tensors: Tensors) -> Tensors:
        made: Tensors = {}
        for name, t in tensors.items():
            words = torch.zeros(t.shape[0], t.shape[-1] // 8, dtype=torch.int32)
            whole = {PACKED: words, SCALE: words.float(), SHAPE: torch.tensor(t.shape)}
            made |= {name + end: one for end, one in whole.items()} if ".experts." in name else {name: t}
        return made

    said = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    return rewritten(tiny.write("mixtral", folder, **SIZES), change, quantization_config=said)


def in_mxfp4(folder: Path) -> Path:
    def change(tensors: Tensors) -> Tensors:
        made: Tensors = {}
        for name, t in tensors.items():
            quantized = name.endswith(("gate_up_proj", "down_proj"))
            codes = torch.zeros(8, t.shape[-1], t.shape[1] // 32, 16, dtype=torch.uint8) if quantized else t
            made |= {name + BLOCKS: codes, name + SCALES: codes[..., 0].clone()} if quantized else {name: t}
        return made

    return rewritten(layouts.write("gpt_oss", folder), change, quantization_config={"quant_method": "mxfp4"})


FORMS: dict[str, Callable[[Path], Path]] = {
    "stacks": in_stacks,
    "fp8": in_fp8,
    "packed": packed,
    "mxfp4": in_mxfp4,
    "wrapper": lambda folder: layouts.write("qwen3_vl_moe", folder),
}
"""How the checkpoint is made that a row spoils, where it is not of one of the families in `tests/tiny.py`."""
LOOKED_AT = ("mxfp4", "wrapper")
"""Those whose model type is looked at, which takes a while."""


def quantized(**said: Any) -> Spoil:
    """config.json says this of quantization, over what it says; an entry is left out where it is `...`."""

    def spoil(folder: Path) -> None:
        value = json.loads((folder / "config.json").read_text())
        now = (value.get("quantization_config") or {}) | said
        value["quantization_config"] = {k: v for k, v in now.items() if v is not ...}
        (folder / "config.json").write_text(json.dumps(value))

    return spoil


def resized(name: str, shape: list[int]) -> Spoil:
    """A tensor has another shape, and as many zeros as that needs."""

    def spoil(folder: Path) -> None:
        files = json.loads((folder / INDEX).read_text())["weight_map"]
        old = load_file(folder / files[name])[name]
        absent(name)(folder)
        tensors = load_file(folder / files[name]) | {name: torch.zeros(shape, dtype=old.dtype)}
        save_file(tensors, folder / files[name], metadata={"format": "pt"})
        index(lambda names: names.update({name: files[name]}))(folder)

    return spoil


def inside(**changes: Any) -> Spoil:
    """The text model's part of config.json has these entries, or not, where one is `...`."""

    def spoil(folder: Path) -> None:
        value = json.loads((folder / "config.json").read_text())
        value["text_config"] = {k: v for k, v in (value["text_config"] | changes).items() if v is not ...}
        (folder / "config.json").write_text(json.dumps(value))

    return spoil


def without_tensors(*words: str) -> Spoil:
    """The checkpoint lacks every tensor whose name has one of these words, and its index says nothing of them."""

    def spoil(folder: Path) -> None:
        files = json.loads((folder / INDEX).read_text())["weight_map"]
        for name in (n for n in files if any(w in n for w in words)):
            absent(name)(folder)

    return spoil


def scheme(**weights: Any) -> Spoil:
    """config.json says this of packed weights, where nothing else would be wrong with it."""
    said = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 8} | weights
    return quantized(config_groups={"group_0": {"targets": ["Linear"], "weights": said}})


S, X, P = "model.layers.0.mlp.experts", "model.layers.0.block_sparse_moe.experts.1.w1.weight", "model.layers.1.mlp.experts"
F8 = "model.layers.0.self_attn.o_proj.weight"
GROUP = "config_groups.group_0.weights:"

QUANTIZED: list[Row] = [
    *(
        row(
            f"quantized by {m!r}",
            quantized(quant_method=m, bits=4),
            f"(quantization_config: {m}), and moeflow reads fp8, mxfp4, and",
        )
        for m in ("gptq", "awq", "bitsandbytes", "hqq", "modelopt", "quark")
    ),
    *(
        row(f"quantized by {m!r}", quantized(quant_method=m), f"quantization_config: quant_method is {shown})")
        for m, shown in ((5, "5"), (None, "null"), ("", "''"), (["fp8"], "a list"))
    ),
    row(
        "gptq of three bits", quantized(quant_method="gptq", bits=3, group_size=128), "(quantization_config: gptq)", "dequantize it"
    ),
    row("awq of no bits", quantized(quant_method="awq", bits=None), "(quantization_config: awq)", "dequantize it to bf16 first"),
    row(
        "packed, with an empty quantization_config",
        config(quantization_config={}),
        "weight_packed",
        "no quantization_config",
        family="packed",
    ),
    row(
        "packed in another format",
        quantized(format="float-quantized"),
        "(quantization_config: compressed-tensors, format 'float-",
        "in the format pack-quantized",
        family="packed",
    ),
    row("packed in no format", quantized(format=...), "compressed-tensors in the format pack-quantized", family="packed"),
    row("packed by an unknown strategy", scheme(strategy="spiral"), GROUP, "strategy is 'spiral' where", family="packed"),
    row(
        "packed with other bits than said",
        scheme(num_bits=8),
        GROUP,
        "num_bits is 8 where the packed tensors have 4",
        family="packed",
    ),
    row(
        "packed in other groups than said",
        scheme(group_size=16),
        GROUP,
        "group_size is 16 where the packed tensors have 8",
        family="packed",
    ),
    row("packed asymmetrically", scheme(symmetric=False), GROUP, "symmetric is False where", family="packed"),
    row("packed floats", scheme(type="float"), GROUP, "type is 'float' where the packed tensors have int", family="packed"),
    row("packed with bits that are a list", scheme(num_bits=[4]), GROUP, "num_bits is [4] where", family="packed"),
    row("config_groups is a list", quantized(config_groups=[4]), "config_groups is no object of objects", family="packed"),
    row("config_groups has a number", quantized(config_groups={"group_0": 4}), "config_groups is no object", family="packed"),
    row("packed without scales of one expert", absent(X + SCALE), f"{X}_scale is missing", family="packed"),
    row("packed without the shape of one expert", absent(X + SHAPE), f"{X}_shape is missing", family="packed"),
    row("packed words of another dtype", tensor(X + PACKED, dtype="F32"), f"{X}_packed at", "has dtype F32 where", family="packed"),
    row("a packed shape of another dtype", tensor(X + SHAPE, dtype="F64"), f"{X}_shape at", "has dtype F64 where", family="packed"),
    row(
        "packed with scales of another width",
        resized(X + SCALE, [48, 3]),
        X,
        "4 words and 3 scales a row for 32 inputs",
        family="packed",
    ),
    row(
        "packed with scales of other rows", resized(X + SCALE, [47, 4]), f"{X}_packed has 48 rows and {X}_scale 47", family="packed"
    ),
    row("packed with other rows", resized(X + PACKED, [47, 4]), f"{X}_packed has 47 rows and {X}_scale 48", family="packed"),
    row(
        "packed with a zero point",
        added(X + "_zero_point", (48, 4), SHARD),
        f"{X}_zero_point has shape (48, 4), not",
        family="packed",
    ),
    row("one expert of other bits", resized(X + PACKED, [48, 8]), f"{X} 8 bits", "one scheme only", family="packed"),
    row("packed with fewer experts in config.json", config(num_local_experts=6), "6 experts, its tensors say 8", family="packed"),
    row(
        "FP8 without the scales of one matrix", absent(F8 + FP8), f"has {F8} in FP8 without the scales of its blocks", family="fp8"
    ),
    row("FP8 with scales of another shape", resized(F8 + FP8, [3, 4]), F8 + FP8, "blocks of 8 (weight_block_size", family="fp8"),
    row("FP8 with blocks of another size", quantized(weight_block_size=[16, 16]), "blocks of 16 (weight_block_size", family="fp8"),
    row("FP8 with blocks that are no squares", quantized(weight_block_size=[8, 16]), "weight_block_size=[8, 16]", family="fp8"),
    row("FP8 with scales in whole numbers", tensor(F8 + FP8, dtype="I32"), F8 + FP8, "has dtype I32", family="fp8"),
    row(
        "FP8 with scales of nothing",
        added(f"model.layers.1.x.weight{FP8}", (1, 1)),
        "model.layers.1.x.weight_scale_inv",
        family="fp8",
    ),
    row("FP8 that config.json does not mention", config(quantization_config=...), "no quantization_config", family="fp8"),
    row("FP8 with fewer experts in config.json", config(n_routed_experts=6), "6 experts, its tensors say 8", family="fp8"),
    row("MXFP4 without scales", absent(f"{S}.down_proj_scales"), "nothing as codes and scales of", "down_proj", family="mxfp4"),
    row(
        "MXFP4 with scales of another shape",
        resized(f"{S}.down_proj_scales", [8, 64, 2]),
        f"{S}.down_proj_scales at",
        "asks for (8, 64, 1)",
        family="mxfp4",
    ),
    row(
        "MXFP4 with codes of half a group",
        resized(f"{S}.down_proj_blocks", [8, 64, 1, 8]),
        f"{S}.down_proj_blocks at",
        "asks for (8, 64, 1, 16)",
        family="mxfp4",
    ),
    row(
        "MXFP4 with scales of another dtype",
        tensor(f"{S}.down_proj_scales", dtype="I8"),
        "I8 (64, 1) as codes and scales of",
        family="mxfp4",
    ),
    row(
        "MXFP4 of seven experts in one stack",
        resized(f"{S}.down_proj_blocks", [7, 64, 1, 16]),
        "7 experts where config.json says",
        family="mxfp4",
    ),
    row(
        "MXFP4 with fewer experts in config.json",
        config(num_local_experts=6),
        "8 experts where config.json says num_local_experts=6",
        family="mxfp4",
    ),
    row(
        "MXFP4 that config.json does not mention",
        config(quantization_config=...),
        "_blocks, and its config.json no quant",
        family="mxfp4",
    ),
    row("MXFP4 that is called by another name", quantized(quant_method="mxfp6"), "(quantization_config: mxfp6)", family="mxfp4"),
]

STACKS: list[Row] = [
    row(
        "counts of experts that contradict each other",
        config(num_experts=6),
        "num_local_experts is 8 and num_experts is 6",
        family="stacks",
    ),
    *(
        row(
            f"stacks and {n} experts in config.json",
            config(num_local_experts=n),
            f"8 experts where config.json says num_local_experts={n}",
            family="stacks",
        )
        for n in (6, 9)
    ),
    row("a stack of one expert less", resized(f"{S}.down_proj", [7, 32, 24]), f"{S}.down_proj at", "7 experts", family="stacks"),
    row("a stack on its side", resized(f"{S}.down_proj", [8, 24, 32]), "down_proj at", "asks for (8,", family="stacks"),
    row("a stack that is flat", resized(f"{S}.down_proj", [8, 768]), f"{S}.down_proj at", "(8, 32, 24)", family="stacks"),
    row(
        "gate and up of odd width",
        resized(f"{S}.gate_up_proj", [8, 47, 32]),
        f"{S}.gate_up_proj at",
        "(8, 47, 32)",
        family="stacks",
    ),
    row("gate and up of another width", resized(f"{S}.gate_up_proj", [8, 64, 32]), f"{S}.gate_up_proj at", family="stacks"),
    row("gate without up", resized(f"{S}.gate_up_proj", [8, 24, 32]), f"{S}.gate_up_proj at", "(8, 48, 32)", family="stacks"),
    row("a stack in F4", tensor(f"{S}.down_proj", dtype="F4"), f"'{S}.down_proj' has 24,576 bytes", family="stacks"),
    row("no stack of gate and up", absent(f"{S}.gate_up_proj"), "no tensor", f"{S}.0.gate_proj.weight", family="stacks"),
    row("no stack of down", absent(f"{P}.down_proj"), "no tensor", f"{P}.0.down_proj.weight", family="stacks"),
    row(
        "a stack beside its matrices",
        added(f"{S}.3.down_proj.weight", (32, 24), SHARD),
        f"{S}.3.down_proj.weight twice, in {S}",
        f"{S}.down_proj",
        family="stacks",
    ),
    row(
        "a dtype that torch lacks, in a stack",
        tensor(f"{S}.down_proj", dtype="F6_E3M2"),
        "'F6_E3M2', which is not known",
        family="stacks",
    ),
    row("whole numbers in a stack", tensor(f"{S}.down_proj", dtype="I32"), "down_proj", "has dtype I32", family="stacks"),
    row(
        "biases of wrong length", resized(f"{S}.gate_up_proj_bias", [8, 60]), f"{S}.gate_up_proj_bias at", "(8, 64)", family="mxfp4"
    ),
    row("biases of seven experts", resized(f"{S}.down_proj_bias", [7, 64]), f"{S}.down_proj_bias at", "7 experts", family="mxfp4"),
    row("a router of seven experts", resized("model.layers.0.mlp.router.bias", [7]), "router.bias has shape (7,)", family="mxfp4"),
]

NESTED: list[Row] = [
    *(
        row(
            f"{key} of {value!r} in a type that is looked at",
            config(model_type="ernie4_5_moe", **{key: value}),
            "config.json at",
            f"{key} is {shown}, not a whole number from {int(key == 'num_hidden_layers')} to 10,000",
        )
        for key, value, shown in (
            ("moe_num_experts", "64", "'64'"),
            ("moe_k", 1.5, "1.5"),
            ("num_hidden_layers", True, "true"),
            ("moe_topk", -1, "-1"),
            ("moe_num_experts", [8, "8"], "'8'"),
        )
    ),
    row(
        "a word as a count in a part of config.json",
        config(model_type="dbrx", ffn_config={"moe_num_experts": "16"}),
        "ffn_config.moe_num_experts is '16', not a whole number",
    ),
    *(
        row(
            f"a wrapper's text whose {key} is {shown}",
            inside(**{key: value}),
            f"text_config.{key} is {shown}, not a whole number",
            family="wrapper",
        )
        for key, value, shown in (
            ("num_local_experts", "8", "'8'"),
            ("num_experts_per_tok", "many", "'many'"),
            ("num_hidden_layers", 2.0, "2.0"),
        )
    ),
    row(
        "a wrapper without its text's configuration",
        config(text_config=...),
        "has a vision_config and no text_config",
        family="wrapper",
    ),
    row("a wrapper's text that is a list", config(text_config=[]), "text_config is a list where a text model", family="wrapper"),
    row(
        "a wrapper without its vision", without_tensors("visual"), "nothing beside its text model (model.visual.)", family="wrapper"
    ),
    row("a wrapper without its text", without_tensors("language_model", "lm_head"), "has no text model", family="wrapper"),
    row("a wrapper with fewer experts in config.json", inside(num_local_experts=6), "num_local_experts=6", family="wrapper"),
]
