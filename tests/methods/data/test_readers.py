"""What cannot be read of several files, and what a full disk is called."""

import errno
import json
from pathlib import Path

import pytest

from moeflow.methods.data.readers import told
from moeflow.methods.data.steps import tokens
from moeflow.methods.graph import Model, Sample
from moeflow.run import StepFailed
from moeflow.sources import Texts
from tests import running
from tests.running import SMALL


@pytest.fixture(scope="module")
def model() -> Model:
    return running.model_in(SMALL)


def read(model: Model, folder: Path, spec: str) -> list[dict]:
    """What came of each text of one sequence of eight tokens."""
    store, step = running.store_in(folder), tokens(Texts(spec), model, Sample(1, 8))
    running.run(store, step)
    told_: list[dict] = json.loads(store.artifact(step.key).file("tokens.json").read_text())
    return told_


def test_the_file_that_is_damaged_is_named_among_several(model: Model, tmp_path: Path) -> None:
    for name, text in (("a", '{"text": "one"}\n'), ("b", '{"text": "two"}\n{"text": 3\n'), ("c", '{"text": "four"}\n')):
        (tmp_path / f"{name}.jsonl").write_text(text)
    with pytest.raises(StepFailed, match=r"b\.jsonl, line 2: no JSON \(Expecting ',' delimiter, column 11\)"):
        read(model, tmp_path, f"{tmp_path}/*.jsonl")


def test_a_file_without_rows_among_others_is_no_damage(model: Model, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    (tmp_path / "b.jsonl").write_text('{"text": "a b c d e f g h"}\n' * 3)
    [part] = read(model, tmp_path, f"{tmp_path}/*.jsonl")
    assert part["files"] == ["a.jsonl", "b.jsonl"] and part["documents"] > 0


def test_a_full_disk_is_called_a_full_disk_however_deep_it_lies(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=f"no space left on {tmp_path} while text is read; free some"), told([], tmp_path):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("An error occurred while generating the dataset") from error
