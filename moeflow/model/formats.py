"""The format of one decoder layer: how many experts it has, the ranks of their matrices, whether tokens skip experts or have
Compressed Experts, and what of the MoE block is gone. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moeflow.arch import COMPRESSED, LAYERS, MAIN, MATRICES, Config, Family
from moeflow.model.packed import PACKED

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

    @property
    def low_rank(self) -> bool:
        return bool(self.gate)

    @property
    def own(self) -> bool:
        """Whether the layer needs `RoutedExperts`, because the family's own fused experts cannot compute it."""
        return bool(self.low_rank or self.skip or self.compressed)

    @property
    def whole(self) -> "Format":
        """The same with its matrices multiplied out."""
        return replace(self, gate=(), up=(), down=())

    def ranks(self, matrix: str) -> Ranks:
        """The rank of `matrix` ("gate", "up" or "down") in each expert; 0 if it is whole."""
        return getattr(self, matrix) or (0,) * self.experts

    def words(self) -> str:
        """The format in words, for a message."""
        low = [f"{m} of ranks {', '.join(map(str, self.ranks(m)))}" for m in MATRICES if self.low_rank]
        beside = [f"skipping by {self.skip}"] * bool(self.skip) + [f"Compressed Experts ({self.compressed})"] * bool(
            self.compressed
        )
        return GONE[self.gone] if self.gone else ", ".join([f"{self.experts} experts", *low, *beside])

    def to_json(self) -> dict[str, Any]:
        ranks = {m: list(self.ranks(m)) for m in MATRICES}
        beside = {name: value for name in ("skip", "compressed", "gone") if (value := getattr(self, name))}
        return {"experts": self.experts} | ({"ranks": ranks} if self.low_rank else {}) | beside

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Format":
        ranks = value.get("ranks", {})
        gate, up, down = (tuple(ranks.get(m, ())) for m in MATRICES)
        beside = (str(value.get(name, "")) for name in ("skip", "compressed", "gone"))
        return Format(int(value["experts"]), gate, up, down, *beside)


def format_of(shapes: Mapping[str, Sequence[int]], config: Config, layer: int) -> Format:
    """The format of a layer, from the names and shapes of its tensors.

    Raises ValueError if an expert lacks a matrix or a factor, or if two factors do not fit each other.
    """
    family = Family.of(config)
    stem = family.experts(layer)
    parts = {n.removeprefix(stem).split(".")[0] for n in shapes if n.startswith(stem)}
    numbers = sorted(int(n) for n in parts if n.isdigit())
    if numbers != list(range(len(numbers))):
        lacking = next(i for i, n in enumerate([*numbers, -1]) if i != n)
        raise ValueError(f"layer {layer} has no expert {lacking} but {len(numbers)} others; the checkpoint is incomplete")
    ranks: dict[str, list[int]] = {m: [] for m in MATRICES}
    for expert in numbers:
        for matrix, name in zip(MATRICES, family.expert(layer, expert), strict=True):
            ranks[matrix].append(_rank(shapes, name, family.factors(name)))
    beside: dict[str, Any] = {
        "skip": next((s for s in SKIPS if f"{stem}skip.{s}" in shapes), ""),
        "compressed": next((f for f, vectors in FORMS.items() if f"{stem}compressed.{vectors[0]}" in shapes), ""),
    }
    if any(any(r) for r in ranks.values()):
        beside |= {m: tuple(r) for m, r in ranks.items()}
    if not numbers and layer in family.moe_layers and family.router(layer) not in shapes:
        shared = family.shared(layer)
        alone = shared is not None and shared[0] in shapes
        beside["gone"] = "experts" if alone else "moe" if not any(n.startswith(family.norm(layer)) for n in shapes) else ""
    return Format(len(numbers), **beside)


def routing_shapes(family: Family, format: Format, layer: int, width: int, inner: int) -> dict[str, tuple[int, ...]]:
    """The names and shapes of what is stored beside a layer's experts: the threshold of skipping, vectors of Compressed Experts."""
    shapes: dict[str, tuple[int, ...]] = {f"{family.experts(layer)}skip.{format.skip}": ()} if format.skip else {}
    for vector in FORMS.get(format.compressed, ()):
        shapes[f"{family.experts(layer)}compressed.{vector}"] = (format.experts, inner if vector == "inner" else width)
    return shapes


def family_config(config: Config) -> Config:
    """The configuration of the family's own class for the configuration of a compressed checkpoint; any other unchanged."""
    plain = {k: v for k, v in config.items() if k != LAYERS}
    return plain | {"model_type": str(config["model_type"]).removeprefix(COMPRESSED)}


