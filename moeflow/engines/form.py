"""The form of a whole model, as far as an engine asks: what its layers are, alike or not, and why an engine does not run it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from moeflow.engines.otherwise import in_engines
from moeflow.engines.table import ENGINES, Engine, engine_of

OWN = "moeflow_"
"""The beginning of the model type of a checkpoint in moeflow's own format."""
CLASSES = "Moeflow"
"""The beginning of its architecture's name."""
LAYERS = "moeflow_layers"
"""The key of config.json for the formats of layers that differ."""
COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""The keys of config.json for the number of routed experts."""
PACKED = "compressed-tensors"
"""The quant_method of experts that moeflow packs."""


@dataclass(frozen=True, order=True)
class Packing:
    """How the experts of a layer are packed."""

    bits: int
    """0: not at all."""
    group: int = 0
    """Weights that share a scale; 0: a whole row."""
    symmetric: bool = True

    @property
    def words(self) -> str:
        if not self.bits:
            return "whole"
        return f"{self.bits} bits with {_shared(self.group)}" + ", with zero points" * (not self.symmetric)


WHOLE = Packing(0)


@dataclass(frozen=True)
class Form:
    """What of a model an engine has to know, besides its family."""

    model_type: str
    """The family's, without what moeflow's own format puts before it."""
    counts: frozenset[int] = frozenset()
    """The numbers of experts of its layers; where a run decides them, the most and the least."""
    width: int | None = None
    """The inner units of an expert; None where it is not known."""
    ranks: bool = False
    """Matrices of experts are, or may become, products of two, or have one added to them."""
    gone: bool = False
    """Layers lack, or may lose, their MoE block."""
    routing: str = ""
    """What of skipping and Compressed Experts it has, in words."""
    packings: frozenset[Packing] = frozenset({WHOLE})
    """How its layers' experts are packed; several where layers differ."""
    differ: str = ""
    """What a run decides for each layer by itself, in words: counts, or bits."""
    otherwise: tuple[tuple[str, str], ...] = ()
    """The engines whose classes of the family compute something else, each with what that is, in words."""
    own: bool = False
    """It is in moeflow's own format, whatever its layers are: its family has stacks of experts alone, and these are in none."""

    def why_not(self, engine: Engine) -> list[str]:
        """Why the engine does not run it, a phrase for each reason; empty if it does."""
        why = []
        if not engine.counts and (len(self.counts) > 1 or "counts" in self.differ):
            counts = "as many experts as a run decides" if "counts" in self.differ else f"{_listed(self.counts)} experts"
            why.append(f"layers have {counts}, and {engine.word} has one number for all of them")
        of_family = replace(engine, model_type=self.model_type)
        why += [w for n in sorted(self.counts) if (w := of_family.why_not_count(n))][:1]
        if self.gone and not engine.gone:
            why.append(f"layers have no MoE block, which {engine.word} cannot leave out")
        if self.routing and not engine.routing:
            why.append(f"{engine.word} has no {self.routing}")
        if self.ranks and not engine.ranks:
            why.append(f"experts are low-rank, for which {engine.word} has no kernel")
        why += [f"{name} computes a {self.model_type} otherwise: {words}" for name, words in self.otherwise if name == engine.name]
        if self.own and not engine.counts:
            why.append(
                f"a {self.model_type} has its experts in stacks, as which these cannot be written, and {engine.word} does not load "
                "moeflow's own format"
            )
        return why + self._why_not_packed(engine) + [w for w in [self._why_not_width(engine)] if w]

    def check(self, word: str) -> None:
        """Raise ValueError if the engine of this word does not run it, with those that do."""
        if why := self.why_not(engine_of(word)):
            raise ValueError(f"--engine {word}: {'; '.join(why)}; ask for another form, or for --engine {self.runs_in()}")

    @property
    def dense(self) -> "Form":
        """The same when its low-rank matrices are multiplied out, which unpacks them, too."""
        return replace(self, ranks=False, packings=frozenset({WHOLE})) if self.ranks else self

    def runs_in(self) -> str:
        """The engines that run it, in words."""
        return " or ".join(name for name, engine in ENGINES.items() if not self.why_not(engine)) or "that is none of these"

    def _why_not_packed(self, engine: Engine) -> list[str]:
        packed = sorted(self.packings - {WHOLE})
        if not engine.mixed and (len(self.packings) > 1 or "bits" in self.differ):
            return [f"layers differ in how their experts are packed ({_listed(p.words for p in sorted(self.packings))})"]
        for packing in packed:
            if packing.bits not in engine.bits:
                known = f"; it runs {_listed(engine.bits)}" if engine.bits else ""
                return [f"experts are packed in {packing.bits} bits, which {engine.word} does not run{known}"]
            if engine.groups is not None and packing.group not in engine.groups:
                return [f"experts are packed with {_shared(packing.group)}, and {engine.word} reads {_reads(engine.groups)}"]
            if not packing.symmetric and packing.bits not in engine.zeros:
                known = f" at {packing.bits} bits, only at {_listed(engine.zeros)}" if engine.zeros else ""
                return [f"{engine.word} reads no zero points of packed experts{known}"]
        return []

    def _why_not_width(self, engine: Engine) -> str:
        return next((w for p in sorted(self.packings) if (w := engine.why_not_width(self.width, p.group * bool(p.bits)))), "")


