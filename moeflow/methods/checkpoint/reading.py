"""What a pinned checkpoint says of itself: config.json, index, headers and small files, checked before they are used."""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING, Any

from moeflow.arch import ARCH, COMPRESSED, Config, Family, layout_in_memory
from moeflow.arch.by_layer import listed
from moeflow.arch.found import Found, found, plain
from moeflow.methods.checkpoint import foreign
from moeflow.methods.checkpoint.intake import text_config
from moeflow.model.config_check import check_config, check_counts, check_entries, check_half
from moeflow.model.header import TensorInfo, read_header
from moeflow.model.json_file import json_object, kind_of
from moeflow.model.packed import (
    BLOCK_SCALE,
    BLOCKS,
    CODES,
    FORMAT,
    METHOD,
    MXFP4,
    PACKED,
    SCALES,
    SHAPE,
    block_scale,
    check_added,
    check_schemes,
    schemes_of,
)
from moeflow.model_files import INDEX, named_like

if TYPE_CHECKING:
    from moeflow.sources import Source

THREADS = 16  # headers that are read at once
FLOATS = ("F", "BF")
"""How the names of those dtypes begin that weights are computed in, or unpacked from."""
TEMPLATE, TEMPLATES = "chat_template.jinja", ("additional_chat_templates/*.jinja",)
"""The files in which a tokenizer's chat templates lie."""
USED = (".json", ".model", ".tiktoken", ".jinja", ".txt")
"""The endings of small files that are read when a checkpoint is used; others, such as a licence, may be empty."""
GENERATION = {"temperature": (int, float), "top_p": (int, float), "top_k": (int,), "max_length": (int,), "do_sample": (bool,)}
"""Entries of generation_config.json, and the types that they may have."""

TOKENIZER = {
    **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), (str, dict)), "tokenizer_class": (str,),
    "chat_template": (str, list), "model_max_length": (int, float), "add_bos_token": (bool,), "add_eos_token": (bool,),
    "added_tokens_decoder": (dict,), "auto_map": (dict, list),
}  # fmt: skip
"""Entries of tokenizer_config.json, and the types that they may have."""


def looked_at(source: "Source", tensors: Mapping[str, TensorInfo]) -> Found | None:
    """What looking at the checkpoint's model type tells; None if config.json already has it, as a result does.

    Raises ValueError if the type is not understood.
    """
    config = _config_json(source)
    if not isinstance(config.get("model_type"), str) or ARCH in config:
        return None
    where = f"config.json at {source.uri}"
    by_layer = listed(config)  # what differs by layer is told by looking
    check_entries({k: v for k, v in config.items() if k not in by_layer}, where)
    check_counts(config, where)  # before anything is looked at, which would say less of it
    check_half(config, where)
    if str(config["model_type"]).startswith(COMPRESSED):  # the result of an earlier release, under its family's own names
        result = found(plain(config), None, source.uri)
        return replace(result, layout=layout_in_memory(result.arch, tensors))
    return found(config, tensors, source.uri)


def config_of(source: "Source", known: Found | None = None) -> tuple[Config, Config]:
    """The checkpoint's config.json, and the configuration of its text model, which may be a part of it.

    Raises ValueError if it is damaged, or says what cannot be.
    """
    where, whole = f"config.json at {source.uri}", _config_json(source)
    config = text_config(whole, known, where)
    check_config(config, where)
    return whole, config


def tensors_of(source: "Source") -> dict[str, TensorInfo]:
    """Every tensor in the files of the model's weights, from the index and the headers.

    Raises ValueError if the index is damaged or does not name exactly the tensors that its files hold, as `read_header` does, and
    if a training's wrapping was saved with them.
    """
    sizes = {f.name: f.size for f in source.files}
    index = _index(source) if INDEX in sizes else None
    shards = foreign.shards_of(source, _config_json(source), index)
    with ThreadPoolExecutor(THREADS) as pool:
        headers = list(pool.map(lambda s: read_header(s, sizes[s], source.read), shards))
    tensors: dict[str, TensorInfo] = {}
    for shard, header in zip(shards, headers, strict=True):
        if both := sorted(set(tensors) & set(header)):
            raise ValueError(f"{tensors[both[0]].file} and {shard} at {source.uri} both hold {both[0]}; delete one of them")
        tensors |= header
    foreign.check_names(tensors, source.uri)
    if index is None:
        return tensors
    for name, shard in index.items():
        if name not in tensors or tensors[name].file != shard:
            raise ValueError(f"{INDEX} names {name} in {shard}, which does not hold it; fetch the checkpoint again")
    if surplus := sorted(set(tensors) - set(index)):
        raise ValueError(f"{tensors[surplus[0]].file} holds {surplus[0]}, which {INDEX} does not name; fetch the checkpoint again")
    return tensors


