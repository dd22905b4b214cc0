"""What an engine recorded of its requests: it counts as our own pass does, decides what is pruned, and is refused where it lies."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from moeflow.cli import app
from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.data import steps as data
from moeflow.methods.graph import Model, Pass, Sample
from moeflow.methods.prune.searches import Search
from moeflow.methods.recipes import naee, unified
from moeflow.methods.trim.steps import Trimming
from moeflow.model.layout import file_of
from moeflow.sources import Texts
from moeflow.step import Step, upstream
from tests import running, tiny, traffic

LENGTH = 24
SAMPLE = Sample(6, LENGTH)
PASSED = Pass(batch=3, shard=3, dtype="float32")
COUNTS = {i: [float(100 - 10 * ((e * 3 + i) % 8)) for e in range(8)] for i in range(4)}
MIXTRAL = Path(__file__).parents[3] / "pipelines" / "mixtral.py"


@pytest.fixture(scope="module")
def model() -> Model:
    return running.model_in(running.SMALL)


@pytest.fixture(scope="module")
def ids_NL() -> np.ndarray:
    return np.random.default_rng(0).integers(2, 512, (6, LENGTH)).astype(np.int32)


@pytest.fixture(scope="module")
def experts_NLlk(ids_NL: np.ndarray) -> np.ndarray:
    return traffic.routed(running.SMALL, ids_NL)


def counted(store: Any, step: Step, layer: int) -> dict[str, np.ndarray]:
    return load_file(store.artifact(step.key).file(file_of(layer)))


@pytest.mark.parametrize(
    "form", ["sglang", "vllm", *(pytest.param(f, marks=pytest.mark.slow) for f in ("arrays", "answers of sglang"))]
)
def test_transformers_own_routing_counts_as_our_pass_does(
    form: str, model: Model, ids_NL: np.ndarray, experts_NLlk: np.ndarray, tmp_path: Path
) -> None:
    """Every sequence is a request; an engine returns the experts of all tokens, and reads back the same tokens."""
    rows = {
        "arrays": [{"input_ids": i.tolist(), "routed_experts": e.tolist()} for i, e in zip(ids_NL, experts_NLlk, strict=True)],
        "sglang": [
            {"input_ids": i.tolist(), "routed_experts": traffic.sglang(e)} for i, e in zip(ids_NL, experts_NLlk, strict=True)
        ],
        "vllm": [traffic.completion(i, e) for i, e in zip(ids_NL, experts_NLlk, strict=True)],
        "answers of sglang": [traffic.generate(i, e) for i, e in zip(ids_NL, experts_NLlk, strict=True)],
    }[form]
    file = traffic.lines(tmp_path / "requests.jsonl", rows)
    step = data.tokens(Texts(f"traffic:{file}"), model, SAMPLE)
    np.save(tmp_path / "ids.npy", ids_NL)
    ours = calibrate.run(model, data.tokens(Texts(str(tmp_path / "ids.npy")), model, SAMPLE), PASSED)
    store = running.store_in(tmp_path)
    running.run(store, step, *ours.ends)
    kept = np.load(store.artifact(step.key).file("tokens.npy"))
    assert sorted(map(tuple, kept.tolist())) == sorted(map(tuple, ids_NL.tolist()))
    for i in range(4):
        read = counted(store, step, i)
        shards = [load_file(store.artifact(part.step.key).file(file_of(i))) for part in ours.observed[i]]
        for name in ("count_E", "tokens"):
            assert (read[name] == sum(s[name] for s in shards)).all()
        flat = experts_NLlk[:, :, i].reshape(-1, 2)
        for a, b in np.ndindex(8, 8):
            assert read["together_EE"][a, b] == ((flat == a).any(1) & (flat == b).any(1)).sum()


def test_the_last_token_was_never_an_input_and_several_files_add_up(
    model: Model, ids_NL: np.ndarray, experts_NLlk: np.ndarray, tmp_path: Path
) -> None:
    (tmp_path / "logs").mkdir()
    for n in range(2):
        rows = [traffic.generate(i, e[:-1]) for i, e in zip(ids_NL[n::2], experts_NLlk[n::2], strict=True)]
        traffic.lines(tmp_path / "logs" / f"{n}.jsonl", rows)
    step = data.tokens(Texts(f"traffic:{tmp_path}/logs"), model, SAMPLE)
    store = running.store_in(tmp_path)
    running.run(store, step)
    expected = np.bincount(experts_NLlk[:, :-1, 2].ravel(), minlength=8)
    assert (counted(store, step, 2)["count_E"] == expected).all()


def test_a_place_for_every_decoder_layer_is_read_like_one_for_each_moe_layer(tmp_path: Path) -> None:
    """Qwen2-MoE: the second of three layers is dense; engines leave anything in its place."""
    folder = tiny.write("qwen2_moe", tmp_path / "model")
    rng, store, made = np.random.default_rng(1), running.store_in(tmp_path), []
    experts_TLk = np.stack([rng.permutation(8)[:3] for _ in range(5 * 3)]).reshape(5, 3, 3)
    experts_TLk[:, 1] = -1
    for name, some in (("all", experts_TLk), ("moe", experts_TLk[:, [0, 2]])):
        row = {"input_ids": [3] * 5, "routed_experts": traffic.sglang(some)}
        file = traffic.lines(tmp_path / f"{name}.jsonl", [row])
        made.append(data.tokens(Texts(f"traffic:{file}"), running.model_in(folder), Sample(1, 4)))
    running.run(store, *made)
    for i in (0, 2):
        one, other = (counted(store, step, i)["count_E"] for step in made)
        assert (one == other).all() and (one == np.bincount(experts_TLk[:, i].ravel(), minlength=8)).all()


def kept(store: Any, model: Model) -> dict[int, list[int]]:
    (target,) = model.choices[-1:]
    running.run(store, *model.choices)
    if target.name == "trim.experts":
        return {int(i): keep for i, keep in json.loads(store.artifact(target.key).file("trim.json").read_text())["keep"].items()}
    return {
        c["layer"]: c["keep"] for m in model.choices for c in [json.loads(store.artifact(m.key).file("choice.json").read_text())]
    }


def best(layer: int, keep: int) -> list[int]:
    return sorted(sorted(range(8), key=lambda e: -COUNTS[layer][e])[:keep])


def test_what_is_pruned_is_what_the_engine_did_not_use(model: Model, tmp_path: Path) -> None:
    """Counts alone are enough for a score that is a count, and for Expert Drop by one; nothing of the model is run."""
    file = tmp_path / "sums.json"
    file.write_text(json.dumps(traffic.sums(COUNTS, 600), indent=1))
    tokens, store = data.tokens(Texts(f"traffic:{file}"), model, SAMPLE), running.store_in(tmp_path)
    pruned = naee.prune(calibrate.run(model, tokens, PASSED), 5, Search("frequency"))
    assert kept(store, pruned) == {i: best(i, 5) for i in range(4)}
    for criterion in ("frequency", "routing_weight"):
        how = Trimming("experts", 2, across="layer", criterion=criterion)
        assert kept(store, unified.compress(model, tokens, PASSED, trim=how).model) == {i: best(i, 6) for i in range(4)}
    assert not any(s.name in ("calibrate.observe", "calibrate.embed") for s in upstream(pruned.layers))
    naee.prune(calibrate.run(model, tokens, PASSED), 5, Search("aimer"))


def test_token_ids_are_the_text_of_what_needs_hidden_states(
    model: Model, ids_NL: np.ndarray, experts_NLlk: np.ndarray, tmp_path: Path
) -> None:
    """REAP chooses as on the same tokens; frequency follows the engine's counts, here those of other experts."""
    shifted = (experts_NLlk + 3) % 8
    rows = [traffic.generate(i, e) for i, e in zip(ids_NL, shifted, strict=True)]
    tokens = data.tokens(Texts(f"traffic:{traffic.lines(tmp_path / 'r.jsonl', rows)}"), model, SAMPLE)
    np.save(tmp_path / "ids.npy", ids_NL)
    same = data.tokens(Texts(str(tmp_path / "ids.npy")), model, SAMPLE)
    store = running.store_in(tmp_path)
    ours, theirs = (
        {n: kept(store, naee.prune(calibrate.run(model, m, PASSED), 5, Search(n))) for n in ("reap", "frequency")}
        for m in (same, tokens)
    )
    assert ours["reap"] == theirs["reap"]
    for i in range(4):
        count = np.bincount(shifted[:, :, i].ravel(), minlength=8)
        assert theirs["frequency"][i] == sorted(np.argsort(-count, kind="stable")[:5].tolist())
    assert ours["frequency"] != theirs["frequency"]


