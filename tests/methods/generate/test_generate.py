"""Rows of text that the model itself writes: drawn from its predictions, the same however the work is divided."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from moeflow.methods.checkpoint.steps import text_model_of
from moeflow.methods.data.steps import tokens
from moeflow.methods.generate import steps as generate
from moeflow.methods.generate.drawing import continued as go_on
from moeflow.methods.generate.drawing import drawn
from moeflow.methods.generate.steps import BEGINNING, partly
from moeflow.methods.graph import LEARNED, TOKENS, Model, Sample
from moeflow.methods.recipes.tune import LOADED, Recovering
from moeflow.step import Step, step_of
from moeflow.store import Store
from tests import kinds, normal, running, tiny

LENGTH = 40
OFTEN = ("mxfp4", "ungated")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return running.model_in(tiny.write("mixtral", tmp_path_factory.mktemp("mixtral")))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return running.store_in(tmp_path)


def matrix(model: Model, folder: Path, rows: int = 6) -> Step:
    return tokens(running.matrix_of(folder, sequences=rows, length=LENGTH), model, Sample(rows, LENGTH))


def ids(store: Store, made: Step) -> np.ndarray:
    running.run(store, made)
    return np.load(store.artifact(made.key).file(TOKENS))


def no_progress(done: int, of: int, what: str) -> None:
    pass


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3", "gpt_oss", "qwen3_next"])
def test_each_token_is_where_the_models_own_predictions_pass_the_number_drawn(kind: str, tmp_path: Path) -> None:
    """By one pass over whole rows, without what a cache keeps."""
    folder = normal.hub(normal.write(kind, tmp_path / "model")) if kind in normal.FAMILIES else tiny.write(kind, tmp_path / "model")
    random = np.random.default_rng(1)
    begun, draws = random.integers(3, 90, (3, 5)), random.random((3, 12))
    rows = go_on(folder, begun, draws, "float32", 1 << 20, no_progress)
    assert rows.shape == (3, 17) and rows.dtype == np.int32 and (rows[:, :5] == begun).all()
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        likely = whole(torch.from_numpy(rows.astype(np.int64))).logits.double().softmax(-1)[:, 4:-1]
    upto = likely.cumsum(-1).gather(-1, torch.from_numpy(rows[:, 5:, None].astype(np.int64)))[..., 0]
    of_it = likely.gather(-1, torch.from_numpy(rows[:, 5:, None].astype(np.int64)))[..., 0]
    drawn_at = torch.from_numpy(draws)
    assert (drawn_at <= upto + 1e-4).all() and (drawn_at >= upto - of_it - 1e-4).all()


@pytest.mark.parametrize("kind", [k if k in OFTEN else pytest.param(k, marks=pytest.mark.slow) for k in kinds.KINDS])
def test_models_of_every_kind_write(kind: str, store: Store, tmp_path: Path) -> None:
    """In stacks, in MXFP4, hybrid, without gates, a language model in a multimodal one: as transformers loads their source."""
    source = running.model_in(kinds.write(kind, tmp_path / "model"))
    spec = running.matrix_of(tmp_path, sequences=4, length=LENGTH, vocabulary=90).spec
    made = ids(store, Recovering(text=spec, rows=4, length=LENGTH).data(source))
    assert (made < int(source.config["vocab_size"])).all() and (made[1::2, BEGINNING:] > 90).any() and (made[::2] < 90).all()


def test_draws_follow_the_probabilities() -> None:
    logits_V = torch.tensor([0.3, -1.0, 2.0, 0.5, float("-inf")])
    of_20k = drawn(logits_V.expand(20_000, -1), torch.from_numpy(np.random.default_rng(0).random(20_000)))
    often = of_20k.bincount(minlength=5) / 20_000
    torch.testing.assert_close(often, logits_V.softmax(-1), atol=0.012, rtol=0)
    assert often[4] == 0
    assert drawn(logits_V[None, :4], torch.tensor([0.0])).item() == 0
    assert drawn(torch.zeros(1, 3), torch.tensor([1 - 1e-17], dtype=torch.float64)).item() == 2


def test_half_of_the_rows_begin_with_the_text_and_all_others_are_the_text(model: Model, store: Store, tmp_path: Path) -> None:
    text = matrix(model, tmp_path)
    made, given = ids(store, partly(text, text_model_of(model), 0.5, seed=0, dtype="float32")), ids(store, text)
    written = (made != given).any(1)
    assert written.tolist() == [False, True] * 3 and made.shape == given.shape
    for row in np.flatnonzero(written):
        places = np.lib.stride_tricks.sliding_window_view(given[row], BEGINNING)
        assert (places == made[row, :BEGINNING]).all(1).any()
    others = ids(store, partly(text, text_model_of(model), 0.5, seed=1, dtype="float32"))
    assert (others[written] != made[written]).any()


def test_what_is_written_does_not_depend_on_how_the_rows_are_divided(
    model: Model, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = matrix(model, tmp_path)
    whole = ids(store, partly(text, text_model_of(model), 1.0, seed=0, dtype="float32"))
    monkeypatch.setattr(generate, "ROWS", 2)
    monkeypatch.setattr(generate, "ROOM", 1)  # one row at a time
    made = partly(text, text_model_of(model), 1.0, seed=0, dtype="float32")
    assert len(made.inputs) == 4 and (ids(store, made) == whole).all()


def test_rows_that_are_written_are_learned_whole(store: Store, tmp_path: Path) -> None:
    """Of a text of prompts and responses the other rows keep their mask."""
    file = tmp_path / "rows.jsonl"
    rows = [{"instruction": "Add one and two. " * 3, "output": f"It is {i}."} for i in range(40)]
    file.write_text("\n".join(map(json.dumps, rows)))
    how = Recovering(text=f"{file}#instruction+output", rows=4, length=LENGTH, generated=0.5, dtype="float32")
    made = how.data(running.model_in(running.SMALL))
    ids(store, made)
    learned = np.load(store.artifact(made.key).file(LEARNED))
    assert learned[[1, 3]].all() and not learned[[0, 2]].all() and learned[[0, 2]].any()


def test_rows_are_written_by_models_that_one_device_holds(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of larger ones only where it is said; and no row where none is asked for."""
    spec = running.matrix_of(tmp_path, sequences=6, length=LENGTH).spec

    def made(**options: Any) -> str:
        return step_of(Recovering(text=spec, rows=6, length=LENGTH, **options).data(model)).name

    assert made() == "generate.mixed" and made(generated=0.0) == "data.matrix"
    monkeypatch.setattr("moeflow.methods.recipes.tune.LOADED", 1000)
    assert made() == "data.matrix" and made(generated=0.1) == "generate.mixed" and LOADED > 10**10
    with pytest.raises(ValueError, match="generated=1.5 is a part of the rows, from 0 to 1"):
        Recovering(generated=1.5)


