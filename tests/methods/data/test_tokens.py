"""Text becomes the token matrix that was asked for, and is refused in words that help."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moeflow.methods.data import steps as data
from moeflow.methods.graph import Model, Sample
from moeflow.run import StepFailed, pipeline
from moeflow.sources import Texts
from moeflow.step import upstream
from tests import layouts, running, tiny

WORDS = [f"w{i}" for i in range(80)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model whose tokenizer gives one token per word: w0 is 2, w1 is 3; <s> is 0, </s> is 1."""
    folder = tiny.write("mixtral", tmp_path_factory.mktemp("model"))
    vocabulary = {"<s>": 0, "</s>": 1} | {w: i + 2 for i, w in enumerate(WORDS)}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return running.model_in(folder)


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def sampled(model: Model, folder: Path, spec: str, **options: Any) -> np.ndarray:
    store = running.store_in(folder)
    step = data.tokens(Texts(spec), model, Sample(**({"sequences": 4, "length": 5} | options)))
    running.run(store, step)
    return np.load(store.artifact(step.key).file("tokens.npy"))


def documents(folder: Path, first: int = 0, count: int = 20, name: str = "a.jsonl") -> Path:
    """Documents of three words; the first word names the document."""
    return jsonl(folder / name, [{"text": f"w{first + i} w70 w71"} for i in range(count)])


def test_documents_are_joined_and_cut_each_with_its_beginning(model: Model, tmp_path: Path) -> None:
    ids = sampled(model, tmp_path, f"{documents(tmp_path)}#text", sequences=8, length=4)
    assert ids.dtype == np.int32 and ids.shape == (8, 4)
    assert (ids[:, 0] == 0).all() and (ids[:, 2:] == [72, 73]).all()


def test_without_beginnings_and_with_ends(model: Model, tmp_path: Path) -> None:
    ids = sampled(model, tmp_path, f"{documents(tmp_path)}#text", sequences=8, length=4, bos=False, eos=True)
    assert (ids[:, 1:] == [72, 73, 1]).all()


def test_a_group_s_remainder_is_dropped_as_the_authors_do(model: Model, tmp_path: Path) -> None:
    """Ten documents of four tokens in groups of three: each group gives two sequences of five and loses two tokens."""
    ids = sampled(model, tmp_path, f"{documents(tmp_path, count=10)}#text", sequences=6, length=5, group=3)
    assert (ids[::2, 0] == 0).all() and ids.shape == (6, 5)
    with pytest.raises(StepFailed, match="gives 6 of 8 sequences of 5 tokens: 10 tokens are missing; give more text"):
        sampled(model, tmp_path, f"{documents(tmp_path, count=10)}#text", sequences=8, length=5, group=3)


def test_the_seed_alone_decides_the_order(model: Model, tmp_path: Path) -> None:
    spec = f"{documents(tmp_path)}#text"
    one, same, other = (sampled(model, tmp_path, spec, seed=s) for s in (1, 1, 2))
    assert (one == same).all() and (one != other).any()


def test_several_texts_are_mixed_by_weight_and_spread_evenly(model: Model, tmp_path: Path) -> None:
    a, b = documents(tmp_path, 0, 30), documents(tmp_path, 40, 30, "b.jsonl")
    ids = sampled(model, tmp_path, f"{a}#text*3,{b}#text*1", sequences=8, length=4)
    from_b = ids[:, 1] >= 42
    assert from_b.sum() == 2 and from_b[:4].sum() == from_b[4:].sum() == 1


def test_columns_are_joined_by_a_space(model: Model, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "qa.jsonl", [{"question": "w1", "answer": "w2"}] * 9)
    ids = sampled(model, tmp_path, f"{file}#question+answer", sequences=3, length=3)
    assert (ids == [0, 3, 4]).all()


