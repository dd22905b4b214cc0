"""Texts are named by one string, taken apart at once and pinned when first used."""

import os
from pathlib import Path

import pytest

from moeflow.store import MissingSource
from moeflow.store.texts import Texts
from tests.store.making import folder


def test_each_entry_has_its_source_columns_and_weight(tmp_path: Path) -> None:
    at = folder(tmp_path / "d", **{"a.jsonl": "{}", "b.jsonl": "{}"})
    texts = Texts(f"{at}/a.jsonl#question+answer*2.5, {at}/*.jsonl#text ,python:stdlib*1e-1")
    entries = texts.entries()
    assert [(e.columns, e.weight) for e in entries] == [(("question", "answer"), 2.5), (("text",), 1.0), ((), 0.1)]
    assert [e.source.names()[:2] for e in entries[:2]] == [["a.jsonl"], ["a.jsonl", "b.jsonl"]]
    assert entries[2].source.uri == "python:stdlib"


def test_nothing_is_looked_at_before_it_is_asked_for(tmp_path: Path) -> None:
    texts = Texts(str(tmp_path / "later.jsonl"))
    with pytest.raises(MissingSource, match="there is no such file or folder"):
        texts.entries()
    folder(tmp_path, **{"later.jsonl": "{}"})
    first = texts.entries()
    os.unlink(tmp_path / "later.jsonl")
    assert texts.entries() is first


def test_one_local_matrix_of_numbers_is_tokens() -> None:
    assert Texts("x/tokens.npy").is_tokens
    assert not any(Texts(t).is_tokens for t in ("x.jsonl", "a.npy,b.npy", "s3://bucket/x.npy", "python:stdlib"))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("", "an entry names no source; write URI"),
        ("a.jsonl,,b.jsonl", "an entry names no source"),
        ("#text", "an entry names no source"),
        ("a.jsonl*0", "the weight of a.jsonl is 0; weights are numbers above 0"),
        ("a.jsonl#", "a.jsonl# names no column; write a.jsonl#text"),
        ("a.jsonl#*2", "a.jsonl# names no column"),
    ],
)
def test_a_string_that_names_no_texts_is_refused_at_once(spec: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Texts(spec)
