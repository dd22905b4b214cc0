"""The format of one decoder layer: how many experts it has, the ranks of their matrices, whether tokens skip experts or have
Compressed Experts, and what of the MoE block is gone. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moeflow.arch import COMPRESSED, LAYERS, MAIN, MATRICES, Config, Family, family_config, is_number
from moeflow.model.packed import ADDED_OUT, BLOCKS, PACKED, Shapes

Ranks = tuple[int, ...]
"""The rank of one matrix in each expert; 0 if the matrix is whole."""

CLASSES = "Moeflow"
"""The beginning of the names of the classes that load a compressed checkpoint; the name of the family's class follows."""

SKIPS = ("ratio", "tail")
"""The rules of dynamic skipping. The threshold has its rule's name."""

FORMS = {"one": ("input",), "three": ("gate", "up", "inner")}
"""The forms of Compressed Experts, and the vectors that each expert has in that form."""

GONE = {"": "all", "experts": "a shared expert and no routed one", "moe": "neither a MoE block nor its norm"}
"""What may be gone of a MoE block, and how a message names what is left."""

LOW_RANK = "low_rank"
"""What may be added to packed matrices when they are unpacked: the product of two factors."""

BESIDE = ("skip", "compressed", "gone", "added")
"""The fields of `Format` beside counts and ranks, absent from config.json where they are empty."""


@dataclass(frozen=True)
class Format:
    """The format of one decoder layer. Ranks are empty if every matrix is whole."""

    experts: int
    """The number of routed experts; 0: a dense layer, or one whose experts are gone."""
    gate: Ranks = ()
    up: Ranks = ()
    down: Ranks = ()
    skip: str = ""
    """The rule (`SKIPS`) by which a token skips experts."""
    compressed: str = ""
    """The form (`FORMS`) of its Compressed Experts."""
    gone: str = ""
    """What of the MoE block is gone (`GONE`)."""
    added: str = ""
    """What is added to its packed experts (`LOW_RANK`)."""

    @property
    def low_rank(self) -> bool:
        return bool(self.up)

    @property
    def own(self) -> bool:
        """Whether the layer needs `RoutedExperts`, because the family's own fused experts cannot compute it."""
        return bool(self.low_rank or self.skip or self.compressed)

    @property
    def ours(self) -> bool:
        """Whether only a checkpoint in moeflow's own format can hold the layer."""
        return bool(self.own or self.gone or self.added)

    def ranks(self, matrix: str) -> Ranks:
        """The rank of `matrix` ("gate", "up" or "down") in each expert; 0 if it is whole."""
        return getattr(self, matrix) or (0,) * self.experts

    def part(self, experts: range) -> "Format":
        """The format of these experts alone."""
        gate, up, down = (ranks[experts.start : experts.stop] for ranks in (self.gate, self.up, self.down))
        return Format(len(experts), gate, up, down, self.skip, self.compressed)

    def words(self) -> str:
        """The format in words, for a message."""
        if self.gone:
            return GONE[self.gone]
        words = [f"{self.experts} experts"]
        words += [f"{m} of ranks {', '.join(map(str, ranks))}" for m in MATRICES if (ranks := getattr(self, m))]
        words += [f"skipping by {self.skip}"] if self.skip else []
        words += [f"Compressed Experts ({self.compressed})"] if self.compressed else []
        words += ["low-rank additions"] if self.added else []
        return ", ".join(words)

    def to_json(self) -> dict[str, Any]:
        ranks = {m: list(ranks) for m in MATRICES if (ranks := getattr(self, m))}
        beside = {name: value for name in BESIDE if (value := getattr(self, name))}
        return {"experts": self.experts} | ({"ranks": ranks} if self.low_rank else {}) | beside

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Format":
        ranks = value.get("ranks", {})
        gate, up, down = (tuple(ranks.get(m, ())) for m in MATRICES)
        return Format(int(value["experts"]), gate, up, down, *(str(value.get(name, "")) for name in BESIDE))


