"""What is known about checkpoints, layers and tokens before they exist: the outputs of steps' specs. No torch."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Literal, get_args

from moeflow.arch import EMBEDDING, HEAD, Config, Family
from moeflow.engines import Form
from moeflow.model.formats import Format, format_of
from moeflow.model.packed import BLOCKS, PACKED, SCALE, Scheme, numels, packed_shapes, scheme_of

BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8,
    "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "U64": 64, "U32": 32, "U16": 16, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
}  # fmt: skip
"""The dtypes of real numbers that safetensors writes and torch has, and the bits of each number."""
Precision = Literal["float64", "float32", "float16", "bfloat16"]
PRECISIONS: Mapping[str, int] = dict(zip(get_args(Precision), (8, 4, 2, 2), strict=True))
"""The precisions that a model runs in, by torch's names, and the bytes of a number."""

TensorTable = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name to (safetensors dtype, shape)."""


def shapes_of(table: TensorTable) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, (_, shape) in table.items()}


def header_bytes(table: TensorTable) -> int:
    """The size of a safetensors file's header, the part before the data."""
    return file_bytes(table) - sum(tensor_bytes(*t) for t in table.values())


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return BITS[dtype] * prod(shape) // 8


def file_bytes(table: TensorTable) -> int:
    """The size of a safetensors file with these tensors: length, header padded to eight bytes, data."""
    at, header = 0, {"__metadata__": {"format": "pt"}}
    for name, (dtype, shape) in table.items():
        end = at + tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}  # type: ignore[dict-item]
        at = end
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-length // 8) * 8 + at