def check_packing(tensors: dict[str, TensorInfo], config: Config, uri: str) -> None:
    """Raise ValueError unless the packing is compressed-tensors of the experts, as moeflow writes it, FP8 with square blocks, as
    DeepSeek-V3 is published, or MXFP4 of the experts, as gpt-oss is."""
    packing, shapes = config.get("quantization_config"), {n: t.shape for n, t in tensors.items()}
    if not packing:
        if odd := [n for n, t in tensors.items() if n.endswith((PACKED, BLOCKS)) or t.dtype.startswith(("F8", "F4"))]:
            raise ValueError(f"{uri} has packed {odd[0]}, and its config.json no quantization_config; fetch the checkpoint again")
        _check_floats(tensors, uri)
        return
    method, form = packing.get("quant_method", "unknown"), packing.get("format")
    if method == "fp8":
        _check_fp8(packing.get("weight_block_size"), tensors, uri)
        _check_floats(tensors, uri)
        return
    if method == MXFP4:
        _check_mxfp4(tensors, config, uri)
        _check_floats(tensors, uri)
        return
    if (method, form) != (METHOD, FORMAT):
        said = method if isinstance(method, str) and method else f"quant_method is {kind_of(method)}"
        raise ValueError(
            f"{uri} is packed (quantization_config: {said}{f', format {kind_of(form)}' if form else ''}), and moeflow reads fp8, "
            f"{MXFP4}, and {METHOD} in the format {FORMAT}; dequantize it to bf16 first"
        )
    check_schemes(packing, schemes_of(shapes, config), config, f"config.json at {uri}: quantization_config")
    check_added(shapes, config)
    family = Family.of(config)
    shared = [name for i in family.moe_layers for name in family.shared(i) or ()]
    stems = (*(family.experts(i) for i in family.moe_layers), *shared)
    if others := sorted(n for n in shapes if n.endswith(PACKED) and not n.startswith(stems)):
        raise ValueError(f"{uri} has packed {others[0]}; moeflow reads packed experts only: dequantize the rest to bf16 first")
    for name, tensor in tensors.items():
        kinds = ("I32",) if name.endswith(PACKED) else ("I32", "I64") if name.endswith(SHAPE) else (tensor.dtype,)
        if tensor.dtype not in kinds:
            raise ValueError(f"{name} at {uri} has dtype {tensor.dtype} where {METHOD} has {' or '.join(kinds)}; fetch it again")
    _check_floats(tensors, uri)


def small_configs(source: "Source", names: list[str]) -> dict[str, dict[str, Any]]:
    """What those of these small files say that configure something; all are checked.

    Raises ValueError if one is empty, or a JSON file that cannot be read. tokenizer.json is built into the tokenizer that it
    describes, by the library that will read it.
    """
    configs: dict[str, dict[str, Any]] = {}
    for name in names:
        where = f"{name} at {source.uri}"
        if not source.find(name).size and name.endswith(USED):
            raise ValueError(f"{where} is empty; fetch it again")
        if name.endswith(".json"):
            data = source.read(name)
            value = json_object(data, where)
            if name.endswith("_config.json"):
                configs[name] = value
            if name == "tokenizer.json":
                _check_tokenizer(data, where)
            for file, kinds in (("generation_config.json", GENERATION), ("tokenizer_config.json", TOKENIZER)):
                _check_types(value, kinds if name == file else {}, where)
            if named_like(name, ("vocab.json", "added_tokens.json")):
                _check_types(value, dict.fromkeys(value, (int,)), where)
    return configs


def has_template(configs: Mapping[str, dict[str, Any]], names: Iterable[str]) -> bool:
    """Whether transformers finds a chat template with this checkpoint's tokenizer; `configs` is of `small_configs`."""
    own = configs.get("tokenizer_config.json", {}).get("chat_template")
    return bool(own) or any(n == TEMPLATE or named_like(n, TEMPLATES) for n in names)


def _config_json(source: "Source") -> Config:
    return json_object(source.read("config.json"), f"config.json at {source.uri}")


