"""The reports on a compressed model: which there are, and what each text is called in them. Only graphs are built."""

from pathlib import Path

import pytest

from moeflow.methods.data import steps as data
from moeflow.methods.graph import Model, Pass, Sample
from moeflow.methods.recipes import compare, pretrained
from moeflow.sources import Texts
from moeflow.step import upstream
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
            (tmp_path / folder / name).write_text('{"question": "?", "answer": "!", "text": "."}\n')
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
    with pytest.raises(
        ValueError, match=r"the model has no tokenizer, so .*; pass a ready-made matrix or traffic .*\(tokens=...\)"
    ):
        compare.reports(plain, plain, compare.HeldOut("nowhere.txt", 4, 16), Pass())


def test_held_out_text_may_be_ready_made_matrices_even_without_a_tokenizer(model: Model, tmp_path: Path) -> None:
    plain = running.model_in(tiny.write("mixtral", tmp_path / "model"))
    one, other = (running.matrix_of(tmp_path, sequences=n).spec for n in (2, 3))
    for original in (plain, model):
        steps = compare.reports(original, original, compare.HeldOut(f"{one},{other}", 4, 16), Pass(2))
        made = [s for s in upstream(steps) if s.name == "data.matrix"]
        assert sorted(s.params["shape"] for s in made) == [[2, 16], [3, 16]]
        quality = [s.params for s in steps if s.name == "evaluate.quality"]
        assert [p["name"] for p in quality] == ["tokens-2-16-0", "tokens-3-16-0"] and not any(p.get("note") for p in quality)


@pytest.mark.parametrize("bos", [None, True, False])
def test_held_out_text_begins_as_it_is_told(bos: bool | None, model: Model, tmp_path: Path) -> None:
    steps = compare.reports(model, model, compare.HeldOut(str(tmp_path / "text.txt"), 4, 16, bos=bos), Pass(2))
    (made,) = (s for s in upstream(steps) if s.name == "data.tokens")
    assert made.params["sample"].get("bos") is bos


def test_text_that_was_calibrated_on_is_told_of(model: Model, tmp_path: Path) -> None:
    """By what the files hold, whatever they are called, and not of text that only the model itself was trained on."""
    for name, words in (("other.txt", "others"), ("seen.txt", "seen"), ("copy.txt", "seen")):
        (tmp_path / name).write_text(words)
    seen = Texts(f"{tmp_path}/other.txt,{tmp_path}/seen.txt")
    tokens = data.tokens(seen, model, Sample(4, 16))
    texts = ",".join(f"{tmp_path}/{name}.txt" for name in ("text", "copy", "other"))
    steps = compare.reports(model, model, compare.HeldOut(texts, 4, 16), Pass(2), tokens=tokens)
    told = {s.params["name"]: (s.params.get("note"), s.notes) for s in steps if s.name == "evaluate.quality"}
    assert told == {"text": ("", ())} | {n: (compare.SEEN.format(n), (compare.SEEN.format(n),)) for n in ("copy", "other")}