def precision(config: Config, dtype: str) -> Precision:
    """The precision of a run by torch's name: `dtype`, or for "auto" that of the checkpoint. Raises ValueError if unknown."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32") if dtype == "auto" else dtype
    for known in get_args(Precision):
        if known == name:
            return known
    raise ValueError(f"dtype={name!r} is not known; choose one of auto, {', '.join(PRECISIONS)}")


def element_bytes(config: Config, dtype: str) -> int:
    """The bytes of one number in the precision of a run; see `precision`."""
    return PRECISIONS[precision(config, dtype)]


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer's file.

    Where the run decides how many experts stay or which ranks they get, `share` is the part of the experts' bytes that is expected
    to be there, `experts` and `tensors` are what there is at most, and `fewest` how many experts it leaves at least: with 0 perhaps
    no MoE block at all.
    """

    config: Config
    layer: int
    experts: int  # 0: a dense layer
    tensors: TensorTable
    share: float = 1.0
    fewest: int | None = None  # as many as there are
    slimmed_by: str = ""  # how a step of this graph slimmed the experts, in words: their tensors may not tell it
    sparse: bool = False  # the experts' zeros were made by a step of this graph, and are to stay
    ranks_decided: bool = False  # the run decides the ranks of the experts' matrices
    multiple: int = 1  # the ranks that the run decides are multiples of it
    bits_decided: bool = False  # the run decides to how many bits the experts are packed, if to any
    alike: bool = False  # how many experts stay is decided by a run, for all layers the same
    elsewhere: bool = False  # its tensors may lie at the source only, so that keeping them writes them
    changed: bool = False  # a run decides whether they do, and most likely they do not

    @cached_property
    def nbytes(self) -> int:
        return file_bytes(self.tensors) - self._taken_out

    def loaded(self, dtype: str) -> int:
        """The bytes of its weights in a run in this precision: unpacked, whatever the file has."""
        return self.numel * element_bytes(self.config, dtype)

    @property
    def least(self) -> int:
        """The smallest number of experts that a run may leave."""
        return self.experts if self.fewest is None else min(self.fewest, self.experts)

    @cached_property
    def headers(self) -> int:
        """The bytes of the file's header."""
        return header_bytes(self.tensors)

    @cached_property
    def low_rank(self) -> bool:
        """Whether any expert is low-rank already, or a step of the graph may make it so."""
        return self.share < 1 or self.format.low_rank

    @cached_property
    def format(self) -> Format:
        """The format of the layer, by its tensors."""
        return format_of(shapes_of(self.tensors), self.config, self.layer)

    def check_routing(self, what: str) -> None:
        """Raise ValueError if this layer's experts must not change, or may be gone; `what` ("prune") would change them."""
        if self.experts and not self.least:
            raise ValueError(
                f"whether layer {self.layer} keeps its experts is decided by a run that trims the model; {what} first and trim "
                "then, or take the trimmed checkpoint as the model"
            )
        if self.format.skip:
            raise ValueError(
                f"layer {self.layer} skips experts by a threshold that was calibrated on it as it is; {what} the model without it, "
                "and calibrate skipping on the result"
            )
        if self.format.compressed:
            raise ValueError(
                f"layer {self.layer} has Compressed Experts, which stand for its experts as they are; {what} the model without "
                "them, and attach them to the result"
            )

    @cached_property
    def packed(self) -> Scheme | None:
        """How its experts are packed; None if they are not."""
        return scheme_of(shapes_of(self.tensors), self.config)

    @cached_property
    def fp8(self) -> bool:
        """Whether any of its matrices is in FP8."""
        return any(dtype.startswith("F8") for dtype, _ in self.tensors.values())

    @cached_property
    def mxfp4(self) -> bool:
        """Whether any of its matrices is in MXFP4."""
        return any(name.endswith(BLOCKS) for name in self.tensors)

    @cached_property
    def one_rank(self) -> int:
        """The bytes of two factors of rank one beside each of its packed experts' matrices."""
        whole, stem = packed_shapes(shapes_of(self.tensors), self.config), Family.of(self.config).experts(self.layer)
        packed = [n for n in whole if n.startswith(stem) and n + PACKED in self.tensors]
        return sum(tensor_bytes(self.tensors[n + SCALE][0], (sum(whole[n]),)) for n in packed)

    def check_plain(self, what: str) -> None:
        """Raise ValueError if its experts are packed, in FP8 or in MXFP4; `what` ("decompose") needs plain weights."""
        form = f"packed in {self.packed.words()}" if self.packed else "in FP8" if self.fp8 else "in MXFP4" if self.mxfp4 else ""
        if form:
            raise ValueError(f"layer {self.layer} is {form}; {what} the model that it was made of")

    @cached_property
    def expert_bytes(self) -> int:
        """The bytes of all routed experts together."""
        return self._bytes_of(Family.of(self.config).experts(self.layer))

    @cached_property
    def expert_numel(self) -> int:
        """The number of parameters of all routed experts together."""
        stem = Family.of(self.config).experts(self.layer)
        numel = numels(shapes_of(self.tensors), self.config)
        return sum(number for name, number in numel.items() if name.startswith(stem))

    @cached_property
    def active(self) -> int:
        """The weights that a token is multiplied with: of as many experts as the router gives it, at their mean size."""
        whole = sum(numels(shapes_of(self.tensors), self.config).values())
        if not self.experts:
            return whole
        family = Family.of(self.config)
        each = self.expert_numel * (self.share if self.ranks_decided else 1) / self.experts
        return whole - self.expert_numel + round(each * min(family.main_experts, family.experts_per_token(self.experts)))

    @cached_property
    def heads(self) -> int:
        """How many numbers of one token the values of all heads have: what the attention's last matrix takes; 0 without one."""
        family, width = Family.of(self.config), int(self.config["hidden_size"])
        experts = family.experts(self.layer)
        matrices = (n for n, (_, s) in self.tensors.items() if len(s) == 2 and s[0] == width and not n.startswith(experts))
        return max((self.tensors[n][1][1] for n in matrices if family.kind(n) == "attention"), default=0)

    @cached_property
    def block_bytes(self) -> int:
        """The bytes of the MoE block's tensors."""
        return self._bytes_of(Family.of(self.config).moe(self.layer)) - self._taken_out

    @cached_property
    def numel(self) -> int:
        whole = sum(numels(shapes_of(self.tensors), self.config).values())
        return round(whole * self.nbytes / file_bytes(self.tensors))

    @property
    def _taken_out(self) -> int:
        """The bytes of the experts that the run is expected to take out."""
        return round((1 - self.share) * self.expert_bytes)

    def _bytes_of(self, stem: str) -> int:
        return sum(tensor_bytes(*t) for n, t in self.tensors.items() if n.startswith(stem))


