"""What a model may become, and how much of it may stay. No torch."""

import re
from dataclasses import dataclass
from math import inf
from typing import Annotated, Literal

from moeflow.engines import ENGINES, Engine, engine_of
from moeflow.options import check_at_least, check_choices

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    f"{prefix}iB": 1 << (10 * n) for n, prefix in enumerate("KMGT", 1)
}


@dataclass(frozen=True)
class Budget:
    """How large the result may be; exactly one field is given. Raises ValueError otherwise, and for what is no size."""

    bytes: str = ""
    """Of all weights on disk: 24GB, 22.5GiB."""
    ratio: float = 0.0
    """The part of the bytes of all weights that goes."""
    resident: str = ""
    """Of all weights in the engine's memory: 24GB."""
    speed: float = 0.0
    """How many times fewer multiplications with weights a token takes: 1.5."""

    def __post_init__(self) -> None:
        given = [name for name in ("bytes", "ratio", "resident", "speed") if getattr(self, name)]
        if len(given) != 1:
            found = " and ".join(given) or "none, or 0"
            raise ValueError(f"give one budget: bytes=24GB, ratio=0.25, resident=24GB or speed=1.5; given are {found}")
        if self.ratio and not 0 < self.ratio < 1:
            raise ValueError(f"ratio={self.ratio:g} of the bytes is to go: it must lie between 0 and 1")
        if self.speed and not 1 < self.speed < inf:
            raise ValueError(f"speed={self.speed:g}: give how many times fewer operations a token may take, a number above 1")
        size_of(self.bytes or self.resident or "1")

    @property
    def unit(self) -> str:
        """What is counted: "bytes" on disk, "resident" bytes, or "operations" of a token."""
        return "resident" if self.resident else "operations" if self.speed else "bytes"

    def most(self, whole: int) -> int:
        """How much may stay of a `whole` model, in the budget's unit."""
        if self.ratio:
            return int(whole * (1 - self.ratio))
        return int(whole / self.speed) if self.speed else size_of(self.bytes or self.resident)

    def meant(self, least: int, whole: int) -> str:
        """The question whether a unit was left out, for a bare number that is a size between these with one; "" for others."""
        word = self.bytes.strip()
        near = [f"{word}{u}" for u in ("KiB", "MiB", "GiB", "TiB") if word.isdigit() and least <= int(word) * UNITS[u] < whole]
        return f"did you mean {near[0]}?" if near else ""


def size_of(word: str) -> int:
    """The bytes that a word like 24GB or 22.5GiB says. Raises ValueError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", word.strip())
    units = {name.lower(): size for name, size in UNITS.items()}
    if match is None or match[2].lower() not in units or float(match[1]) * units[match[2].lower()] < 1:
        raise ValueError(f"{word!r} is no size; write it like 24GB or 22.5GiB")
    return int(float(match[1]) * units[match[2].lower()])


@dataclass(frozen=True)
class Offers:
    """The alternatives that every layer is offered, and how they are made and measured. Raises ValueError for invalid options."""

    engine: Annotated[str, ENGINES] = "moeflow"
    """What is to load the result: transformers alone or with moeflow's classes, vLLM alone or with its plug-in, and so on."""
    counts: tuple[float, ...] = (0.875, 0.75, 0.625, 0.5)
    """Parts of a layer's experts that may stay."""
    ranks: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    """Parts of the parameters of a layer's experts that lower ranks may take away."""
    bits: tuple[int, ...] = (8, 4, 3, 2)
    """Bits to which a layer's experts may be quantized by GPTQ, alone and with fewer experts or lower ranks."""
    group: int = 32
    """Weights that share a scale, 0: a whole row; ranks that are quantized are multiples of it. Where it does not divide what the
    experts' matrices take in, a smaller number is taken, or a whole row, as the engine reads."""
    wide: tuple[int, ...] = (3, 2)
    """Bits at which whole matrices are offered with scales for twice as many weights, too: the fewer bits, the more of the bytes
    are scales."""
    gone: bool = True
    """Whether a layer may lose its MoE block."""
    grid: Literal["pairs", "all"] = "pairs"
    """pairs: fewer experts and lower ranks are offered apart, each with and without fewer bits. all: also together, which is about
    two and a half times as many alternatives, and as much more time."""
    search: Literal["enumerate", "genetic", "swap"] = "swap"
    """The search for the experts that stay."""
    measured: int = 16_384
    """Roughly how many calibration tokens run through the whole model for each alternative."""
    rounds: int = 2
    """1: alternatives are measured around the original; 2: again around the first choice, since costs do not simply add up, or,
    where the engine runs layers of one kind only, the most promising models whole."""
    tp: int = 1
    """The engine's tensor-parallel size, which has to divide experts and leave whole groups."""
    ep: int = 1
    """The engine's expert-parallel size, which has to divide the number of experts."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(self, group=0, measured=1, rounds=1, tp=1, ep=1)
        if self.rounds > 2:
            raise ValueError(f"rounds={self.rounds}: give 1 or 2")
        for name in ("counts", "ranks"):
            if odd := [part for part in getattr(self, name) if not 0 < part < 1]:
                raise ValueError(f"{name} has {odd[0]}: every part must lie between 0 and 1")
        for name in ("bits", "wide"):
            known = ENGINES["moeflow"].bits
            if none := [b for b in getattr(self, name) if b not in known]:
                raise ValueError(f"{name} has {none[0]}: weights are packed in {', '.join(map(str, known))} bits")
        groups = self.runs.groups
        if self.packs and groups and self.group not in groups:
            raise ValueError(
                f"group={self.group}: {self.engine} has kernels for groups of {', '.join(str(g) for g in groups if g)} "
                f"({self.runs.sources['groups']}); take one of them"
            )

    @property
    def runs(self) -> Engine:
        return engine_of(self.engine, tp=self.tp, ep=self.ep)

    def groups(self, bits: int) -> tuple[int, ...]:
        """How many weights of a whole matrix may share a scale at these bits, by the options and the engine."""
        known, twice = self.runs.groups, 2 * self.group
        return (self.group, twice) if twice and bits in self.wide and (known is None or twice in known) else (self.group,)

    @property
    def packs(self) -> tuple[int, ...]:
        """The bits on offer that the engine runs."""
        return tuple(b for b in self.bits if b in self.runs.bits)


@dataclass(frozen=True)
class Alternative:
    """What one layer may become."""

    keep: int
    """The experts that stay; 0: the MoE block is gone."""
    ratio: float = 0.0
    """The part of the parameters of those that stay which lower ranks take away."""
    bits: int = 0
    """The bits of their weights; 0: as they are."""
    group: int = 0
    """How many of these share a scale, if it is not the number that is offered for all bits; 0: that number."""

    @property
    def name(self) -> str:
        parts = [f"{self.keep} experts"] + [f"{self.ratio:g} off"] * bool(self.ratio) + [f"{self.bits} bits"] * bool(self.bits)
        return ", ".join([*parts, *[f"groups of {self.group}"] * bool(self.group)]) if self.keep else "gone"

    @property
    def packing(self) -> tuple[int, int]:
        """How its experts are packed: what all layers share where an engine has one way for all."""
        return self.bits, self.group
