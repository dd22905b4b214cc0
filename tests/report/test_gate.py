"""The gate: which bounds hold, which fail, which cannot be decided, and what is refused before anything is measured."""

import math
from pathlib import Path
from typing import Any

import pytest

from moeflow.report.figures import Figure
from moeflow.report.gate import bound, check_measured, judge, passed, read_gate, refusal
from moeflow.step import Context, Spec, Step, step


def figure(name: str, original: float | None, compressed: float | None, **about: Any) -> Figure:
    return Figure(name, name, "quality", about.pop("unit", ""), original, compressed, **about)


def said(word: str, *figures: Figure, promoted: list[Figure] | None = None) -> str:
    (decision,) = judge([bound(word)], figures, promoted)
    return decision.state


def why(word: str, *figures: Figure, promoted: list[Figure] | None = None) -> str:
    return refusal(judge([bound(word)], figures, promoted))


@pytest.mark.parametrize(
    ("word", "state"),
    [
        ("kl<0.02", "holds"),
        ("kl < 0.01", "fails"),
        ("kl<=1e-2", "holds"),
        ("kl>0.01", "fails"),
        ("kl>=.01", "holds"),
        ("kl<1%", "fails"),
        ("kl<=1%", "holds"),
    ],
)
def test_an_absolute_bound_is_compared_with_the_value(word: str, state: str) -> None:
    assert said(word, figure("kl", 0.0, 0.01)) == state


@pytest.mark.parametrize(("word", "state"), [("bytes<=24GB", "holds"), ("bytes<=22GiB", "fails"), ("bytes<=0.5x", "holds")])
def test_sizes_are_written_in_their_units(word: str, state: str) -> None:
    assert said(word, figure("bytes", 48 * 10**9, 24 * 10**9, unit="B")) == state


def test_a_size_bounds_nothing_that_is_no_size() -> None:
    assert "is no size in bytes" in why("kl<24GB", figure("kl", 0.0, 0.1))


def test_a_bound_holds_only_if_the_interval_does() -> None:
    measured = figure("kl", 0.0, 0.01, interval=(0.005, 0.015))
    assert said("kl<0.02", measured) == "holds" and said("kl<0.012", measured) == "fails"
    assert "kl is 0.01 (0.005 to 0.015), and < 0.012 fails" in why("kl<0.012", measured)


def test_a_bound_against_the_original_takes_the_paired_change() -> None:
    """The scores themselves vary by five points, the change by one."""
    score = figure("gsm8k", 0.50, 0.49, better="higher", interval=(0.44, 0.54), change_interval=(-0.02, 0.0), chance=0.0, items=400)
    assert said("gsm8k>=0.95x", score) == "holds" and said("gsm8k>=0.97x", score) == "fails"
    assert said("gsm8k>=0.475", score) == "fails"


def test_without_a_text_every_text_must_keep_the_bound_and_the_worst_is_told() -> None:
    texts = [figure("kl", 0.0, 0.01, text="code"), figure("kl", 0.0, 0.03, text="prose"), figure("kl", 0.0, 0.05, text="news")]
    assert said("kl<0.06", *texts) == "holds" and said("kl[code]<0.02", *texts) == "holds"
    assert "kl[news] is 0.05" in why("kl<0.02", *texts)
    assert "kl[law] was not measured" in why("kl[law]<0.02", *texts)


def test_what_is_promoted_now_is_compared_text_by_text() -> None:
    mine, served = [figure("kl", 0.0, 0.012, text="code")], [figure("kl", 0.0, 0.010, text="code")]
    assert said("kl<=1.3x promoted", *mine, promoted=served) == "holds"
    assert said("kl<=1.1x promoted", *mine, promoted=served) == "fails"
    assert said("kl<=1.1x promoted", *mine) == "holds", "nothing is promoted yet"
    assert "the promoted version's kl[code] was not measured" in why("kl<=1.1x promoted", *mine, promoted=[])


def test_a_bound_relative_to_a_guess_is_refused_as_undecidable() -> None:
    guess = figure("mcq", 0.26, 0.30, better="higher", chance=0.25, items=100)
    assert said("mcq>=0.95x", guess) == "undecidable" and "no better than guessing, which scores 0.25" in why("mcq>=0.95x", guess)
    assert said("mcq>=0.2", guess) == "holds"
    assert said("mcq>=0.95x", figure("mcq", 0.60, 0.60, better="higher", chance=0.25, items=100)) == "holds"
    assert said("mcq>=0.95x promoted", guess, promoted=[figure("mcq", 0.3, 0.26)]) == "undecidable"


