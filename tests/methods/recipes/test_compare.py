"""The reports on a compressed model: which there are, and what each text is called in them. Only graphs are built."""

from pathlib import Path

import pytest

from moeflow.methods.graph import Model, Pass
from moeflow.methods.recipes import compare, pretrained
from moeflow.sources import Texts
from tests import running, tiny


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """A model with a tokenizer."""
    (tmp_path / "text.txt").write_text("words")
    return pretrained.mixtral(Texts(str(tmp_path / "text.txt")))


def names(model: Model, heldout: str) -> list[str]:
    steps = compare.reports(model, model, compare.HeldOut(heldout, 4, 16), Pass(2))
    return [s.params["name"] for s in steps if s.name == "evaluate.quality"]


def test_every_text_has_a_name_of_its_own_with_columns_or_address_if_its_file_is_not_enough(model: Model, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for name in ("questions.jsonl", "test.jsonl"):
            (tmp_path / folder / name).write_text("{}\n")
    a, b = tmp_path / "a" / "questions.jsonl", tmp_path / "b" / "questions.jsonl"
    assert names(model, f"{a}#question,{tmp_path}/a/test.jsonl#text") == ["questions", "test"]
    assert names(model, f"{a}#question,{a}#question+answer") == ["questions (question)", "questions (question+answer)"]
    alike = names(model, f"{a}#question,{b}#question,{a}#answer")
    assert alike[0] != alike[1] and str(tmp_path / "a") in alike[0] and str(tmp_path / "b") in alike[1]
    assert alike[2] == "questions (answer)"
    assert names(model, f"{a},{a}#question") == ["questions", "questions (question)"]
    (other := tmp_path / "a" / "questions.txt").write_text("words")
    assert names(model, f"{a},{other}") == [f"questions ({a})", f"questions ({other})"], "the folder alone does not tell them apart"
    assert names(model, "python:stdlib/a*.py,python:stdlib/b*.py") == [f"stdlib (python:stdlib/{n}*.py)" for n in "ab"]


def test_a_text_that_is_named_twice_is_refused_in_one_line(model: Model, tmp_path: Path) -> None:
    """Weights belong to a mixture: here each text has a report of its own, and two of one name would say nothing."""
    text = tmp_path / "text.txt"
    for again in (f"{text},{text}", f"{text},{text}*2"):
        with pytest.raises(ValueError, match=f"heldout.texts names {text} twice; leave one out"):
            names(model, again)


def test_a_model_without_a_tokenizer_needs_a_matrix_in_the_place_of_text(tmp_path: Path) -> None:
    plain = running.model_in(tiny.write("mixtral", tmp_path / "model"))
    with pytest.raises(ValueError, match=r"the model has no tokenizer, so .*; pass a ready-made matrix \(tokens=...\)"):
        compare.reports(plain, plain, compare.HeldOut("nowhere.txt", 4, 16), Pass())
