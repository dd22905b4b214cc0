"""Experts that too few calibration tokens reach: one rule for every method that uses an expert's tokens. No torch."""

from collections.abc import Sequence
from typing import Literal

Rare = Literal["weights", "keep"]
"""The fallback for such an expert: "weights" treats it by its weights alone, "keep" leaves it whole."""


def check_least(least: int) -> None:
    """Raise ValueError if `least` is below 1 token."""
    if least < 1:
        raise ValueError(f"least={least} tokens must be at least 1: an expert that no token reaches has no statistics")


def treatments(tokens: Sequence[int], least: int, rare: str, *, method: str, by_weights: str) -> list[str]:
    """How each expert is treated: by `method` if at least `least` tokens reach it.

    Any other expert is treated by `by_weights` or, if `rare` is "keep", is left whole ("keep").
    """
    fallback = "keep" if rare == "keep" else by_weights
    return [method if number >= least else fallback for number in tokens]