def format_of(shapes: Shapes, config: Config, layer: int) -> Format:
    """The format of a layer, from the names and shapes of its tensors.

    Raises ValueError if an expert lacks a matrix or a factor, or if two factors do not fit each other.
    """
    family = Family.of(config)
    stem = family.experts(layer)
    parts = {n.removeprefix(stem).split(".")[0] for n in shapes if n.startswith(stem)}
    numbers = sorted(int(n) for n in parts if is_number(n))
    if numbers != list(range(len(numbers))):
        lacking = next(i for i, n in enumerate([*numbers, -1]) if i != n)
        raise ValueError(f"layer {layer} has no expert {lacking} but {len(numbers)} others; the checkpoint is incomplete")
    ranks = [[_rank(shapes, name, family.factors(name)) for name in family.expert(layer, e)] for e in numbers]
    low_rank = any(map(any, ranks))
    columns = dict(zip(family.matrices, zip(*ranks, strict=True), strict=True)) if low_rank else {}
    gate, up, down = (tuple(columns.get(m, ())) for m in MATRICES)
    skip = next((s for s in SKIPS if f"{stem}skip.{s}" in shapes), "")
    compressed = next((f for f, vectors in FORMS.items() if f"{stem}compressed.{vectors[0]}" in shapes), "")
    gone = ""
    if not numbers and layer in family.moe_layers and family.router(layer) not in shapes:
        if any(name in shapes for name in family.shared(layer)[:1]):
            gone = "experts"
        elif family.arch.norm_feeds_more or not any(n.startswith(family.norm(layer)) for n in shapes):
            gone = "moe"
    added = LOW_RANK if any(n.startswith(stem) and n.endswith(ADDED_OUT) for n in shapes) else ""
    return Format(len(numbers), gate, up, down, skip, compressed, gone, added)


def routing_shapes(family: Family, format: Format, layer: int, width: int, inner: int) -> dict[str, tuple[int, ...]]:
    """The names and shapes of what is stored beside a layer's experts: the threshold of skipping, vectors of Compressed Experts."""
    shapes: dict[str, tuple[int, ...]] = {f"{family.experts(layer)}skip.{format.skip}": ()} if format.skip else {}
    for vector in FORMS.get(format.compressed, ()):
        shapes[f"{family.experts(layer)}compressed.{vector}"] = (format.experts, inner if vector == "inner" else width)
    return shapes


def check_tensors(where: str, asked: Shapes, stored: Shapes) -> None:
    """Raise ValueError if the stored tensors are not exactly those that the configuration asks for, in names and shapes."""
    if missing := sorted(set(asked) - set(stored)):
        raise ValueError(
            f"{where} has no tensor {some(missing)}, which its config.json asks for; the checkpoint is incomplete, or of another "
            "family"
        )
    if extra := sorted(set(stored) - set(asked)):
        raise ValueError(f"{where} has {some(extra)}, which its config.json leaves no place for; correct one of them")
    for name, shape in asked.items():
        if tuple(stored[name]) != tuple(shape):
            raise ValueError(
                f"{where}: {name} has shape {tuple(stored[name])} where config.json asks for {tuple(shape)}; correct one of them"
            )


def some(names: Sequence[str], shown: int = 4) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def without_added(value: Mapping[str, Any]) -> dict[str, Any]:
    """A layer's entry in config.json once what is added to its experts has been added."""
    return {name: of for name, of in value.items() if name != "added"}


def _rank(shapes: Shapes, name: str, factors: tuple[str, str]) -> int:
    out, inner = factors
    if any(name + end in shapes for end in ("", PACKED, BLOCKS)):
        return 0
    stored = {n: shapes[n + end] for n in factors for end in (PACKED, "") if n + end in shapes}
    if missing := [n for n in factors if n not in stored]:
        absent = name if len(missing) == 2 else missing[0]
        raise ValueError(f"the checkpoint has no tensor {absent}; it is incomplete, or of another family")
    fits = len(stored[out]) == len(stored[inner]) == 2 and stored[inner][0] > 0
    rank = stored[inner][0] if fits else 0
    # for packed factors only the number of words in a row is known
    if not fits or (stored[out][1] * 32 % rank if out not in shapes else stored[out][1] != rank):
        raise ValueError(
            f"{out} {tuple(stored[out])} and {inner} {tuple(stored[inner])} do not multiply; the checkpoint is damaged"
        )
    return int(rank)


