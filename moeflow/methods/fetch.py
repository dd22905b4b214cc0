"""Bring a checkpoint into the store: file by file as it lies at its source, then one file per decoder layer and one for the rest.

Hub shards straddle layers, so a fine-tune that touched one layer would look like a new model; layer files do not.
"""

import fnmatch
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from moeflow.arch import Config, arch_of, essential
from moeflow.model.formats import format_of, layer_formats
from moeflow.model.layout import ESSENTIAL, TensorInfo, file_for, read_header
from moeflow.model.packed import BLOCK_SCALE, FORMAT, METHOD, PACKED, scheme_of
from moeflow.model.spec import LayerSpec, RestSpec, TensorTable, check_layer, file_bytes, tensor_bytes
from moeflow.step import Artifact, Context, Part, Spec, Step, step

TOKENIZER = ("tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*", "*.model", "*.tiktoken")
TRAVELLING = (
    *TOKENIZER,
    "*.jinja",
    "chat_template*",
    "generation_config.json",
    "licen[cs]e*",
    "copying*",
    "notice*",
    "use_policy*",
)
"""The files that travel with every checkpoint beside its weights and config.json, whatever the case of their letters."""

REST = "rest.safetensors"
INDEX = "model.safetensors.index.json"
THREADS = 16  # headers that are read at once

Table = dict[str, list[Any]]
"""Tensor name to [which input, dtype, shape, first byte, last byte + 1]."""


class Source(Protocol):
    """A pinned source of files, as `moeflow.store` makes it."""

    @property
    def uri(self) -> str: ...
    @property
    def files(self) -> Any: ...
    def read(self, name: str, start: int, stop: int) -> bytes: ...
    def text(self, name: str) -> str: ...
    def file(self, name: str) -> Step: ...
    def group(self, names: Any) -> Step: ...


@dataclass(frozen=True)
class Model:
    """A checkpoint as a graph: one step per decoder layer, one for the rest, and their configuration, known already."""

    config: Config
    rest: Step
    texts: Step | Part  # where the tokenizer's files are
    layers: tuple[Step, ...]
    extra: tuple[Step, ...] = ()  # multi-token-prediction layers that are kept as they are
    choices: tuple[Step, ...] = ()  # what was decided on the way here

    @property
    def has_tokenizer(self) -> bool:
        return any(_is(n, ("tokenizer*", "*.model", "*.tiktoken")) for n in self.rest.spec.output.files)

    @property
    def essential(self) -> Part:
        """The configuration as an input: only what changes what the model computes."""
        return self.rest.part(ESSENTIAL)

    @property
    def moe_layers(self) -> list[int]:
        """The decoder layers that have routed experts, or may have where a run decides that."""
        return [i for i in arch_of(self.config).moe_layers(self.config) if self.layers[i].spec.output.experts]

    @property
    def does_with_fewer(self) -> bool:
        """Whether tokens are computed by fewer experts than the router gives them: skipping, or Compressed Experts."""
        formats = [self.layers[i].spec.output.format for i in self.moe_layers]
        return any(f.skip or f.compressed for f in formats)

    def with_layers(self, layers: dict[int, Step], choices: tuple[Step, ...] = ()) -> "Model":
        """The same model with other files for some layers; how many experts these have is theirs to say."""
        changed = tuple(layers.get(i, layer) for i, layer in enumerate(self.layers))
        return replace(self, layers=changed, choices=self.choices + choices)


