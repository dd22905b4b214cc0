"""Figures: the rows of a version's reports as typed values, with intervals."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeflow.report.figures import Figure, bootstrap, figures_of, read_figures
from moeflow.run import in_process
from moeflow.store import Store
from tests.report.reporting import reported

KL = {
    "name": "KL to the original (prose)",
    "original": 0.0,
    "compressed": 0.02,
    "unit": "nats/token",
    "figure": "kl",
    "text": "prose",
}


def quality(row: dict[str, Any], **facts: Any) -> Figure:
    (made,) = figures_of({"kind": "quality", "columns": ["original", "compressed"], "rows": [row], "text": "prose", **facts})
    return made


def test_the_figures_of_a_version_are_its_rows_with_their_fields(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path / "store"))
    task = {
        "name": "gsm8k", "original": 0.5, "compressed": 0.45, "unit": "", "figure": "gsm8k", "better": "higher", "items": 200,
        "interval": [0.38, 0.52], "change_interval": [-0.1, 0.01], "chance": 0.0, "wins": 4, "losses": 14,
    }  # fmt: skip
    step = reported(
        report={"kind": "tasks", "rows": [task, {"name": "other", "original": None, "compressed": "words"}], "notes": ["n"]}
    )
    in_process.run([step], store)
    first, second = read_figures(store, [step.key])
    assert (first.word, first.interval, first.change_interval, first.chance) == ("gsm8k", (0.38, 0.52), (-0.1, 0.01), 0.0)
    assert (first.items, first.wins, first.losses, first.notes, first.report) == (200, 4, 14, ("n",), step.key)
    assert first.change == pytest.approx(-0.05)
    assert (second.figure, second.original, second.compressed, second.change) == ("", None, None, None)


def test_the_interval_of_a_divergence_comes_from_its_sequences() -> None:
    values = np.random.default_rng(1).gamma(2.0, 0.01, 64)
    figure = quality(KL, divergence_of_sequences=[*values])
    assert figure.word == "kl[prose]" and figure.items == 64 and figure.interval is not None
    low, high = figure.interval
    error = values.std(ddof=1) / math.sqrt(64)  # 1.96 of them on each side, where means are normal
    assert low < values.mean() < high and high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert figure.interval == quality(KL, divergence_of_sequences=[*values]).interval


def test_a_change_of_the_loss_is_paired_by_sequence() -> None:
    """Sequences differ more than the models do: unpaired, a change of this size would not be seen."""
    before = np.random.default_rng(1).normal(3.0, 1.0, 64)
    after = before + 0.01
    row = {"name": "loss (prose)", "original": before.mean(), "compressed": after.mean(), "unit": "", "text": "prose"}
    loss = quality(row | {"figure": "loss"}, losses_of_sequences=[[*before], [*after]])
    assert loss.change_interval == pytest.approx((0.01, 0.01)) and loss.interval and loss.interval[1] - loss.interval[0] > 0.3
    perplexity = quality(row | {"figure": "perplexity"}, losses_of_sequences=[[*before], [*after]])
    assert perplexity.change_interval and perplexity.change_interval[0] > 0


def test_one_sequence_and_broken_values_have_no_interval() -> None:
    assert bootstrap([0.1]) is None and bootstrap([]) is None
    assert bootstrap([0.1, math.nan]) is None and bootstrap([0.1, math.inf]) is None
    assert quality(KL).interval is None
