"""What two models answer is judged item by item, and a model that is broken answers worse in every kind of check."""

import json
from pathlib import Path

import pytest

from moeflow.methods.judge import steps as judge
from moeflow.methods.judge.options import Prompts
from moeflow.report.figures import read_figures
from moeflow.step import upstream
from tests import running, tiny
from tests.methods.judge.judging import TASKS, broken, judged, rows, tasks


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[running.Store, judge.Judged]:
    folder = tmp_path_factory.mktemp("judge")
    return running.store_in(folder), judged(running.SMALL, broken(folder / "broken"))


def test_a_broken_model_is_worse_in_every_kind_of_check(made: tuple[running.Store, judge.Judged]) -> None:
    store, models = made
    files = ",".join(str(TASKS / f"{name}.jsonl") for name in ("numbers", "code", "calls"))
    found = rows(store, models, tasks(files, limit=12), Prompts(str(TASKS / "prompts.jsonl"), limit=6, tokens=12))
    for figure in ("numbers", "code", "calls", "greedy_prefix", "sampled_prefix"):
        row = found[figure]
        assert row["compressed"] < row["original"] and row["better"] == "higher", figure
        assert row["change_interval"][0] <= row["compressed"] - row["original"] <= row["change_interval"][1] < 0, figure
        assert row["interval"][0] <= row["compressed"] <= row["interval"][1], figure
    for figure in ("numbers", "code", "calls"):
        assert found[figure]["wins"] < found[figure]["losses"] <= found[figure]["items"] == 12
    assert found["code"]["original"] == found["calls"]["original"] == 1
    assert found["repetition"]["compressed"] > found["repetition"]["original"] and found["repetition"]["better"] == "lower"


def test_a_model_agrees_with_itself_in_drawn_words_too_and_its_figures_are_those_a_gate_reads(
    made: tuple[running.Store, judge.Judged],
) -> None:
    store, models = made
    same = judge.Judged(models.original, models.original, "auto")
    (report,) = judge.reports(same, None, Prompts(str(TASKS / "prompts.jsonl"), limit=6, tokens=12))
    running.run(store, report)
    figures = {f.word: f for f in read_figures(store, [report.key])}
    assert (
        {*figures}
        == {*report.spec.figures}
        == {f"{n}[prompts]" for n in ("greedy_prefix", "sampled_prefix", "length", "repetition")}
    )
    for name in ("greedy_prefix", "sampled_prefix"):
        assert figures[f"{name}[prompts]"].change_interval == (0, 0) and figures[f"{name}[prompts]"].original > 8
    written = json.loads(store.artifact(report.key).file("report.json").read_text())["written"]
    assert len(written) == 6 and all(w["original"] == w["compressed"] for w in written) and any(w["original"] for w in written)


def test_another_compression_asks_the_original_nothing_again(made: tuple[running.Store, judge.Judged]) -> None:
    _, models = made
    other = judge.Judged(models.original, models.original, "auto")
    asked = tasks(str(TASKS / "code.jsonl"))
    first, second = ({s.key for s in upstream(judge.reports(m, asked, None)) if s.name == "judge.of_rows"} for m in (models, other))
    assert len(first) == 2 and len(second) == 1 and second < first


def test_what_cannot_be_judged_is_refused_in_one_line_when_the_graph_is_built(
    made: tuple[running.Store, judge.Judged], tmp_path: Path
) -> None:
    _, models = made

    def refused(words: str, wanted: str, **more: object) -> None:
        with pytest.raises(ValueError, match=wanted) as told:
            judge.reports(models, tasks(words, **more), None)
        assert "\n" not in str(told.value)

    (tmp_path / "talks.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "?"}], "answer": "1"}) + "\n")
    (tmp_path / "asked.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "2"}) + "\n")
    refused(str(TASKS / "prompts.jsonl"), "holds prompts alone, nothing to judge an answer by; give it as prompts=")
    refused(str(tmp_path / "talks.jsonl"), "talks.jsonl, which holds messages, needs a chat template, and the tokenizer has none")
    refused(str(tmp_path / "nowhere.jsonl"), "nowhere.jsonl: there")
    refused(str(tmp_path / "asked.jsonl"), "has 1 rows, so tasks.shots=1 leaves none to ask", shots=1)
    refused(str(TASKS / "code.jsonl"), "tasks.tokens=512 leaves no room for a prompt in the model's 512 positions", tokens=512)
    refused(str(TASKS / "code.jsonl"), "tasks.chat=true needs a chat template", chat=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "code.jsonl").write_text((TASKS / "code.jsonl").read_text())
    refused(
        f"{TASKS / 'code.jsonl'},{tmp_path / 'other' / 'code.jsonl'}",
        "two tasks or files of prompts have the figure code, so that no gate",
    )
    refused(str(TASKS / "code.jsonl"), "tasks.metrics=acc is for tasks of lm-evaluation-harness, and none is named", metrics="acc")
    plain = judged(tiny.write("mixtral", tmp_path / "plain"), running.SMALL)
    with pytest.raises(ValueError, match="the model has no tokenizer, so it can be asked nothing"):
        judge.reports(plain, tasks(str(TASKS / "code.jsonl")), None)
