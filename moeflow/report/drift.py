"""How far a new version has moved from another one: which choices changed layer by layer, budgets, and figures beside figures."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moeflow.report.figures import Figure
from moeflow.run.words import size
from moeflow.store import Store
from moeflow.store.versions import Version

HISTORY = "moeflow.json"
"""The file of a checkpoint that says what was decided, and what was done to each layer."""
SHOWN = 12  # layers that are told one by one


@dataclass(frozen=True)
class LayerDrift:
    """One layer of two versions. What was not decided in both is None."""

    layer: int
    kept: tuple[int, int] | None = None
    """How many experts stay, before and now."""
    overlap: float | None = None
    """Of the experts that stay in either, the part that stays in both (Jaccard)."""
    alternative: tuple[str, str] | None = None
    """What a fit chose for the layer, before and now."""

    @property
    def changed(self) -> bool:
        differs = self.alternative is not None and self.alternative[0] != self.alternative[1]
        return (
            differs or (self.overlap is not None and self.overlap < 1) or (self.kept is not None and self.kept[0] != self.kept[1])
        )


@dataclass(frozen=True)
class Drift:
    """A new version beside the one that is promoted."""

    before: str
    now: str
    layers: tuple[LayerDrift, ...]
    figures: tuple[dict[str, Any], ...]
    """Of each figure that a gate can name: figure, unit, original, compressed, interval, and promoted: its value before."""

    @property
    def overlap(self) -> float | None:
        """The mean overlap over layers; None if no layer's experts were chosen in both."""
        known = [one.overlap for one in self.layers if one.overlap is not None]
        return sum(known) / len(known) if known else None


def drift_of(
    store: Store, before: Version | None, now: Version, figures: Iterable[Figure], promoted: Iterable[Figure] | None
) -> Drift:
    """Compare a new version with the promoted one, None if there is none. Raises NotStored."""
    old = _decided(store, before.key) if before else {}
    new = _decided(store, now.key)
    layers = tuple(_layer(i, old[i], new[i]) for i in sorted(old.keys() & new.keys()))
    return Drift(before.ref if before else "", now.ref, layers, figure_rows(figures, promoted))


def figure_rows(figures: Iterable[Figure], promoted: Iterable[Figure] | None) -> tuple[dict[str, Any], ...]:
    """The figures that a gate can name, each with its value in the promoted version, None where there is none."""
    before = {f.word: f.compressed for f in promoted or () if f.figure}
    return tuple(
        {
            "figure": f.word, "unit": f.unit, "original": f.original, "compressed": f.compressed,
            "interval": None if f.interval is None else list(f.interval), "promoted": before.get(f.word),
        }
        for f in figures if f.figure
    )  # fmt: skip


def drift_lines(drift: Drift) -> list[str]:
    """The drift in words, a fact a line."""
    if not drift.before:
        return [f"{drift.now} is the first: nothing was promoted to compare it with"]
    changed = [one for one in drift.layers if one.changed]
    lines = [f"{drift.now} beside {drift.before}, which is promoted:"]
    if drift.layers:
        shared = "" if drift.overlap is None else f"; {drift.overlap:.0%} of the kept experts are the same"
        lines.append(f"choices: {len(changed)} of {len(drift.layers)} layers changed{shared}")
        lines += [f"  layer {one.layer}: {_told(one)}" for one in changed[:SHOWN]]
        lines += [f"  and {len(changed) - SHOWN} more layers"] if len(changed) > SHOWN else []
    for row in drift.figures:
        if row["promoted"] is not None and row["compressed"] is not None:
            lines.append(f"{row['figure']}: {_shown(row['promoted'], row['unit'])} -> {_shown(row['compressed'], row['unit'])}")
    return lines


def _told(one: LayerDrift) -> str:
    parts = [f"{one.alternative[0]} -> {one.alternative[1]}"] if one.alternative else []
    if one.kept is not None:
        parts.append(f"{one.kept[0]} -> {one.kept[1]} experts")
    if one.overlap is not None:
        parts.append(f"{one.overlap:.0%} of them the same")
    return ", ".join(parts)


def _shown(value: float, unit: str) -> str:
    return size(value) if unit == "B" else f"{value:.4g}"


def _layer(layer: int, old: Mapping[str, Any], new: Mapping[str, Any]) -> LayerDrift:
    kept = overlap = alternative = None
    if "keep" in old and "keep" in new:
        before, now = {*old["keep"]}, {*new["keep"]}
        kept = (len(before), len(now))
        overlap = len(before & now) / len(before | now) if before | now else 1.0
    if "alternative" in old and "alternative" in new:
        alternative = (str(old["alternative"]), str(new["alternative"]))
    return LayerDrift(layer, kept, overlap, alternative)


def _decided(store: Store, key: str) -> dict[int, dict[str, Any]]:
    """What a checkpoint's history says was chosen, by layer: the experts that stay, a fit's alternative; {} without one."""
    artifact = store.artifact(key)
    if HISTORY not in artifact.names():
        return {}
    decided: dict[int, dict[str, Any]] = {}
    for choice in json.loads(artifact.file(HISTORY).read_text()).get("choices", ()):
        keep, chosen = choice.get("keep"), choice.get("chosen")
        if isinstance(keep, list) and "layer" in choice:
            decided.setdefault(int(choice["layer"]), {})["keep"] = keep
        elif isinstance(keep, dict):  # of several layers
            for layer, kept in keep.items():
                if isinstance(kept, list):
                    decided.setdefault(int(layer), {})["keep"] = kept
        if isinstance(chosen, dict):
            for layer, alternative in chosen.items():
                decided.setdefault(int(layer), {})["alternative"] = alternative
    return decided