def test_a_multiple_of_nothing_and_what_was_not_measured_are_undecidable() -> None:
    assert said("kl<2x", figure("kl", 0.0, 0.1)) == "undecidable"
    silent = figure("prefill", None, None, notes=("speed is left out: both models need 9 bytes",))
    assert "prefill was not measured (speed is left out: both models need 9 bytes)" in why("prefill>=1x", silent)
    assert said("gsm8k>=0.5", figure("kl", 0.0, 0.1)) == "undecidable"


@pytest.mark.parametrize("word", ["perplexity<1e9", "perplexity>0", "perplexity<=2x", "perplexity>=0.1x"])
def test_a_broken_model_whose_figures_are_no_numbers_keeps_no_bound(word: str) -> None:
    assert said(word, figure("perplexity", 12.0, math.nan)) == "fails"


def test_all_bounds_must_hold() -> None:
    figures = [figure("kl", 0.0, 0.01), figure("bytes", 10, 20, unit="B")]
    decisions = judge(read_gate(["kl<0.02", "bytes<=10B"]), figures)
    assert [d.state for d in decisions] == ["holds", "fails"] and not passed(decisions)
    assert refusal(decisions).startswith("bytes is 20")


@pytest.mark.parametrize(
    "word",
    [
        "",
        "kl",
        "kl=0.02",
        "kl==0.02",
        "<0.02",
        "kl<",
        "kl<good",
        "kl<nan",
        "kl<inf",
        "kl<1e999",
        "kl<0x",
        "kl<-1x",
        "kl<2y",
        "kl<2 GBx",
    ],
)
def test_what_is_no_bound_is_refused_with_how_to_write_one(word: str) -> None:
    with pytest.raises(ValueError, match="write a bound like|factor above 0") as error:
        bound(word)
    assert "\n" not in str(error.value)


def test_a_gate_file_is_a_list_of_bounds(tmp_path: Path) -> None:
    file = tmp_path / "gate.yaml"
    file.write_text("# what is served must stay close\nbounds:\n  - kl < 0.02\n  - kl[stdlib (text+code)] <= 1.1x promoted\n")
    assert [b.word for b in read_gate([str(file), "bytes<=24GB", "kl < 0.02"])] == [
        "kl < 0.02", "kl[stdlib (text+code)] <= 1.1x promoted", "bytes<=24GB",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no list of bounds"),
        ("[]", "holds no list of bounds"),
        ("kl: 0.02", "'kl' is not known"),
        ("- kl: 0.02", "bound 1: "),
        ("- kl < 0.02\n- 3", "bound 2: 3 is no text"),
        ("- kl < good", "bound 1: 'kl < good' is no bound"),
        ("bounds: {", "is no YAML"),
        ("bounds: kl<0.1", "holds no list"),
    ],
)
def test_a_bad_gate_file_is_told_in_one_line_with_its_name(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "gate.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=said) as error:
        read_gate([str(file)])
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="there is no gate file"):
        read_gate([str(tmp_path / "absent.yaml")])


@step("test.measuring", version=1, spec=lambda names: Spec(figures=tuple(names)))
def measuring(context: Context, *, names: list[str]) -> None:
    """Reports, so it says, these figures."""


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("gsm8k>=0.95x", "the gate asks for gsm8k, which no step of this pipeline measures"),
        ("kl[law]<1", "measures kl\\[code\\] and kl\\[prose\\]"),
        ("byte<1GB", "did you mean bytes"),
        ("KL<1", "no step of this pipeline measures"),
    ],
)
def test_a_figure_that_nobody_measures_is_refused_before_the_run(word: str, said: str) -> None:
    target: Step = measuring(names=[]).reporting(measuring(names=["kl[code]", "kl[prose]"]), measuring(names=["bytes"]))
    check_measured(read_gate(["kl<1", "kl[code]<1", "bytes<=1GB"]), target)
    with pytest.raises(ValueError, match=said) as error:
        check_measured([bound(word)], target)
    assert "\n" not in str(error.value)
