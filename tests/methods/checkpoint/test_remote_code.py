"""Classes of a checkpoint's own travel with it as they are, and are never run."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from moeflow.methods.data import steps as data
from moeflow.methods.graph import Pass, Sample
from moeflow.methods.prune.searches import Search
from moeflow.methods.recipes import compare, naee
from moeflow.model.formats import NEEDS_MOEFLOW
from moeflow.sources import Texts
from tests import tiny
from tests.models import calibrated, pulled
from tests.running import SMALL, alone, model_in, run, store_in

RUNS = "raise SystemExit('this code was run')\n"
FILES = {
    "tokenization_own.py": f"{RUNS}from .words import Words\nfrom . import (tables, more)\nimport os\n",
    "words.py": f"{RUNS}from ..above import x\nfrom json import loads\n",
    "tables.py": RUNS,
    "more.py": "this is no Python\n",
    "modeling_own.py": f"{RUNS}from .configuration_own import Own\n",
    "configuration_own.py": RUNS,
}
BESIDE = {"train.py": RUNS, "above.py": RUNS, "os.py": RUNS}


def entries(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint whose model and tokenizer are classes of its own, as Kimi-K2's are."""
    at = tiny.write("mixtral", tmp_path / "model", num_hidden_layers=2, vocab_size=512)
    for name, text in (FILES | BESIDE).items():
        (at / name).write_text(text)
    (at / "tiktoken.model").write_bytes(b"AA== 0\n")
    entries(at / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM", "AutoConfig": "org/far--code.Own"})
    entries(at / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]})
    (tmp_path / "text.jsonl").write_text('{"text": "def f(x): return x"}\n' * 40)
    return at


def test_code_that_an_auto_map_names_travels_with_what_it_imports_and_is_not_run(source: Path, tmp_path: Path) -> None:
    model = model_in(source)
    assert all(name in " ".join(model.rest.notes) for name in BESIDE)
    out = pulled(store_in(tmp_path), model, tmp_path)
    assert {p.name: p.read_text() for p in out.glob("*.py")} == FILES
    assert json.loads((out / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"] == "modeling_own.OwnForCausalLM"
    assert (out / "tiktoken.model").read_bytes() == b"AA== 0\n"


def test_the_code_is_in_no_key_but_that_of_what_carries_it(source: Path) -> None:
    before = model_in(source)
    (source / "modeling_own.py").write_text(f"{RUNS}# another\n")
    after = model_in(source)
    assert before.rest.key != after.rest.key and before.texts.key == after.texts.key
    assert [layer.key for layer in before.layers] == [layer.key for layer in after.layers]


@pytest.mark.parametrize(
    "auto_map", [{"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}, ["tokenization_own.OwnTokenizer"]]
)
def test_a_text_for_a_tokenizer_that_is_code_is_refused_and_a_matrix_is_the_way(
    auto_map: Any, source: Path, tmp_path: Path
) -> None:
    entries(source / "tokenizer_config.json", auto_map=auto_map)
    model = model_in(source)
    with pytest.raises(
        ValueError, match=r"code of its own \(tokenization_own.OwnTokenizer\), .* never run.*tokens=FILE.npy\)"
    ) as told:
        data.tokens(Texts(str(tmp_path / "text.jsonl")), model, Sample(4, 16))
    assert "\n" not in str(told.value)
    with pytest.raises(ValueError, match="never run"):
        data.examples(Texts(str(tmp_path / "text.jsonl")), model, data.Examples(4, 16))
    np.save(tmp_path / "ids.npy", np.ones((4, 16), dtype=np.int32))
    assert data.tokens(Texts(str(tmp_path / "ids.npy")), model, Sample(4, 16)).name == "data.matrix"


def test_held_out_matrices_are_read_whatever_the_tokenizer_and_held_out_text_is_left_out(source: Path, tmp_path: Path) -> None:
    model = model_in(source)
    for n, name in enumerate(("ids", "other")):
        np.save(tmp_path / f"{name}.npy", np.full((4, 16), n, dtype=np.int32))
    tokens = data.tokens(Texts(str(tmp_path / "ids.npy")), model, Sample(4, 16))

    def qualities(heldout: str) -> list[tuple[str, str]]:
        made = compare.reports(model, model, compare.HeldOut(heldout, 4, 16), Pass(4), tokens=tokens)
        return [(r.params["name"], r.params["note"]) for r in made if r.name == "evaluate.quality"]

    assert qualities(str(tmp_path / "other.npy")) == [("other", "")]
    ((name, note),) = qualities(str(tmp_path / "text.jsonl"))
    assert name == "token matrix" and "tokenization_own.OwnTokenizer" in note and "held-out text is left out" in note


def test_with_a_tokenizer_json_the_code_is_not_needed(source: Path, tmp_path: Path) -> None:
    shutil.copy(SMALL / "tokenizer.json", source)
    (source / "tiktoken.model").unlink()
    store, tokens = store_in(tmp_path), data.tokens(Texts(str(tmp_path / "text.jsonl")), model_in(source), Sample(4, 16, bos=False))
    run(store, alone(tokens))
    ids = np.load(store.artifact(tokens.key).file("tokens.npy"))
    assert ids[0, :6].tolist() == AutoTokenizer.from_pretrained(SMALL)("def f(x): return x")["input_ids"][:6]


def test_a_result_in_moeflow_s_own_format_does_not_name_classes_that_cannot_load_it(source: Path, tmp_path: Path) -> None:
    model = calibrated(model_in(source), tmp_path)
    pruned = naee.prune(model, 6, Search("frequency")).layers
    out = pulled(store_in(tmp_path), model.model.with_layers({0: pruned[0]}), tmp_path)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "moeflow_mixtral" and config["auto_map"] == NEEDS_MOEFLOW
