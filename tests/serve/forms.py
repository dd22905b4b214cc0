"""Checkpoints of every form that moeflow writes, made of tiny random ones, in sizes that vLLM's attention on a processor knows."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from moeflow.arch import LAYERS, MAIN, Family
from moeflow.model.checkpoint import Tensors
from moeflow.model.formats import FORMS, Format, config_of, format_of, layer_formats, routing_shapes, without_added
from moeflow.model.layout import Folder, read_config
from moeflow.model.packed import ADDED_IN, ADDED_OUT, Scheme, pack, packed_shapes, quantization_config
from tests import tiny
from tests.compressed import compress, write

SIZES: dict[str, Any] = {"hidden_size": 128, "max_position_embeddings": 512}
HEADS = {"head_dim": 32}
LATENT = {"kv_lora_rank": 512, "q_lora_rank": 48, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
WIDTHS = {"intermediate_size": 96, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}


def original(family: str, folder: Path) -> Path:
    """A random checkpoint of the family with heads of 32, or latent attention of 512 and 64."""
    known = tiny.COMMON | tiny.FAMILIES[family]
    widths = {k: v for k, v in WIDTHS.items() if k in known}
    heads = LATENT if family.startswith("deepseek") else HEADS if "head_dim" in known or family in ("mixtral", "qwen3_moe") else {}
    biases = {"attention_bias": True, "lm_head_bias": True} if family == "phimoe" else {}
    return tiny.write(family, folder, **(SIZES | widths | heads | biases))


def rewritten(source: Path, out: Path, change: Callable[[Family, int, Format, dict[str, Tensor]], Format], **more: Any) -> Path:
    """The checkpoint with each MoE layer's format and tensors changed; `more` goes into its config.json."""
    config, tensors = read_config(Folder(source)) | more, dict(Tensors(source))
    family = Family.of(config)
    formats = [f and change(family, i, f, tensors) for i, f in enumerate(layer_formats(config))]
    write(tensors, config_of(config, formats, own=True), out)
    return out


def counts(source: Path, out: Path) -> Path:
    """Fewer experts in the first and last MoE layer, as many in each of the router's groups; all of them whole."""

    def change(family: Family, layer: int, format: Format, tensors: dict[str, Tensor]) -> Format:
        if layer == family.moe_layers[1]:
            return format
        keep = 4 if layer == family.moe_layers[0] else 6
        for expert in range(keep, format.experts):
            for name in family.expert(layer, expert):
                del tensors[name]
        for name in family.router_tensors(layer):
            tensors[name] = tensors[name][:keep].clone()
        return Format(keep)

    return rewritten(source, out, change)


def skipping(source: Path, out: Path) -> Path:
    """Half of the layers' tokens skip experts by one rule and by the other, where there are two experts a token."""

    def change(family: Family, layer: int, format: Format, tensors: dict[str, Tensor]) -> Format:
        rule = "ratio" if family.top_k == 2 and layer % 2 else "tail"
        tensors[f"{family.experts(layer)}skip.{rule}"] = torch.tensor(0.4 if rule == "ratio" else 0.25)
        return replace(format, skip=rule)

    return rewritten(source, out, change)


def vectors(source: Path, out: Path) -> Path:
    """Compressed Experts, of either form."""

    def change(family: Family, layer: int, format: Format, tensors: dict[str, Tensor]) -> Format:
        new = replace(format, compressed=list(FORMS)[layer % 2])
        generator = torch.Generator().manual_seed(layer)
        inner, width = tensors[family.expert(layer, 0)[0]].shape
        for name, shape in routing_shapes(family, new, layer, width, inner).items():
            tensors[name] = torch.randn(shape, generator=generator) * 0.3
        return new

    return rewritten(source, out, change, **{MAIN: 1})


def gone(source: Path, out: Path) -> Path:
    """The first MoE layer without its experts, with its shared expert where it has one; without the whole block otherwise."""

    def change(family: Family, layer: int, format: Format, tensors: dict[str, Tensor]) -> Format:
        if layer != family.moe_layers[0]:
            return format
        shared = {*family.shared(layer), family.shared_gate(layer)}
        block = [n for n in tensors if n.startswith(family.moe(layer)) and n not in shared]
        norm = [] if family.shared(layer) else [n for n in tensors if n.startswith(family.norm(layer))]
        for name in block + norm:
            del tensors[name]
        return Format(0, gone="experts" if family.shared(layer) else "moe")

    return rewritten(source, out, change)