@dataclass(frozen=True)
class RestSpec:
    """What a checkpoint has beside its decoder layers: embedding, final norm, head, and its small files."""

    config: Config
    tensors: TensorTable
    files: Mapping[str, int]

    @cached_property
    def nbytes(self) -> int:
        return file_bytes(self.tensors) + sum(self.files.values())

    @cached_property
    def head_bytes(self) -> int:
        """The bytes of the final norm and the head, which may be the embedding."""
        tied = HEAD not in self.tensors
        return sum(tensor_bytes(*t) for n, t in self.tensors.items() if tied or n != EMBEDDING)

    def loaded(self, dtype: str, *, head: bool) -> int:
        """The bytes of the final norm and the head, or else of the embedding, in a run in this precision."""
        tied = HEAD not in self.tensors
        numel = sum(prod(shape) for n, (_, shape) in self.tensors.items() if (n == EMBEDDING) != head or (tied and head))
        return numel * element_bytes(self.config, dtype)


@dataclass(frozen=True)
class CheckpointSpec:
    """A whole checkpoint, as assembled."""

    config: Config
    nbytes: int
    parameters: int
    headers: int  # bytes of its safetensors headers
    others: int  # bytes of its other files
    active: int  # weights that a token is multiplied with, those of the head among them
    form: Form | None = None  # what an engine asks of it
    one_rank: int = 0  # bytes of two factors of rank one beside each of its packed experts' matrices
    heads: int = 0  # numbers of one token that the values of all heads have, in all layers

    def loaded(self, dtype: str = "auto") -> int:
        """The bytes of its weights once transformers has loaded them in this precision, which unpacks what is packed."""
        return max(self.nbytes, self.parameters * element_bytes(self.config, dtype))


@dataclass(frozen=True)
class TokensSpec:
    sequences: int
    length: int
    masked: bool = field(default=False, kw_only=True, compare=False)  # whether a mask says which tokens are learned

    @property
    def nbytes(self) -> int:
        return self.tokens * (4 + self.masked) + 128 * (1 + self.masked)

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


@dataclass(frozen=True)
class TrafficSpec(TokensSpec):
    """What an engine recorded of its requests: how often it chose each expert, and maybe a token matrix, else of no sequences."""

    names: tuple[str, ...]
    """What is known of each layer, by the names of a pass."""
    layers: tuple[tuple[int, int], ...]
    """Its MoE layers, each with its number of experts."""
    file: str
    """Its first file, for messages."""

    def gives(self, needs: Collection[str]) -> bool:
        """Whether it is enough for what needs these of a layer, by the names of a pass."""
        return set(needs) <= set(self.names)

    @property
    def where(self) -> str:
        """What it is, as the beginning of a message."""
        return f"tokens=traffic:{self.file} holds counts without token ids"


@dataclass(frozen=True)
class HiddenSpec:
    """The hidden states of some sequences before one layer."""

    config: Config
    sequences: int
    length: int
    dtype: str
    handed_on: int = 0  # numbers of 4 bytes that the layer before hands on beside them, for each token

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return element_bytes(self.config, self.dtype)

    @cached_property
    def nbytes(self) -> int:
        token = int(self.config["hidden_size"]) * self.itemsize + 4 * self.handed_on
        return self.sequences * self.length * token + (200 if self.handed_on else 104)


@dataclass(frozen=True)
class Recording:
    """What one shard's pass keeps of each layer, besides the router's statistics of all tokens."""

    inputs: int
    """The number of tokens, from the first, whose MoE inputs are kept."""
    per_expert: int = 0
    """Also keep tokens until every expert has this many."""
    between: int = 0
    """The number of tokens, from the first, whose hidden states before every layer are kept."""
    beside: tuple[int, int] = (0, 0)
    """(a, b): of the first a of every b tokens, what every MoE block's output is added to is kept."""

    def besides(self, tokens: int) -> int:
        """Of how many of so many tokens it is kept what the block's output is added to."""
        taken, of = min(self.beside), self.beside[1]
        return tokens // of * taken + min(tokens % of, taken) if taken else 0


@dataclass(frozen=True)
class ObservedSpec:
    """The output of one pass over some sequences: hidden states behind the last layer, and statistics of each MoE layer."""

    hidden: HiddenSpec
    recorded: int  # the first tokens, whose MoE inputs are kept
    rows: int  # the same with the tokens that are kept for a rare expert, at most
    layers: tuple[int, ...]
