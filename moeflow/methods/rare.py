"""Experts that too few calibration tokens reach: one rule for every method that goes by an expert's tokens. No torch."""

from collections.abc import Sequence
from typing import Literal

Rare = Literal["weights", "keep"]
"""The fallback for such an expert: "weights" treats it by its weights alone, "keep" leaves it whole."""


def check_least(least: int) -> None:
    """Raise ValueError where no number of tokens is that small."""
    if least < 1:
        raise ValueError(f"least={least} tokens must be at least 1: an expert that no token reaches has no statistics")


def enough(tokens: int, least: int) -> bool:
    """Whether so many tokens are enough to go by."""
    return tokens >= least


def treatments(tokens: Sequence[int], least: int, rare: str, *, method: str, by_weights: str) -> list[str]:
    """How each expert is treated, by the number of tokens that reach it: by `method` if these are at least `least`.

    Any other expert is treated by `by_weights`, or is left whole ("keep") if `rare` says so.
    """
    fallback = "keep" if rare == "keep" else by_weights
    return [method if enough(number, least) else fallback for number in tokens]