def packed(source: Path, out: Path, schemes: Mapping[int, Scheme] | None = None) -> Path:
    """The experts of some layers packed, factors, too.

    Unless `schemes` says which: 4 bits in the first MoE layer, with groups of 32, 8 bits with one scale a row in the last.
    """
    config, tensors = read_config(Folder(source)), dict(Tensors(source))
    family = Family.of(config)
    layers = family.moe_layers
    schemes = schemes or {layers[0]: Scheme(4, 32), layers[-1]: Scheme(8, 0)}
    for layer, scheme in schemes.items():
        for expert in range(family.num_experts):
            for whole in family.expert(layer, expert):
                for name in [n for n in (whole, *family.factors(whole)) if n in tensors]:
                    tensors |= {name + end: t for end, t in _packed(tensors.pop(name), scheme).items()}
    shapes = {n: t.shape for n, t in tensors.items()}
    new = config_of(config, layer_formats(config), own=True)
    write(tensors, new | {"quantization_config": quantization_config(schemes, shapes, config)}, out)
    return out


def packed_counts(source: Path, out: Path, group: int = 32) -> Path:
    """Differing counts, all experts in 4 bits, with groups of so many."""
    counts(source, between := out.parent / f"{out.name}-whole")
    config, tensors = read_config(Folder(between)), dict(Tensors(between))
    family, formats = Family.of(config), layer_formats(config)
    for layer in family.moe_layers:
        for expert in range((formats[layer] or Format(0)).experts):
            for name in family.expert(layer, expert):
                tensors |= {name + end: t for end, t in _packed(tensors.pop(name), Scheme(4, group)).items()}
    shapes = {n: t.shape for n, t in tensors.items()}
    schemes = dict.fromkeys(family.moe_layers, Scheme(4, group))
    write(tensors, config | {"quantization_config": quantization_config(schemes, shapes, config)}, out)
    return out


def added(source: Path, out: Path) -> Path:
    """As `packed`, with two factors of rank 3 beside each packed matrix."""
    packed(source, between := out.parent / f"{out.name}-alone")
    config, files = read_config(Folder(between)), sorted(between.glob("*.safetensors"))
    tensors = {n: t for file in files for n, t in load_file(file).items()}
    generator = torch.Generator().manual_seed(0)
    for name, (rows, columns) in packed_shapes({n: t.shape for n, t in tensors.items()}, config).items():
        tensors[name + ADDED_OUT] = 0.1 * torch.randn(rows, 3, generator=generator)
        tensors[name + ADDED_IN] = 0.1 * torch.randn(3, columns, generator=generator)
    shapes = {n: t.shape for n, t in tensors.items()}
    said = [value and format_of(shapes, config, i).to_json() for i, value in enumerate(config[LAYERS])]
    write(tensors, config | {LAYERS: said}, out)
    return out


def _packed(w_MN: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    top = (1 << (scheme.bits - 1)) - 1
    groups_MGg = w_MN.unflatten(1, (-1, scheme.group or w_MN.shape[1]))
    scale_MG = groups_MGg.abs().amax(-1) / top
    codes_MN = (groups_MGg / scale_MG[..., None]).round().clamp(-top - 1, top).flatten(1).to(torch.int8)
    return pack(codes_MN, scale_MG, scheme.bits)


def plain(source: Path, out: Path) -> Path:
    """The packed checkpoint with its matrices multiplied out, which transformers loads whatever its quantizer is."""
    config = read_config(Folder(source))
    config.pop("quantization_config")
    write(dict(Tensors(source)), config | {LAYERS: [without_added(value) for value in config[LAYERS]]}, out)
    return out


FORMS_OF: dict[str, Callable[[Path, Path], Path]] = {
    "counts": counts,
    "low_rank": compress,
    "skipping": skipping,
    "vectors": vectors,
    "gone": gone,
    "packed": packed,
    "added": added,
}
"""Every form, and how it is made. "low_rank": ranks that differ, whole and low-rank experts in one layer, counts that differ."""


def heads_of_32(source: Path, out: Path) -> Path:
    """The same function as a Mixtral with heads of 16, in heads of 32, which attention on a processor knows.

    A rotary frequency of a head of 16 is every second one of a head of 32: its coordinates go there, the others are zero. Scores
    are divided by another root, for which the queries make up.
    """
    config, tensors = read_config(Folder(source)), dict(Tensors(source))
    half = torch.arange(0, 16, 2)
    place = torch.cat([half, half + 16])
    for name in [n for n in tensors if ".self_attn." in n]:
        w_MN = tensors[name].T if ".o_proj." in name else tensors[name]
        heads = w_MN.unflatten(0, (-1, 16))
        wide = heads.new_zeros(heads.shape[0], 32, heads.shape[2])
        wide[:, place] = heads * 2**0.5 if ".q_proj." in name else heads
        tensors[name] = wide.flatten(0, 1).T.contiguous() if ".o_proj." in name else wide.flatten(0, 1)
    write(tensors, config | {"head_dim": 32}, out)
    return out