def test_text_and_parquet_and_packed_json_are_read(model: Model, tmp_path: Path) -> None:
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "t.txt").write_text("w1 w2 w3 w4 w5 w6 w7 w8 w9 w10")
    pq.write_table(pa.table({"body": ["w20 w21 w22"] * 9}), tmp_path / "p.parquet")
    with gzip.open(tmp_path / "g.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps({"text": "w30 w31 w32"}) + "\n" for _ in range(9)))
    assert sampled(model, tmp_path, str(tmp_path / "t.txt"), sequences=2).tolist() == [[0, 3, 4, 5, 6], [7, 8, 9, 10, 11]]
    assert (sampled(model, tmp_path, f"{tmp_path}/p.parquet#body", length=4) == [0, 22, 23, 24]).all()
    assert (sampled(model, tmp_path, f"{tmp_path}/g.jsonl.gz", length=4) == [0, 32, 33, 34]).all()


def test_a_ready_made_matrix_is_taken_whole(model: Model, tmp_path: Path) -> None:
    np.save(tmp_path / "m.npy", np.arange(12).reshape(3, 4))
    ids = sampled(model, tmp_path, str(tmp_path / "m.npy"), sequences=99)
    assert ids.tolist() == np.arange(12).reshape(3, 4).tolist()


@pytest.mark.parametrize(
    "array, says",
    [
        (np.zeros((2, 3, 4), dtype=int), r"has shape \(2, 3, 4\) .*; a token matrix is \[sequences, length\] of integers"),
        (np.zeros((2, 3)), "type float64; a token matrix is"),
    ],
)
def test_a_matrix_that_is_none_is_refused_when_the_graph_is_built(
    model: Model, array: np.ndarray, says: str, tmp_path: Path
) -> None:
    np.save(tmp_path / "m.npy", array)
    with pytest.raises(ValueError, match=says):
        data.tokens(Texts(str(tmp_path / "m.npy")), model, Sample(1, 2))


@pytest.mark.parametrize("use", ["tokens", "heldout", "tune.text"])
def test_ids_that_the_model_lacks_are_refused_wherever_a_matrix_is_read(use: str, model: Model, tmp_path: Path) -> None:
    good, bad = running.matrix_of(tmp_path, vocabulary=96), running.matrix_of(tmp_path, sequences=9, vocabulary=200)
    folder = tiny.write("mixtral", tmp_path / "plain")
    texts = {"tokens": good.spec, "heldout": good.spec} | {use: bad.spec}
    words = [
        f"model={folder}",
        "keep=4",
        *(f"{name}={spec}" for name, spec in texts.items()),
        *["tune=lora"] * (use == "tune.text"),
    ]
    build = pipeline.load(Path(__file__).parents[3] / "pipelines" / "mixtral.py")
    says = r"tokens-9-16-0.npy at .* has the token id \d+ in sequence \d, and the model has the ids 0 to 95"
    with pytest.raises(ValueError, match=says):
        pipeline.call(build, words)


def test_the_vocabulary_is_that_of_the_text_model_inside(tmp_path: Path) -> None:
    kind = layouts.KINDS["qwen3_vl_moe"]
    wrapped = layouts.model_in(layouts.write("qwen3_vl_moe", tmp_path / "model"), kind.found)
    with pytest.raises(ValueError, match="has the ids 0 to 95"):
        data.tokens(running.matrix_of(tmp_path, vocabulary=200), wrapped, Sample())


def test_a_missing_column_is_named_with_the_ones_there_are(model: Model, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "qa.jsonl", [{"question": "w1", "answer": "w2"}] * 9)
    with pytest.raises(ValueError, match="has no column 'text'; it has: question, answer"):
        sampled(model, tmp_path, str(file))


def test_too_long_sequences_are_refused_when_the_graph_is_built(model: Model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="length=65 is more than the model's 64 positions"):
        data.tokens(Texts(f"{documents(tmp_path)}#text"), model, Sample(1, 65))


def test_text_for_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    model = running.model_in(tiny.write("mixtral", tmp_path / "model"))
    with pytest.raises(ValueError, match="the model has no tokenizer, .* pass a ready-made matrix"):
        data.tokens(Texts(f"{documents(tmp_path)}#text"), model, Sample(1, 4))


def test_a_large_text_file_is_fetched_by_a_step_of_its_own(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts").mkdir()
    documents(tmp_path / "texts", 0, 90, "large.jsonl")
    documents(tmp_path / "texts", 10, 2, "a.jsonl"), documents(tmp_path / "texts", 20, 2, "b.jsonl")
    monkeypatch.setattr(data, "LARGE", 1000)
    other = documents(tmp_path, 50, 20, "other.jsonl")
    step = data.tokens(Texts(f"{tmp_path}/texts#text*1,{other}#text*1"), model, Sample(4, 4))
    fetched = [s for s in upstream([step]) if s.name.startswith("sources.file") and "large.jsonl" in str(s.params)]
    assert [s.name for s in fetched] == ["sources.file"]
    store = running.store_in(tmp_path)
    running.run(store, step)
    about = json.loads(store.artifact(step.key).file("tokens.json").read_text())
    assert [a["sequences"] for a in about] == [2, 2]


def test_where_a_text_lies_is_no_part_of_what_is_sampled(model: Model, tmp_path: Path) -> None:
    """Early cutoff: the same file elsewhere gives the same tokens without sampling again, and all behind them stays stored."""
    store = running.store_in(tmp_path)
    steps = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        steps.append(data.tokens(Texts(f"{documents(tmp_path / place)}#text"), model, Sample(4, 5)))
    running.run(store, steps[0])
    outcome = running.run(store, steps[1])
    assert steps[0].key != steps[1].key
    assert {s.name for s in outcome.steps if s.state == "run"} == {"sources.files"}


def test_a_file_that_no_reader_knows_is_refused_when_the_graph_is_built(model: Model, tmp_path: Path) -> None:
    np.save(tmp_path / "m.npy", np.zeros((2, 2), dtype=int))
    with pytest.raises(ValueError, match="m.npy is no text that can be read; known endings: .jsonl"):
        data.tokens(Texts(f"{tmp_path / 'm.npy'},{documents(tmp_path)}"), model, Sample(2, 4))


def beginning(folder: Path, bos: str | None, add: bool | None = None) -> Model:
    """A model whose tokenizer has this beginning-of-sequence token, and says whether it is added."""
    written = tiny.write("mixtral", folder)
    vocabulary = {"<s>": 0, "</s>": 1} | {w: i + 2 for i, w in enumerate(WORDS)}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>", **({"bos_token": bos} if bos else {})).save_pretrained(
        written
    )
    config = json.loads((written / "tokenizer_config.json").read_text())
    (written / "tokenizer_config.json").write_text(json.dumps(config | ({} if add is None else {"add_bos_token": add})))
    return running.model_in(written)


@pytest.mark.parametrize(
    "token, add, told, begins",
    [
        ("<s>", None, None, True), ("<s>", True, None, True), ("<s>", False, None, False), ("<s>", False, True, True),
        ("<s>", None, False, False), (None, None, None, False), (None, True, None, False), (None, None, False, False),
    ],
)  # fmt: skip
def test_whether_documents_begin_with_a_token_is_told_or_the_tokenizer_says(
    token: str | None, add: bool | None, told: bool | None, begins: bool, tmp_path: Path
) -> None:
    model, spec = beginning(tmp_path / "model", token, add), f"{documents(tmp_path)}#text"
    ids = sampled(model, tmp_path, spec, sequences=3, length=4 if begins else 3, bos=told)
    assert ((ids[:, 0] == 0).all() if begins else (ids != 0).all()) and (ids[:, -2:] == [72, 73]).all()


def test_a_beginning_that_the_tokenizer_lacks_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match="the tokenizer has no beginning-of-sequence token; pass bos=False"):
        sampled(beginning(tmp_path / "model", None), tmp_path, f"{documents(tmp_path)}#text", bos=True)


def test_the_main_pipeline_reads_its_texts_with_a_tokenizer_that_has_no_beginning(tmp_path: Path) -> None:
    """As it stands, calibration, held-out text and fine-tuning."""
    beginning(tmp_path / "model", None)
    spec = f"{documents(tmp_path, count=300)}#text"
    small = ("calibration.sequences=4", "calibration.length=8", "heldout.sequences=2", "heldout.length=8")
    tuned = ("tune=lora", f"tune.text={spec}", "tune.rows=2", "tune.length=8", "tune.steps=1", "heldout.bos=none")
    given = [f"model={tmp_path / 'model'}", f"tokens={spec}", f"heldout={spec}", "keep=4", *small, *tuned]
    build = pipeline.load(Path(__file__).parents[3] / "pipelines" / "mixtral.py")
    target = pipeline.call(build, given)
    read = [s for s in upstream([target, *target.reports]) if s.name in ("data.tokens", "data.examples")]
    store = running.store_in(tmp_path)
    running.run(store, *map(running.alone, read))
    assert len(read) == 3
    assert all((np.load(store.artifact(s.key).file("tokens.npy")) != 0).all() for s in read)
