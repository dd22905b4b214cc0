"""Versions side by side: what differs is told, and what is the same is not."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from moeflow.cli import app
from moeflow.report import about, comparing
from moeflow.run import in_process
from moeflow.store import Store, versions
from tests.report.conftest import TOKENS, call
from tests.report.reporting import reported


@pytest.fixture(scope="module")
def compared(told: Path) -> dict:
    made: dict = json.loads(call(told, "compare", "told_pipeline@1", "told_pipeline@2", "--json").stdout)
    return made


def test_figures_stand_side_by_side_with_their_change(compared: dict) -> None:
    rows = {row["figure"]: row for row in compared["figures"]}
    assert [v["ref"] for v in compared["versions"]] == ["told_pipeline@1", "told_pipeline@2"]
    assert (rows["experts"]["original"], rows["experts"]["values"]) == (8, [6, 5])
    six, five = rows["bytes"]["values"]
    assert rows["bytes"]["change"] == [None, pytest.approx(100 * (five - six) / six)] and five < six
    assert rows["kl"]["text"] == "prose | notes" and all(low <= high for low, high in rows["kl"]["intervals"])


def test_divergences_on_one_text_are_paired_sequence_by_sequence(told: Path, compared: dict) -> None:
    (row,) = compared["paired"]
    opened = Store.open(str(told / "store"))
    each = []
    for ref in ("told_pipeline@1", "told_pipeline@2"):
        (raw,) = about.of(opened, ref).of_kind("quality")
        each.append(np.array(raw["divergence_of_sequences"]))
    difference = each[1] - each[0]
    assert row["difference"] == pytest.approx(difference.mean()) and row["sequences"] == 8
    assert row["interval"][0] <= row["difference"] <= row["interval"][1]
    assert (row["wins"], row["losses"]) == ((difference < 0).sum(), (difference > 0).sum())
    assert row["verdict"] == ("farther" if row["interval"][0] > 0 else "undecided" if row["interval"][1] > 0 else "closer")


def test_speeds_that_were_measured_on_two_occasions_are_not_judged(tmp_path: Path) -> None:
    for n, original in enumerate((100.0, 80.0), 1):
        rows = ("decode", original, 50.0 * n, "tokens/s", "decode"), ("bytes", 9, n, "B", "bytes")
        named = [
            {"name": n_, "original": o, "compressed": c, "unit": u, "figure": f, "better": "higher"} for n_, o, c, u, f in rows
        ]
        made = reported(report={"kind": "speed", "columns": ["original", "compressed"], "rows": named})
        in_process.run([made], opened := Store.open(str(tmp_path)))
        versions.publish(opened, "toy", made.key, reports=[made.key])
    speed, size = comparing.figures([about.of(opened, f"toy@{n}") for n in (1, 2)])
    assert speed["apart"] and not size["apart"]
    text = CliRunner().invoke(app, ["compare", "toy@1", "toy@2", "--store", str(tmp_path)]).stdout
    assert "+100 %, measured apart" in text and "+100 %, better" in text


def quality(kl: list[float], before: list[float], after: list[float], scored: tuple[float, float, float]) -> dict:
    """A report on one text, and a score with its interval."""
    part, low, high = scored
    rows = [
        ("KL (prose)", 0.0, float(np.mean(kl)), "kl", "lower", {"text": "prose"}),
        (
            "perplexity (prose)",
            float(np.exp(np.mean(before))),
            float(np.exp(np.mean(after))),
            "perplexity",
            "lower",
            {"text": "prose"},
        ),
        ("sums", 0.5, part, "sums", "higher", {"interval": [low, high]}),
    ]
    each = {"divergence_of_sequences": kl, "losses_of_sequences": [before, after], "agreement_of_sequences": [0.5] * len(kl)}
    named = [{"name": a, "original": o, "compressed": c, "unit": "", "figure": f, "better": b} | m for a, o, c, f, b, m in rows]
    return {"kind": "quality", "columns": ["original", "compressed"], "rows": named, "text": "prose"} | each


def test_a_change_is_called_better_only_where_its_interval_says_so(tmp_path: Path) -> None:
    """As on the page of a version: two on the same sequences are paired, and other scores are told apart by their intervals."""
    before, opened = [3.0, 3.2, 2.9, 3.1], Store.open(str(tmp_path))
    versions_of = [
        quality([0.20, 0.22, 0.21, 0.19], before, [3.1, 3.1, 3.0, 3.1], (0.5, 0.4, 0.6)),
        quality([0.10, 0.12, 0.11, 0.09], before, [3.0, 3.2, 2.9, 3.15], (0.55, 0.45, 0.65)),
        quality([0.10, 0.12, 0.11, 0.09], before, [4.0, 4.2, 3.9, 4.1], (0.8, 0.7, 0.9)),
    ]
    for told_of in versions_of:
        in_process.run([made := reported(report=told_of)], opened)
        versions.publish(opened, "toy", made.key, reports=[made.key])
    rows = comparing.figures([about.of(opened, f"toy@{n}") for n in (1, 2, 3)])
    assert {row["figure"]: row["verdicts"][1:] for row in rows} == {
        "kl": ["better", "better"], "perplexity": ["undecided", "worse"], "sums": ["undecided", "better"],
    }  # fmt: skip
    text = CliRunner().invoke(app, ["compare", "toy@1", "toy@2", "--store", str(tmp_path)]).stdout
    assert "+10 %, undecided" in text and "-48.8 %, better" in text


def test_what_a_recipe_left_at_its_default_is_not_given(told: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(told)
    shutil.copytree(told / "store", tmp_path / "store")  # others count the versions in that
    call(tmp_path, "pull", "told_pipeline@2", tmp_path / "out")
    again = call(tmp_path, "run", tmp_path / "out" / "recipe.yaml", "-p", "keep=5", "--name", "again", "--json")
    assert again.exit_code == 0, again.output
    record = about.of(Store.open(str(tmp_path / "store")), "again").record
    assert sorted(record["given"]) == ["keep=5", "model=model", f"tokens={TOKENS}"]


def test_layers_tell_which_experts_differ_and_how_much_is_shared(compared: dict) -> None:
    assert [row["layer"] for row in compared["layers"]] == [0, 1, 2]
    for row in compared["layers"]:
        six, five = map(set, row["kept"])
        assert five < six and row["overlap"] == [None, pytest.approx(5 / 6)]


def test_options_and_lineage_tell_only_what_differs(compared: dict) -> None:
    assert [(o["name"], o["values"]) for o in compared["options"]] == [("keep", ["6", "5"])]
    lineage = compared["lineage"]
    assert lineage["sources"] == [] and lineage["libraries"] == []
    assert {s["step"] for s in lineage["steps"]} == {"checkpoint.assemble_as", "prune.choose", "rewrite.experts"}
    assert all(s["keys"][0] == s["keys"][1] for s in lineage["steps"]) and 0 < lineage["shared"] < min(lineage["keys"])


def test_a_version_beside_itself_differs_in_nothing(told: Path) -> None:
    opened = Store.open(str(told / "store"))
    same = comparing.compare([about.of(opened, "told_pipeline@1"), about.of(opened, "told_pipeline@1")])
    assert same["layers"] == same["options"] == same["lineage"]["steps"] == []
    assert [row["verdict"] for row in same["paired"]] == ["the same"]
    assert all(row["change"][1] in (0, None) for row in same["figures"])


def test_the_terminal_has_the_same_in_words(told: Path) -> None:
    shown = call(told, "compare", "told_pipeline@1", "told_pipeline@2", "told_pipeline@1")
    assert shown.exit_code == 0
    text = " ".join(shown.stdout.split())
    assert "told_pipeline@2 against told_pipeline@1" in text and "83% of the experts in common; less:" in text
    assert "KL to the original (prose | notes)" in text and "keep 6 5 6" in text


@pytest.mark.parametrize(("refs", "said"), [(["told_pipeline@1"], "needs two versions"), (["told_pipeline", "nobody"], "nobody")])
def test_what_cannot_be_compared_is_told_in_one_line(told: Path, refs: list[str], said: str) -> None:
    refused = call(told, "compare", *refs)
    (line,) = refused.stderr.splitlines()
    assert refused.exit_code == 2 and said in line


def test_a_number_is_the_same_however_it_is_spelt() -> None:
    """A recipe.yaml gives back 0.0 where a pipeline's default says 0."""
    said = ({"share": "0", "keep": "6", "search": "reap"}, {"share": "0.0", "keep": "5", "search": "reap"})
    made: Any = [SimpleNamespace(record={"pipeline": "mixtral", "parameters": one, "given": []}) for one in said]
    assert [row["name"] for row in comparing.options(made)] == ["keep"]