def _index(source: "Source") -> dict[str, str]:
    """The index: the file of each tensor."""
    where, held = f"{INDEX} at {source.uri}", set(source.names())
    index = json_object(source.read(INDEX), where)
    weight_map, metadata = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map:
        what = "no weight_map" if weight_map in (None, {}) else f"{kind_of(weight_map)} as weight_map"
        raise ValueError(f"{where} has {what}, which should name the file of each tensor; fetch the checkpoint again")
    if not isinstance(metadata, dict):
        raise ValueError(f"{where} has {kind_of(metadata)} as metadata, not an object; fetch the checkpoint again")
    total = metadata.get("total_size", 0)
    if type(total) not in (int, float) or not 0 <= total < float("inf") or total != int(total):
        raise ValueError(f"{where}: total_size is {kind_of(total)}, not a number of bytes; fetch the checkpoint again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise ValueError(f"{where} has {kind_of(shard)} as the file of {name!r:.99}, not a name; fetch the checkpoint again")
        if "/" in shard or "\\" in shard:
            raise ValueError(f"{where} names {shard!r:.99}, which leads out of the folder; fetch the checkpoint again")
        if shard not in held:
            raise ValueError(f"{INDEX} names {shard:.99}, which {source.uri} does not hold; fetch the checkpoint again")
    return weight_map


def _check_fp8(block: Any, tensors: dict[str, TensorInfo], uri: str) -> None:
    """Raise ValueError unless every FP8 matrix has a scale for each square block of the size that config.json says, and every scale
    is one of those."""
    square = isinstance(block, list) and len(block) == 2 and all(type(b) is int and b > 0 for b in block) and block[0] == block[1]
    scales = {name: block_scale(name, tensors) for name in tensors}
    of_blocks = {scale for name, scale in scales.items() if _in_fp8(tensors[name])}
    for name, tensor in tensors.items():
        if tensor.dtype == "F4" or (tensor.dtype == "F8_E8M0" and name not in of_blocks):
            raise ValueError(f"{uri} has {name} in {tensor.dtype}, which is no scale of FP8 blocks; dequantize it to bf16 first")
        scale = None if (at := scales[name]) is None else tensors[at]
        if not square:
            raise ValueError(
                f"{uri} is in FP8 without square blocks (weight_block_size={block!r:.60}); dequantize it to bf16 first"
            )
        if _in_fp8(tensor) and scale is None:
            raise ValueError(f"{uri} has {name} in FP8 without the scales of its blocks ({name}{BLOCK_SCALE}); fetch it again")
        blocks = tuple(ceil(n / block[0]) for n in tensor.shape)
        if scale is not None and scale.shape != blocks:
            raise ValueError(
                f"{at} at {uri} has shape {scale.shape} where blocks of {block[0]} (weight_block_size in config.json) need "
                f"{blocks}; correct one of them"
            )


def _in_fp8(tensor: TensorInfo) -> bool:
    return tensor.dtype.startswith("F8") and tensor.dtype != "F8_E8M0"


def _check_mxfp4(tensors: dict[str, TensorInfo], config: Config, uri: str) -> None:
    """Raise ValueError unless every matrix in MXFP4 is an expert's, has codes and scales, and no other is quantized."""
    family = Family.of(config)
    stems = tuple(family.experts(i) for i in family.moe_layers)
    for name, tensor in tensors.items():
        stem = name.removesuffix(BLOCKS).removesuffix(SCALES)
        if tensor.dtype.startswith(("F8", "F4")) or (stem != name and not name.startswith(stems)):
            raise ValueError(f"{uri} has {name} in {tensor.dtype} beside experts in MXFP4; dequantize it to bf16 first")
        if stem == name:
            continue
        codes, scales = tensors.get(stem + BLOCKS), tensors.get(stem + SCALES)
        if codes is None or scales is None or codes.shape != (*scales.shape, CODES) or {codes.dtype, scales.dtype} != {"U8"}:
            forms = " and ".join("nothing" if t is None else f"{t.dtype} {t.shape}" for t in (codes, scales))
            raise ValueError(
                f"{uri} has {forms} as codes and scales of {stem}, where MXFP4 has bytes [M, G, {CODES}] and [M, G]; fetch it again"
            )
    if not any(n.endswith(BLOCKS) for n in tensors):
        raise ValueError(f"{uri} has no matrix in MXFP4, which its config.json says (quantization_config); correct it")


def _check_floats(tensors: dict[str, TensorInfo], uri: str) -> None:
    """Raise ValueError if a tensor that is not packed consists of whole numbers."""
    if odd := [n for n, t in tensors.items() if not t.dtype.startswith(FLOATS) and not n.endswith((PACKED, SHAPE, BLOCKS, SCALES))]:
        kind = tensors[odd[0]].dtype
        raise ValueError(
            f"{odd[0]} at {uri} has dtype {kind}, which no weight is computed in; dequantize the checkpoint to bf16 first"
        )


def _check_tokenizer(data: bytes, where: str) -> None:
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises no narrower kind
        why = " ".join(str(error).split())
        raise ValueError(f"{where} describes no tokenizer ({why[:160]}); fetch it again") from None


def _check_types(value: dict[str, Any], kinds: Mapping[str, tuple[type, ...]], where: str) -> None:
    for name, entry in value.items():
        if name in kinds and entry is not None and type(entry) not in kinds[name]:
            wanted = " or ".join(k.__name__ for k in kinds[name])
            raise ValueError(f"{where}: {name!r:.99} is {kind_of(entry)}, not of type {wanted}; correct it, or fetch it again")
