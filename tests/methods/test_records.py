"""What a step leaves for the next decision is read back as it was written, and can be read by a person."""

from pathlib import Path

import pytest

from moeflow.methods.records import (
    Candidates,
    Choice,
    Combination,
    Combinations,
    Curves,
    ExpertSet,
    Importance,
    KeptCounts,
    LayerLoss,
    Sets,
    Spread,
)
from moeflow.model.layout import Folder

ONE, OTHER = ExpertSet((0, 2), 1.5, 0.25), ExpertSet((1, 3), 2.0, 0.5)
CHOICE = Choice(3, 4, (0, 2), "enumerate", LayerLoss("frobenius", 1.5, 0.25, 128), OTHER, {"reap": ONE}, {"0,2": 1.5, "1,3": 2.0})
RECORDS = [
    CHOICE,
    Choice(3, 4, (0, 2), "reap", LayerLoss("batch-sum", 1.5, 0.25, 128), None, {"reap": ONE}),
    Candidates(3, 4, "swap", 128, 6.0, {2: Sets((ONE, OTHER), {"reap": ONE}), 3: Sets((), {})}),
    Combinations((1, 3), (Combination((0, 1), 0.5), Combination((1, 1), 0.75))),
    KeptCounts("paper", 6, {1: 2, 3: 4}, importance={1: 0.5, 3: 0.25}),
    KeptCounts("exact", 6, {1: 2, 3: 4}, cost=0.5, runner_up=Spread((4, 2), 0.75)),
    Importance(3, (0.0, 0.5), (7, 0)),
    Curves(60, 4.5, {1: {"2": 0.5}, 3: {"gate_up": 0.25}}, {1: {"2": 4.75}, 3: {"gate_up": 4.5}}),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: type(r).__name__)
def test_a_record_is_read_as_it_was_written(record: Choice, tmp_path: Path) -> None:
    record.write(tmp_path)
    text = (tmp_path / record.FILE).read_text()
    assert type(record).read(Folder(tmp_path)) == record
    assert text.endswith("}\n") and max(map(len, text.splitlines())) < 120


def test_a_choice_has_the_lines_that_it_always_had(tmp_path: Path) -> None:
    """Two choices are compared line by line."""
    CHOICE.write(tmp_path)
    assert (tmp_path / "choice.json").read_text().splitlines()[:11] == [
        "{",
        ' "layer": 3,',
        ' "experts": 4,',
        ' "keep": [0, 2],',
        ' "criterion": "enumerate",',
        ' "loss": {',
        '  "kind": "frobenius",',
        '  "value": 1.5,',
        '  "of_output": 0.25,',
        '  "tokens": 128',
        " },",
    ]
