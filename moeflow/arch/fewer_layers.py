"""The config.json of a model with fewer decoder layers, if it can be told before it is known which ones go. No torch."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from moeflow.arch.family import Family
from moeflow.arch.spec import ARCH, Config

NUMBERS = ("_layers", "_idxs", "_layer_ids")
"""Endings of the names of lists of layers' numbers."""
EVERY = re.compile(r"(_interval|_period|_step|_freq|_pattern)$")
"""Endings of the names of numbers that say how often a kind of layer comes."""
INSTEAD = "drop MoE blocks (Layer Drop) instead"


def with_fewer_layers(family: Family, drop: int, *, together: bool) -> Config:
    """The configuration of the same model with `drop` decoder layers fewer, neighbours if they go `together`.

    Layers before the first with experts stay. Raises ValueError if it would depend on which of the others are dropped: a layer
    moves up into the place of another, which has to be of the same kind.
    """
    config, count, moe = family.config, family.num_layers, family.moe_layers
    first, step = moe[0], drop if together else 1
    if config.get("use_sliding_window") and 0 < int(config.get("max_window_layers") or 0) < count:
        raise ValueError(
            f"max_window_layers={config['max_window_layers']}: attention differs by layer; a layer cannot take another's place"
        )

    def left(kinds: Sequence[Any], what: str) -> list[Any]:
        if any(kinds[i] != kinds[i + step] for i in range(first, count - step)):
            raise ValueError(f"{what}: a layer cannot take another's place; {_way(kinds[first:])}")
        return [*kinds[:first], *kinds[first + drop :]]

    shorter = config | {"num_hidden_layers": count - drop}
    for name, value in config.items():
        if name.endswith(NUMBERS) and isinstance(value, list) and _are_numbers(value, count):
            kinds = left([i in value for i in range(count)], f"{name} differs by layer")
            shorter[name] = [i for i, is_so in enumerate(kinds) if is_so]
        elif isinstance(value, list) and len(value) == count:
            shorter[name] = left(value, f"{name} differs by layer")
        elif isinstance(value, str) and len(value) == count and name.endswith("_pattern"):
            shorter[name] = "".join(left(value, f"{name} differs by layer"))
        elif type(value) is int and value > 1 and EVERY.search(name) and step % value:
            raise ValueError(f"{name}={value} differs by layer: a layer cannot take another's place; {_together(value)}")
        elif isinstance(value, dict) and (inner := [k for k, v in value.items() if k.endswith(NUMBERS) and isinstance(v, list)]):
            raise ValueError(f"{name}.{inner[0]} names layers by number: another layer cannot take their place; {INSTEAD}")
    dense = [i for i in range(first, count) if i not in moe]
    has = left([i in moe for i in range(count)], f"layers {dense[:8]} have no experts, and config.json tells them by number")
    stay = tuple(i for i, is_so in enumerate(has) if is_so)
    if family.arch.moe is not None:
        return shorter | {ARCH: replace(family.arch, moe=stay).to_json()}
    if tuple(Family(family.arch, shorter).moe_layers) != stay:
        raise ValueError(f"config.json says by number which layers have experts: another layer cannot take their place; {INSTEAD}")
    return shorter


def _are_numbers(value: list[Any], count: int) -> bool:
    """Whether these are numbers of layers, ascending, not one entry for each layer."""
    return all(type(v) is int for v in value) and value == sorted({*value}) and all(0 <= v < count for v in value)


def _way(kinds: Sequence[Any]) -> str:
    """What to do where layers of these kinds follow each other."""
    periods = [p for p in range(2, len(kinds) // 2 + 1) if all(kinds[i] == kinds[i + p] for i in range(len(kinds) - p))]
    return _together(periods[0]) if periods else INSTEAD


def _together(period: int) -> str:
    return f"drop a multiple of {period} neighbours (rule='consecutive'), or {INSTEAD.removesuffix(' instead')}"