def test_what_is_read_and_written_is_what_was_planned(model: Model, store: Store, tmp_path: Path) -> None:
    made = partly(matrix(model, tmp_path), text_model_of(model), 0.5, seed=0, dtype="float32")
    planned = {s.key: s.spec for s in map(step_of, (made, *made.inputs)) if s.name.startswith("generate.")}
    ran = {s.key: s for s in running.run(store, made).steps}
    for key, spec in planned.items():
        assert (ran[key].reads, ran[key].writes) == (pytest.approx(spec.reads, rel=0.1), pytest.approx(spec.writes, rel=0.1))


def test_a_plan_counts_what_the_model_and_its_keys_and_values_take(model: Model, tmp_path: Path) -> None:
    made = partly(matrix(model, tmp_path, 3000), text_model_of(model), 1.0, seed=0, dtype="float32")
    parts = [step_of(s) for s in made.inputs][1:]
    assert len(parts) == 6 and sum(s.spec.output.sequences for s in parts) == 3000
    checkpoint = text_model_of(model).spec.output
    for part in parts:
        assert part.spec.reads > checkpoint.nbytes and part.spec.memory > checkpoint.loaded("float32")
        assert sum(part.spec.operations.values()) >= 2 * 500 * (LENGTH - BEGINNING) * checkpoint.active