def moeflow(*words: str) -> Any:
    return CliRunner().invoke(app, [*words])


def test_a_pipeline_takes_it_in_the_place_of_texts_and_its_recipe_says_for_which_engine(tmp_path: Path) -> None:
    file, store = tmp_path / "sums.json", str(tmp_path / "store")
    file.write_text(json.dumps(traffic.sums(COUNTS, 600)))
    done = moeflow(
        "run", str(MIXTRAL), "-p", f"model={running.SMALL}", "-p", f"tokens=traffic:{file}", "-p", "search=frequency",
        "-p", "keep=5", "-p", "heldout=python:stdlib/t*.py", "-p", "heldout.sequences=2", "-p", "heldout.length=32",
        "--store", store, "--runner", "process", "--engine", "vllm", "--tp", "2",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    shown = json.loads(moeflow("show", "mixtral", "--json", "--store", store).output)
    rows = {row["name"]: row for report in shown["reports"] for row in report["rows"]}
    assert rows["experts per layer"]["compressed"] == 5
    pulled = tmp_path / "pulled"
    assert moeflow("pull", "mixtral", str(pulled), "--store", store).exit_code == 0
    assert "engine: vllm,tp=2" in (pulled / "recipe.yaml").read_text()
    again = moeflow("plan", str(pulled / "recipe.yaml"), "--store", store)
    assert again.exit_code == 0, again.output
    more = ["-p", "tokens=python:stdlib/a*.py", "-p", "calibration.length=32", "-p", "search=reap", "-p", "skipping=median"]
    refused = moeflow("plan", str(pulled / "recipe.yaml"), *more, "--store", store)
    assert refused.exit_code == 2 and "--engine vllm,tp=2: vllm,tp=2 has no skipping of experts" in refused.output
    assert moeflow("plan", str(pulled / "recipe.yaml"), *more, "--engine", "moeflow", "--store", store).exit_code == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["search=reap"], ("holds counts without token ids", "search=reap needs hidden states", "search=frequency")),
        (["search=layerwise"], ("search=layerwise needs hidden states",)),
        (["search=router_score"], ("search=router_score needs hidden states",)),
        (["search=frequency", "skipping=median"], ("skipping is calibrated on tokens",)),
        (["search=frequency", "search.measured=64"], ("search.measured=64 measures on tokens",)),
    ],
)
def test_what_counts_do_not_decide_is_refused_by_name(words: list[str], says: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "sums.json").write_text(json.dumps(traffic.sums(COUNTS, 600)))
    _refused(tmp_path / "sums.json", [w for word in words for w in ("-p", word)], says)


