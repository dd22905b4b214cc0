"""What was chosen beside what was not: the next best, and whether the calibration can tell them apart."""

from itertools import product

import numpy as np
import pytest

from moeflow.engines import ENGINES
from moeflow.methods.fit.choosing import Option, choose, lead, next_best
from moeflow.methods.fit.options import Alternative

MOEFLOW = ENGINES["moeflow"]


@pytest.mark.parametrize("seed", range(20))
def test_the_next_best_is_the_second_of_all_combinations_that_fit(seed: int) -> None:
    draw = np.random.default_rng(seed)
    kinds = [Alternative(8), Alternative(6), Alternative(4), Alternative(8, 0.3)]
    offered = {layer: {a.name: Option(a, float(draw.integers(1, 20)), float(draw.random())) for a in kinds} for layer in range(3)}
    room = float(draw.integers(12, 60))
    every = sorted(
        (sum(o.cost for o in picked), tuple(o.what.name for o in picked))
        for picked in product(*(options.values() for options in offered.values()))
        if sum(o.size for o in picked) <= room
    )
    if not every:
        pytest.skip("nothing fits")
    chosen = choose(offered, MOEFLOW, room)
    assert tuple(chosen.values()) == every[0][1]
    other = next_best(offered, MOEFLOW, room, chosen)
    assert (None if other is None else tuple(other.values())) == (every[1][1] if len(every) > 1 else None)


def test_a_calibration_too_small_to_tell_says_how_many_tokens_would() -> None:
    ours, theirs = [0.10, 0.20, 0.30, 0.20], [0.16, 0.19, 0.37, 0.20]
    ahead = lead(ours, theirs, tokens=1000)
    differences = np.subtract(theirs, ours)
    assert ahead.mean == pytest.approx(differences.mean())
    assert ahead.noise == pytest.approx(1.96 * differences.std(ddof=1) / 2)
    asks = round(1000 * (ahead.noise / ahead.mean) ** 2)
    assert asks > 1000 and f"1,000 tokens are too few to tell them apart, about {asks:,} would tell" in ahead.words
    assert not lead(ours, np.add(ours, 0.1).tolist(), tokens=1000).words
    assert "and there is little to tell" in lead(theirs, ours, tokens=1000).words
