"""The experts that go together where a router has groups, whose sizes must stay equal. No torch."""

from collections.abc import Sequence


def sets(values: Sequence[float], groups: int) -> list[tuple[float, list[int]]]:
    """The sets of experts that go together, one from each group, as (mean score, indices), lowest first; in a tie, the expert with
    the higher index goes first."""
    size = len(values) // groups
    ranked = [sorted(range(g * size, (g + 1) * size), key=lambda e: (values[e], -e)) for g in range(groups)]
    return [(sum(values[e] for e in experts) / groups, list(experts)) for experts in zip(*ranked, strict=True)]
