"""Input that lies: each row spoils a good input in one way, and the command says what is wrong in one line, with its exit code."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from moeflow.cli import app
from tests import tiny
from tests.bad_adapters import ADAPTERS
from tests.bad_configs import CONFIGS, TENSORS
from tests.bad_forms import FORMS, LOOKED_AT, NESTED, QUANTIZED, STACKS
from tests.bad_inputs import FILES, HEADERS, INDEXES, Row
from tests.bad_talks import TALKS, TEMPLATE
from tests.bad_texts import ABSENT, PIPELINES, PLACES, PLANNED, RUN, WORDS
from tests.running import SMALL
from tests.spoiling import INDEX, OTHER, SHARD

PIPELINE = Path(__file__).with_name("bad_inputs_pipeline.py")
MIXTRAL = Path(__file__).parents[1] / "pipelines" / "mixtral.py"
SIZES = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 512}
ROWS = [*FILES, *HEADERS, *INDEXES, *CONFIGS, *TENSORS, *QUANTIZED, *STACKS, *NESTED, *ADAPTERS, *TALKS]
SLOW = ("model_type is empty", "model_type has escape codes", "model_type is very long", "as many layers as can be")
"""Rows of a kind with "model_type of another kind", of which each starts a process that looks for the type in transformers; and one
that builds ten thousand layers without weights."""
SLOWLY = {family: [pytest.mark.slow] if family in LOOKED_AT else [] for family in {row.family for row in ROWS}}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints that `checkpoint` makes."""
    root = tmp_path_factory.mktemp("good")
    checkpoint(root, "mixtral")
    return root


def checkpoint(root: Path, family: str) -> Path:
    """A good checkpoint of a family, made once, in two shards, with the small model's tokenizer and a chat template."""
    if not (root / family).exists():
        _make(family, root / family)
    return root / family


def _make(family: str, folder: Path) -> None:
    sizes: dict[str, Any] = SIZES | {"num_key_value_heads": 2 if family.startswith("deepseek") else 1}
    if family in FORMS:
        FORMS[family](folder)
    else:
        tiny.write(family, folder, **sizes)
    _shard(folder)
    for file in SMALL.glob("tokenizer*"):
        shutil.copy(file, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def _shard(folder: Path) -> None:
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {n: SHARD if ".layers.0." in n else OTHER for n in sorted(whole)}
    for file in (SHARD, OTHER):
        save_file({n: whole[n] for n, at in files.items() if at == file}, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))


@pytest.fixture
def place(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    here = tmp_path / "here"  # so that the folder above it is empty, too
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield here


def one_line(*words: str | Path, code: int) -> str:
    """The one line that the command prints, without what a terminal would obey."""
    result = CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)
    assert result.exit_code == code, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and line.isprintable() and len(line) <= 2_000 and _json_too(result.stdout, line), (
        result.output
    )
    return line


def _json_too(printed: str, line: str) -> bool:
    """Whether nothing is printed but, if JSON was asked for, JSON, and last the same line."""
    return not printed or f"error: {[*map(json.loads, printed.splitlines())][-1]['error']}" == line


@pytest.mark.parametrize("family", [pytest.param(family, marks=marks) for family, marks in sorted(SLOWLY.items())])
def test_the_good_inputs_are_good(family: str, good: Path, place: Path) -> None:
    words = ["plan", str(PIPELINE), "-p", f"model={checkpoint(good, family)}"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.name, marks=SLOWLY[row.family] or [pytest.mark.slow] * (row.name in SLOW)) for row in ROWS]
)
def test_a_bad_checkpoint_is_told_in_one_line_at_plan_time(row: Row, good: Path, place: Path) -> None:
    shutil.copytree(checkpoint(good, row.family), place / "model")
    row.spoil(place / "model")
    line = one_line("plan", PIPELINE, "-p", "model=model", *(w for word in row.words for w in ("-p", word)), code=2)
    assert all(words in line for words in row.says), line


def test_there_are_rows_enough_and_each_says_something() -> None:
    assert len(ROWS) >= 200 and len({row.name for row in ROWS}) == len(ROWS) and all(row.says for row in ROWS)


@pytest.mark.parametrize("name, content, says", PLANNED, ids=[name for name, *_ in PLANNED])
def test_a_bad_text_is_told_at_plan_time(name: str, content: bytes, says: tuple[str, ...], good: Path, place: Path) -> None:
    (place / name).write_bytes(content)
    line = one_line("plan", PIPELINE, "-p", f"model={good / 'mixtral'}", "-p", f"tokens={name}", code=2)
    assert all(words in line for words in says), line


@pytest.fixture(scope="module")
def store(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which the model is already split."""
    folder = tmp_path_factory.mktemp("store")
    words = ["run", str(PIPELINE), "--store", str(folder), "--json", "-p", f"model={good / 'mixtral'}"]
    assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
    return folder


@pytest.mark.parametrize("name, content, says", RUN, ids=[name for name, *_ in RUN])
def test_a_bad_text_is_told_when_it_is_read(
    name: str, content: bytes, says: tuple[str, ...], good: Path, store: Path, place: Path
) -> None:
    (place / name).write_bytes(content)
    given = [f"model={good / 'mixtral'}", f"tokens={name}", "length=64"]
    line = one_line("run", PIPELINE, "--store", store, "--json", *(w for g in given for w in ("-p", g)), code=1)
    assert all(words in line for words in ("data.tokens failed: ", *says)), line


@pytest.mark.parametrize("name, content, says", PIPELINES, ids=[name for name, *_ in PIPELINES])
def test_a_bad_pipeline_is_told(name: str, content: str, says: tuple[str, ...], place: Path) -> None:
    (place / name).write_text(content)
    line = one_line("plan", name, code=2)
    assert all(words in line for words in says), line


@pytest.mark.parametrize("words, says", WORDS, ids=[" ".join(words) for words, _ in WORDS])
def test_words_that_fit_no_command_are_told(words: tuple[str, ...], says: str, place: Path) -> None:
    line = one_line(*words, code=2)
    assert says in line, line


@pytest.mark.parametrize("where, says", PLACES, ids=[where[:20] for where, _ in PLACES])
def test_a_bad_address_of_a_model_is_told(where: str, says: str, place: Path) -> None:
    line = one_line("plan", PIPELINE, "-p", f"model={where}", code=2)
    assert says in line, line


@pytest.mark.parametrize("word", ABSENT)
def test_a_file_that_is_not_there_is_told_before_anybody_is_asked_for_the_model(
    word: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "moeflow.sources.hub", None)  # whoever asked the hub would import it
    monkeypatch.setitem(sys.modules, "moeflow.sources.s3", None)
    for model in ("org/name", "s3://bucket/prefix"):
        line = one_line("plan", MIXTRAL, "-p", f"model={model}", "-p", word, code=2)
        assert "nowhere" in line and "o such file" in line, line