def form_of(config: Mapping[str, Any]) -> Form:
    """The form of a checkpoint by its config.json, in moeflow's own format or its family's."""
    inside = config.get("text_config")
    text = inside if isinstance(inside, Mapping) else config
    formats = [f for f in text.get(LAYERS) or config.get(LAYERS) or () if isinstance(f, Mapping) and f]
    counts = {int(f.get("experts") or 0) for f in formats} - {0}
    if not formats:
        counts = {next((int(text[key]) for key in COUNTS if isinstance(text.get(key), int)), 0)} - {0}
    words = ["skipping of experts"] * any(f.get("skip") for f in formats)
    words += ["Compressed Experts"] * any(f.get("compressed") for f in formats)
    width = next((text[k] for k in ("moe_intermediate_size", "intermediate_size") if isinstance(text.get(k), int)), None)
    low_rank = any(f.get("ranks") or f.get("added") for f in formats)
    return Form(
        str(config.get("model_type", "")).removeprefix(OWN), frozenset(counts), width, low_rank,
        any(f.get("gone") for f in formats), " and no ".join(words), _packings(config, text), otherwise=in_engines(text),
        own=_own(config, formats, counts),
    )  # fmt: skip


def _own(config: Mapping[str, Any], formats: list[Mapping[str, Any]], counts: set[int]) -> bool:
    """Whether it is in moeflow's own format although nothing of its layers asks for it, nor zero points, with which engines that
    read them are given the family's."""
    if not formats or not str(config.get("model_type", "")).startswith(OWN) or len(counts) > 1:
        return False
    asks = any(f.get(key) for f in formats for key in ("ranks", "added", "gone", "skip", "compressed"))
    return not asks and all(p.symmetric for p in _packings(config, config))


def _packings(config: Mapping[str, Any], text: Mapping[str, Any]) -> frozenset[Packing]:
    """How experts are packed, by the `quantization_config`. What moeflow did not pack, such as FP8, counts as whole."""
    said = config.get("quantization_config") or text.get("quantization_config") or {}
    if said.get("quant_method") != PACKED:
        return frozenset({WHOLE})
    groups = [g.get("weights") or {} for g in (said.get("config_groups") or {}).values()]
    return frozenset(
        Packing(int(w.get("num_bits") or 0), int(w.get("group_size") or 0), w.get("symmetric") is not False) for w in groups
    ) or frozenset({WHOLE})


def _listed(values: Any) -> str:
    words = [str(v) for v in (sorted(values) if isinstance(values, frozenset) else values)]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _shared(group: int) -> str:
    return f"a scale for {group} weights" if group else "one scale a row"


def _reads(groups: tuple[int, ...]) -> str:
    several = _listed([g for g in groups if g])
    return f"scales for {several} weights" + " or one a row" * (0 in groups)