def layer_formats(config: Config) -> list[Format | None]:
    """The format of each decoder layer by config.json, of a compressed checkpoint or not; None for a dense layer.

    Raises ValueError if the formats of a compressed checkpoint are impossible, such as ranks for another number of experts.
    """
    family = Family.of(config)
    moe = set(family.moe_layers)
    if not str(config["model_type"]).startswith(COMPRESSED):
        return [Format(family.num_experts) if i in moe else None for i in range(family.num_layers)]
    entries = config.get(LAYERS) or []
    if len(entries) != family.num_layers:
        raise ValueError(f"config.json has {len(entries)} entries in {LAYERS!r} for {family.num_layers} layers; write one for each")
    formats: list[Format | None] = []
    for layer, value in enumerate(entries):
        if bool(value) != (layer in moe) or not isinstance(value or {}, Mapping):
            kind = "experts" if layer in moe else "none"
            raise ValueError(f"config.json says {value} of layer {layer} in {LAYERS!r}, where the family has {kind}; correct it")
        formats.append(_checked(Format.from_json(value), family, layer) if value else None)
    return formats


NEEDS_MOEFLOW = {"AutoConfig": "the Python package moeflow (pip install moeflow)--moeflow.Config"}
"""The `auto_map` of a compressed checkpoint. Where moeflow is installed, its classes stand before what an `auto_map` names;
elsewhere transformers says that the checkpoint takes code from "the Python package moeflow (pip install moeflow)", which is no name
of a repository, so that nobody can put code there."""


def config_of(config: Config, formats: Sequence[Format | None], *, own: bool = False) -> Config:
    """The config.json of a checkpoint whose decoder layers have these formats; `config` is that of the model it was made of.

    If all layers have the same number of whole experts, it is the family's own, readable without moeflow. Otherwise, and where it
    is to be moeflow's `own` in any case, it is that of a compressed checkpoint, with the largest number of experts under the
    family's key. Raises ValueError if `formats` does not fit the family's layers.
    """
    family, plain = Family.of(config), family_config(config)
    names = [str(a).removeprefix(CLASSES) for a in config.get("architectures") or ()]
    counts = {f.experts for f in formats if f is not None and f.experts}
    if not counts:
        raise ValueError("no layer has experts left; at least one has to keep some")
    new = Family.of(plain).with_experts(max(counts)) | ({"architectures": names} if names else {})
    if new.get("auto_map") == NEEDS_MOEFLOW:  # it was moeflow's own, and may be so no longer
        del new["auto_map"]
    if own or len(counts) > 1 or any(f is not None and f.ours for f in formats):
        new |= {"model_type": COMPRESSED + family.arch.model_type, LAYERS: [{} if f is None else f.to_json() for f in formats]}
        new |= {"architectures": [CLASSES + a for a in names]} if names else {}
        new["auto_map"] = dict(NEEDS_MOEFLOW)  # the checkpoint's own classes cannot load it
    if [f is not None for f in formats] != [f is not None for f in layer_formats(new)]:
        raise ValueError(f"the formats of {len(formats)} layers do not fit those of the family's {family.num_layers}")
    return new


def _checked(format: Format, family: Family, layer: int) -> Format:
    gate, up, down = (format.ranks(m) for m in MATRICES)
    if not family.gated and not format.gate:
        gate = up
    if any(len(r) != format.experts or min(r, default=0) < 0 for r in (gate, up, down)):
        raise ValueError(f"config.json needs {format.experts} ranks (0: whole) of each matrix in layer {layer}; correct {LAYERS!r}")
    if odd := [e for e in range(format.experts) if (gate[e] == 0) != (up[e] == 0)]:
        raise ValueError(f"config.json factors only one of gate and up in expert {odd[0]} of layer {layer}; factor both or neither")
    if format.gone not in GONE or bool(format.gone) == bool(format.experts):
        raise ValueError(
            f"config.json says gone={format.gone!r} and {format.experts} experts of layer {layer}; a layer has experts, or says "
            f"what is gone: {', '.join(g for g in GONE if g)}"
        )
    for name, known in {"skip": SKIPS, "compressed": tuple(FORMS), "added": (LOW_RANK,)}.items():
        if getattr(format, name) not in ("", *known):
            raise ValueError(
                f"config.json says {name}={getattr(format, name)!r} of layer {layer}; known are {', '.join(known)}; correct it"
            )
    try:
        if not format.gone:
            family.check_router(format.experts, format.experts)
    except ValueError as error:
        raise ValueError(f"layer {layer} of config.json cannot have {format.experts} experts: {error}") from None
    main, reach = family.main_experts, family.experts_per_token(format.experts)
    if format.compressed and not 1 <= main < reach:
        raise ValueError(
            f"layer {layer} of config.json has Compressed Experts, and {MAIN}={main} of a token's {reach} experts are "
            f"computed; it must lie between 1 and {reach - 1}"
        )
    return format