def _refused(file: Path, more: list[str], says: tuple[str, ...]) -> None:
    done = moeflow("plan", str(MIXTRAL), "-p", f"model={running.SMALL}", "-p", f"tokens=traffic:{file}", "-p", "keep=5",
                   "-p", "heldout=python:stdlib/t*.py", "-p", "heldout.length=64", *more, "--store", "none")  # fmt: skip
    said = done.output.strip()
    assert done.exit_code == 2 and len(said.splitlines()) == 1, said
    for words in says:
        assert words in said, said


GOOD = {"input_ids": [3, 4, 5], "routed_experts": [[[0, 1]] * 4] * 3}
TWICE = {i: [100.0] * 8 for i in range(4)}
BAD: dict[str, tuple[Any, tuple[str, ...]]] = {
    "no JSON": ("{", ("requests.jsonl, line 1: no JSON",)),
    "nothing": ("", ("requests.jsonl has no routed token of layer 0",)),
    "a text": ([{"text": "a"}], ("line 1: has no routed_experts", "--enable-return-routed-experts")),
    "the second line": ([GOOD, {"input_ids": [3], "routed_experts": 7}], ("requests.jsonl, line 2: routed_experts has 0 dim",)),
    "no base64": ([GOOD | {"routed_experts": "%%%"}], ("line 1: routed_experts cannot be read",)),
    "another number of layers": ([GOOD | {"routed_experts": [[[0, 1]] * 3] * 3}], ("is [3, 3, 2], and the model has 4 layers",)),
    "another number of layers, flat": (
        [GOOD | {"routed_experts": traffic.sglang(np.zeros(18))}], ("is 18 numbers for 3 tokens, and the model has 4 layers",),
    ),
    "another top k": ([GOOD | {"routed_experts": [[[0, 1, 2]] * 4] * 3}], ("has 3 experts a token, and the model 2",)),
    "another number of experts": ([GOOD | {"routed_experts": [[[0, 8]] * 4] * 3}], ("has expert 8 in layer 0",)),
    "an expert twice": ([GOOD | {"routed_experts": [[[0, 0]] * 4] * 3}], ("an expert twice for one token of layer 0",)),
    "more tokens than it has": ([GOOD | {"routed_experts": [[[0, 1]] * 4] * 4}], ("has 4 tokens, and the request 3",)),
    "broken numbers": ([GOOD | {"routed_experts": [[[0.5, 1]] * 4] * 3}], ("of float64; it is whole numbers",)),
    "a ragged list": ([GOOD | {"routed_experts": [[[0, 1]] * 4, [[0]] * 4]}], ("routed_experts cannot be read",)),
    "a foreign token": ([GOOD | {"input_ids": [3, 4, 512]}], ("input_ids has the token id 512", "0 to 511")),
    "tokens that are words": ([GOOD | {"input_ids": ["a"]}], ("input_ids is no list of token ids",)),
    "no choices": ([{"choices": []}], ("choices is no list of objects",)),
    "too few tokens": ([GOOD], ("has 3 token ids, and 128 sequences of 2048 need 262,144",)),
    "sums of another version": ([traffic.sums(COUNTS, 600, moeflow_traffic=2)], ("moeflow_traffic is 2, and this moeflow reads",)),
    "sums of another family": ([traffic.sums(COUNTS, 600, model_type="olmoe")], ("model_type is 'olmoe', and the model has",)),
    "sums of another width": ([traffic.sums(COUNTS, 600, hidden_size=32)], ("hidden_size is 32, and the model has 64",)),
    "sums of fewer layers": ([traffic.sums({0: COUNTS[0]}, 600)], ("has no routed token of layer 1",)),
    "sums of more layers": ([traffic.sums(COUNTS | {4: COUNTS[0]}, 600)], ("layer 4 has no routed experts in the model",)),
    "sums of fewer experts": ([traffic.sums({i: [1.0] * 6 for i in range(4)}, 600)], ("counts of layer 0 have shape [6]",)),
    "sums below zero": ([traffic.sums({i: [-1.0] * 8 for i in range(4)}, 600)], ("counts of layer 0 have a number that is neg",)),
    "sums that are too large": ([traffic.sums(TWICE, 300)], ("counts of layer 0 are more than 300 tokens can have",)),
    "sums without layers": ([traffic.sums(COUNTS, 600, layers=[])], ("layers is no object",)),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_file_that_lies_is_refused_in_one_line_when_it_is_planned(what: str, tmp_path: Path) -> None:
    rows, says = BAD[what]
    file = tmp_path / "requests.jsonl"
    file.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
    _refused(file, ["-p", "search=frequency"], says)


@pytest.mark.parametrize("word", ["traffic:a.json,b.jsonl", "b.jsonl,traffic:a.json", "traffic:a.json*2", "traffic:a.json#text"])
def test_it_stands_alone(word: str) -> None:
    with pytest.raises(ValueError, match="traffic:FILE"):
        Texts(word)