def pinned(source: Source, *, mtp: Literal["drop", "keep"] = "drop") -> Model:
    """The checkpoint at a pinned source (a folder, a hub repository at a commit, an `s3://` prefix).

    Reads config.json, the index and the safetensors headers, nothing else. `mtp` says what becomes of the
    multi-token-prediction layers of DeepSeek-V3, which stand behind the decoder layers: "drop", or "keep" them untouched.

    Raises ValueError for an unknown family, a checkpoint packed in a way that moeflow does not read, an index that names a missing
    tensor, a truncated file, and a config.json that contradicts the tensors.
    """
    if mtp not in ("drop", "keep"):
        raise ValueError(f"mtp={mtp!r}; choose 'drop' or 'keep'")
    config: Config = _json(source, "config.json")
    arch = arch_of(config)
    if lacking := [k for k in ("num_hidden_layers", "num_experts_per_tok", "hidden_size", "vocab_size") if k not in config]:
        raise ValueError(f"config.json at {source.uri} lacks {', '.join(lacking)}; fetch the checkpoint again")
    layer_formats(config)  # whatever it says of its layers has to be readable
    tensors = _tensors(source)
    if packing := config.get("quantization_config"):
        _check_packing(packing, tensors, config, source.uri)
        if packing["quant_method"] == METHOD:  # written again from what then is packed
            config.pop("quantization_config")
    steps = {name: source.file(name) for name in sorted({t.file for t in tensors.values()})}
    count = arch.num_layers(config)
    by_layer: dict[int | None, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        by_layer.setdefault(_layer_of(name), {})[name] = info
    if missing := sorted(set(range(count)) - set(by_layer)):
        raise ValueError(f"config.json says {count} layers, but the checkpoint has no tensor of layer {missing[0]}")

    def layer_step(i: int) -> Step:
        shards, table = _inputs(by_layer[i], steps)
        if i < count:
            check_layer(config, i, {n: (t.dtype, t.shape) for n, t in by_layer[i].items()})
        return layer(*shards, config=essential(config), layer=i, tensors=table)

    behind = sorted(i for i in by_layer if i is not None and i >= count)
    known_mtp = int(config.get("num_nextn_predict_layers") or 0)
    if behind[known_mtp:]:
        raise ValueError(f"the checkpoint has tensors of layer {behind[-1]}, but config.json says {count} layers")
    shards, table = _inputs(by_layer.get(None, {}), steps)
    small = sorted(f.name for f in source.files if _is(f.name, TRAVELLING))
    texts = source.group(small or ["config.json"])
    note = (
        f"multi-token-prediction layers {behind} are dropped (mtp='keep' keeps them as they are)"
        if behind and mtp == "drop"
        else ""
    )
    if mtp == "drop" and "num_nextn_predict_layers" in config:
        config = config | {"num_nextn_predict_layers": 0}
    return Model(
        config=config,
        rest=rest(texts, *shards, config=config, files=small, tensors=table, note=note),
        texts=texts,
        layers=tuple(layer_step(i) for i in range(count)),
        extra=tuple(layer_step(i) for i in behind) if mtp == "keep" else (),
    )


def _check_packing(packing: dict[str, Any], tensors: dict[str, TensorInfo], config: Config, uri: str) -> None:
    """Raise ValueError where a checkpoint is packed otherwise than its experts by compressed-tensors, as moeflow writes it, or in
    FP8 with square blocks, as DeepSeek-V3 is published."""
    method, form = packing.get("quant_method", "unknown"), packing.get("format")
    shapes = {n: t.shape for n, t in tensors.items()}
    if method == "fp8":
        bare = [n for n, t in tensors.items() if t.dtype.startswith("F8") and n + BLOCK_SCALE not in tensors]
        if bare or len(set(packing.get("weight_block_size") or [0, 1])) != 1:
            raise ValueError(
                f"{uri} is in FP8 without square blocks ({(bare or ['weight_block_size'])[0]}); dequantize it to bf16 first"
            )
        return
    if (method, form) != (METHOD, FORMAT):
        raise ValueError(f"{uri} is packed (quantization_config: {method} {form or ''}); dequantize it to bf16 first")
    scheme_of(shapes, config)
    arch = arch_of(config)
    shared = [t.format(layer=i) for i in arch.moe_layers(config) for t in arch.shared or ()]
    stems = (*(arch.experts(i) for i in arch.moe_layers(config)), *shared)
    if others := sorted(n for n in shapes if n.endswith(PACKED) and not n.startswith(stems)):
        raise ValueError(f"{uri} has packed {others[0]}; moeflow reads packed experts only: dequantize the rest to bf16 first")


def _layer_spec(*shards: Any, config: Config, layer: int, tensors: Table) -> Spec:
    table: TensorTable = {n: (dtype, tuple(shape)) for n, (_, dtype, shape, _, _) in tensors.items()}
    behind = layer >= int(config["num_hidden_layers"])  # a prediction layer is kept as it is, whatever it holds
    experts = format_of({n: shape for n, (_, shape) in table.items()}, config, layer).experts
    out = LayerSpec(config, layer, 0 if behind else experts, table)
    moved = sum(tensor_bytes(*t) for t in table.values())
    return Spec(out, reads=moved, writes=out.nbytes, memory=2 * moved)


@step("fetch.layer", version=1, spec=_layer_spec)
def layer(context: Context, *shards: Artifact, config: Config, layer: int, tensors: Table) -> None:
    """One decoder layer as `layer.safetensors`, under the hub's names; what stands beside its experts in `routing.safetensors`.

    Raises ValueError where a weight is NaN or infinite.
    """
    for file in sorted({file_for(n) for n in tensors}):
        _gather(context, shards, {n: t for n, t in tensors.items() if file_for(n) == file}, context.out / file)


def _rest_spec(texts: Any, *shards: Any, config: Config, files: list[str], tensors: Table, note: str) -> Spec:
    table: TensorTable = {n: (dtype, tuple(shape)) for n, (_, dtype, shape, _, _) in tensors.items()}
    width, vocabulary = int(config["hidden_size"]), int(config["vocab_size"])
    name = "model.embed_tokens.weight"
    if name not in table:
        raise ValueError(f"the checkpoint has no tensor {name}; it is incomplete, or of another family")
    heads = ["model.norm.weight"] + ([] if config.get("tie_word_embeddings") else ["lm_head.weight"])
    if missing := [n for n in heads if n not in table]:
        raise ValueError(f"the checkpoint has no tensor {missing[0]}; it is incomplete, or tie_word_embeddings is wrong")
    if table[name][1] != (vocabulary, width):
        raise ValueError(f"{name} has shape {table[name][1]} where config.json asks for {(vocabulary, width)}; correct one of them")
    out = RestSpec(config, table, {n: texts["files"][n] for n in files})
    moved = sum(tensor_bytes(*t) for t in table.values())
    size = len(config_text(config)) + len(config_text(essential(config)))
    return Spec(out, reads=moved, writes=file_bytes(table) + size, memory=2 * moved, notes=(note,) if note else ())


@step("fetch.rest", version=1, spec=_rest_spec)
def rest(context: Context, texts: Artifact, *shards: Artifact, config: Config, files: list[str], tensors: Table, note: str) -> None:
    """What is no decoder layer: `rest.safetensors`, config.json, and the small files that travel with the checkpoint."""
    _gather(context, shards, tensors, context.out / REST)
    (context.out / "config.json").write_text(config_text(config))
    (context.out / ESSENTIAL).write_text(config_text(essential(config)))
    if note:
        context.note(note)
    for name in files:
        context.link(texts, name)


def _configured_spec(given: RestSpec, *, config: Config) -> Spec:
    out = RestSpec(config, given.tensors, given.files)
    return Spec(out, reads=0, writes=len(config_text(config)) + len(config_text(essential(config))), memory=1 << 24)


@step("fetch.configured", version=1, spec=_configured_spec)
def configured(context: Context, given: Artifact, *, config: Config) -> None:
    """What is no decoder layer, with another configuration."""
    for name in given.names():
        if name not in (ESSENTIAL, "config.json"):
            context.link(given, name)
    (context.out / "config.json").write_text(config_text(config))
    (context.out / ESSENTIAL).write_text(config_text(essential(config)))


def _gather(context: Context, shards: tuple[Artifact, ...], tensors: Table, path: Path) -> None:
    from moeflow.model import checkpoint

    found, done = {}, 0
    total = sum(stop - start for _, _, _, start, stop in tensors.values())
    for at, shard in enumerate(shards):
        (file,) = (n for n in shard.names() if n.endswith(".safetensors"))
        here = {n: TensorInfo(file, t[1], tuple(t[2]), t[3], t[4]) for n, t in tensors.items() if t[0] == at}
        for name, tensor in checkpoint.read_many(shard, here):
            # FP8 knows no infinity, and torch does not look for its NaN
            if tensor.is_floating_point() and not (tensor.float() if tensor.itemsize == 1 else tensor).isfinite().all():
                raise ValueError(f"{name} holds NaN or infinite weights; the checkpoint is damaged, fetch or train it again")
            found[name] = tensor
            done += tensor.nbytes
            context.progress(done, total, "bytes")
    checkpoint.save(found, path)


def _tensors(source: Source) -> dict[str, TensorInfo]:
    """Every tensor of the checkpoint, from the index and the headers of its shards."""
    sizes = {f.name: f.size for f in source.files}
    index: dict[str, str] | None = None
    if INDEX in sizes:
        index = _json(source, INDEX).get("weight_map")
        if not isinstance(index, dict):
            raise ValueError(f"{INDEX} at {source.uri} has no weight_map; fetch the checkpoint again")
        shards = sorted(set(index.values()))
    else:
        shards = sorted(n for n in sizes if n.endswith(".safetensors") and "/" not in n)
    if not shards:
        raise ValueError(f"{source.uri} holds no safetensors file")
    if absent := [s for s in shards if s not in sizes]:
        raise ValueError(f"{INDEX} names {absent[0]}, which {source.uri} does not hold; fetch the checkpoint again")
    with ThreadPoolExecutor(THREADS) as pool:
        headers = list(pool.map(lambda s: read_header(s, sizes[s], lambda a, b: source.read(s, a, b)), shards))
    found: dict[str, TensorInfo] = {}
    for shard, header in zip(shards, headers, strict=True):
        found |= {n: t for n, t in header.items() if index is None or index.get(n) == shard}
    if index is not None and (missing := sorted(set(index) - set(found))):
        raise ValueError(f"{INDEX} names {missing[0]} in {index[missing[0]]}, which does not hold it; fetch the checkpoint again")
    return found


def _json(source: Source, name: str) -> dict[str, Any]:
    try:
        return json.loads(source.text(name))
    except ValueError as error:  # a source that lacks it says so itself, as a ValueError, too
        if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
            raise ValueError(f"{name} at {source.uri} is cut short or no JSON ({error}); fetch it again") from None
        raise


def config_text(config: Config) -> str:
    """A config.json, as every step writes it."""
    return json.dumps(config, indent=2) + "\n"


def _is(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name.lower(), p) for p in patterns)


def _inputs(tensors: dict[str, TensorInfo], steps: dict[str, Step]) -> tuple[list[Step], Table]:
    """The shards that hold these tensors, and where in them."""
    shards = sorted({t.file for t in tensors.values()})
    table = {n: [shards.index(t.file), t.dtype, list(t.shape), t.start, t.stop] for n, t in sorted(tensors.items())}
    return [steps[s] for s in shards], table


def _layer_of(name: str) -> int | None:
    if not name.startswith("model.layers."):
        return None
    return int(name.split(".")[2])