def _rank(shapes: Mapping[str, Sequence[int]], name: str, factors: tuple[str, str]) -> int:
    out, inner = factors
    if name in shapes or name + PACKED in shapes:
        return 0
    stored = {n: shapes[n + end] for n in factors for end in (PACKED, "") if n + end in shapes}
    if missing := [n for n in factors if n not in stored]:
        absent = name if len(missing) == 2 else missing[0]
        raise ValueError(f"the checkpoint has no tensor {absent}; it is incomplete, or of another family")
    rank = stored[inner][0]
    fits = len(stored[out]) == len(stored[inner]) == 2
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
    moe = family.moe_layers
    if not str(config["model_type"]).startswith(COMPRESSED):
        return [Format(family.num_experts) if i in moe else None for i in range(family.num_layers)]
    said = config.get(LAYERS) or []
    if len(said) != family.num_layers:
        raise ValueError(f"config.json has {len(said)} entries in {LAYERS!r} for {family.num_layers} layers; write one for each")
    main = family.main_experts
    formats: list[Format | None] = []
    for layer, value in enumerate(said):
        if bool(value) != (layer in moe) or not isinstance(value or {}, Mapping):
            kind = "experts" if layer in moe else "none"
            raise ValueError(f"config.json says {value} of layer {layer} in {LAYERS!r}, where the family has {kind}; correct it")
        formats.append(_checked(Format.from_json(value), layer) if value else None)
        if format := formats[-1]:
            try:
                if not format.gone:
                    family.check_router(format.experts, format.experts)
            except ValueError as error:
                raise ValueError(f"layer {layer} of config.json cannot have {format.experts} experts: {error}") from None
            reach = family.experts_per_token(format.experts)
            if format.compressed and not 1 <= main < reach:
                raise ValueError(
                    f"layer {layer} of config.json has Compressed Experts, and {MAIN}={main} of a token's {reach} experts are "
                    f"computed; it must lie between 1 and {reach - 1}"
                )
    return formats


def config_of(config: Config, formats: Sequence[Format | None]) -> Config:
    """The config.json of a checkpoint whose decoder layers have these formats; `config` is that of the model it was made of.

    If all layers have the same number of whole experts, it is the family's own, readable without moeflow. Otherwise it is that of a
    compressed checkpoint, with the largest number of experts under the family's key. Raises ValueError if `formats` does not fit
    the family's layers.
    """
    family, plain = Family.of(config), family_config(config)
    names = [str(a).removeprefix(CLASSES) for a in config.get("architectures") or ()]
    counts = {f.experts for f in formats if f is not None and f.experts}
    if not counts:
        raise ValueError("no layer has experts left; at least one has to keep some")
    new = Family.of(plain).with_experts(max(counts)) | ({"architectures": names} if names else {})
    if len(counts) > 1 or any(f is not None and (f.own or f.gone) for f in formats):
        new |= {"model_type": COMPRESSED + family.arch.model_type, LAYERS: [{} if f is None else f.to_json() for f in formats]}
        new |= {"architectures": [CLASSES + a for a in names]} if names else {}
    if [f is not None for f in formats] != [f is not None for f in layer_formats(new)]:
        raise ValueError(f"the formats of {len(formats)} layers do not fit those of the family's {family.num_layers}")
    return new


def _checked(format: Format, layer: int) -> Format:
    gate, up, down = (format.ranks(m) for m in MATRICES)
    if any(len(r) != format.experts or min(r, default=0) < 0 for r in (gate, up, down)):
        raise ValueError(f"config.json needs {format.experts} ranks (0: whole) of each matrix in layer {layer}; correct {LAYERS!r}")
    if odd := [e for e in range(format.experts) if (gate[e] == 0) != (up[e] == 0)]:
        raise ValueError(f"config.json factors only one of gate and up in expert {odd[0]} of layer {layer}; factor both or neither")
    if format.gone not in GONE or bool(format.gone) == bool(format.experts):
        raise ValueError(
            f"config.json says gone={format.gone!r} and {format.experts} experts of layer {layer}; a layer has experts, or says "
            f"what is gone: {', '.join(g for g in GONE if g)}"
        )
    if format.skip not in ("", *SKIPS) or format.compressed not in ("", *FORMS):
        raise ValueError(
            f"config.json says skip={format.skip!r} and compressed={format.compressed!r} of layer {layer}; known are "
            f"{', '.join(SKIPS)}, and {', '.join(FORMS)}"
        )
    return format
