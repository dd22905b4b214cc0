"""promote, rollback and history: a label moves if the gate lets it, one at a time, and its history says how."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from moeflow.cli import app
from moeflow.report import promotion
from moeflow.store import Record, Store, labels, versions
from moeflow.store.errors import LabelMoved, NotStored

PIPELINE = Path(__file__).with_name("gated_pipeline.py")
Cli = Callable[..., Result]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """`moeflow WORDS` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return lambda *words: CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)


@pytest.fixture
def three(cli: Cli) -> Cli:
    """gated@1, gated@2 and gated@3, of a KL of 0.01, 0.02 and 0.5; the gate of the last is kl<0.1."""
    for kl in (0.01, 0.02):
        assert cli("run", PIPELINE, "--name", "gated", "-p", f"kl={kl}").exit_code == 0
    assert cli("run", PIPELINE, "--name", "gated", "-p", "kl=0.5", "--gate", "kl<0.1").exit_code == 0
    return cli


def error(result: Result) -> str:
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in result.output
    return line


def moves(cli: Cli) -> list[dict[str, Any]]:
    printed: list[dict[str, Any]] = json.loads(cli("history", "production", "--json").stdout)
    return printed


def test_a_run_says_what_its_gate_would_say_and_names_it_in_the_record(cli: Cli) -> None:
    result = cli("run", PIPELINE, "-p", "kl=0.5", "--gate", "kl < 0.1")
    assert result.exit_code == 0 and "its gate would refuse it: kl[prose] is 0.5, and < 0.1 fails" in result.stdout
    assert json.loads(cli("ls", "--json").stdout)[0]["record"]["gate"] == ["kl < 0.1"]


def test_a_gate_that_names_a_figure_nobody_measures_is_refused_before_the_run(cli: Cli, tmp_path: Path) -> None:
    result = cli("run", PIPELINE, "--gate", "gsm8k>=0.95x")
    assert result.exit_code == 2 and "gsm8k, which no step of this pipeline measures" in error(result)
    assert not [*(tmp_path / ".moeflow" / "store").glob("manifests/*")]


def test_another_gate_for_the_same_bytes_is_another_version_and_none_is_not(cli: Cli) -> None:
    numbers = [
        json.loads(cli("run", PIPELINE, "--json", *words).stdout.splitlines()[-1])["version"]
        for words in ([], ["--gate", "kl<1"], ["--gate", "kl<1"], [], ["--gate", "kl<2"])
    ]
    assert numbers == [1, 2, 2, 2, 3]


def test_promote_asks_the_gate_that_the_run_named(three: Cli) -> None:
    refused = three("promote", "gated@3", "production")
    assert refused.exit_code == 1 and "gated@3 does not pass its gate" in error(refused) and "kl[prose] is 0.5" in error(refused)
    assert three("history", "production").exit_code == 2, "nothing was promoted"
    assert three("promote", "gated@1", "production", "--gate", "kl<0.015").exit_code == 0
    refused = three("promote", "gated@2", "production", "--gate", "kl<=1.5x promoted")
    assert refused.exit_code == 1 and "1.5 times the promoted version's 0.01" in error(refused)
    assert [m["ref"] for m in moves(three)] == ["gated@1"]


def test_forcing_takes_a_reason_that_is_kept_with_who_and_when(three: Cli) -> None:
    silent = three("promote", "gated@3", "production", "--force")
    assert silent.exit_code == 2 and "--why" in error(silent)
    assert three("promote", "gated@3", "production", "--force", "--why", "the demo is today").exit_code == 0
    (move,) = moves(three)
    assert move["forced"] is True and move["why"] == "the demo is today" and "@" in move["by"] and move["created"].startswith("20")
    shown = three("history", "production").stdout
    assert "forced past its gate (kl[prose] is 0.5" in shown and "because the demo is today" in shown
    three("promote", "gated@1", "production", "--force", "--why", "needless")
    assert "forced" not in moves(three)[-1], "its gate did not refuse it"


def test_a_rollback_goes_back_a_move_each_time(three: Cli) -> None:
    for ref in ("gated@1", "gated@2"):
        three("promote", ref, "production")
    three("promote", "gated@3", "production", "--force", "--why", "to try")
    assert three("rollback", "production", "--why", "it stutters").exit_code == 0
    assert json.loads(three("rollback", "production", "--json").stdout)["ref"] == "gated@1"
    none = three("rollback", "production")
    assert none.exit_code == 1 and "production has pointed at nothing before gated@1" in error(none)
    assert [(m["ref"], m["back_to"]) for m in moves(three)] == [
        ("gated@1", 0), ("gated@2", 0), ("gated@3", 0), ("gated@2", 2), ("gated@1", 1),
    ]  # fmt: skip
    three("promote", "gated@3", "production", "--force", "--why", "again")
    assert json.loads(three("rollback", "production", "--json").stdout)["ref"] == "gated@1"
    absent = three("rollback", "staging")
    assert absent.exit_code == 2 and "there is no label 'staging'" in error(absent)
    assert error(three("history", "productoin")).endswith("; did you mean production?")


def test_what_a_rollback_returns_to_is_kept_whatever_its_age(three: Cli) -> None:
    for ref in ("gated@1", "gated@2"):
        three("promote", ref, "production")
    listed = json.loads(three("gc", "--keep", "1", "--grace", "0s", "--json").stdout)
    assert listed["versions"] == []
    three("promote", "gated@3", "production", "--force", "--why", "to try")
    assert json.loads(three("gc", "--keep", "1", "--grace", "0s", "--json").stdout)["versions"] == ["gated@1"]


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_of_two_promotions_at_once_one_wins_and_the_other_is_told(
    where: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    store = Store.open(str(tmp_path / "store") if where == "disk" else request.getfixturevalue("s3_url"))
    for n in (1, 2, 3):
        folder = tmp_path / str(n)
        folder.mkdir()
        (folder / "x").write_text(str(n))
        store.commit(f"toy-{n}", folder, record=Record(step="test.toy", version=1))
        versions.publish(store, "toy", f"toy-{n}")
    promotion.promote(store, promotion.consider(store, "toy@1", "production"))
    both = [promotion.consider(store, f"toy@{n}", "production") for n in (2, 3)]

    def promoted(one: promotion.Considered) -> str:
        try:
            return promotion.promote(store, one).ref
        except LabelMoved as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        answers = [*pool.map(promoted, both)]
    (won,) = [a for a in answers if a.startswith("toy@")]
    (lost,) = [a for a in answers if a != won]
    assert lost.startswith(f"production was moved to {won} by ") and "\n" not in lost
    assert versions.labelled(store) == {"production": won} and len(labels.history(store, "production")) == 2


def test_a_rollback_to_a_version_that_was_deleted_is_told(cli: Cli, tmp_path: Path) -> None:
    for kl in (0.01, 0.02):
        cli("run", PIPELINE, "--name", "gated", "-p", f"kl={kl}")
        cli("promote", "gated", "production")
    cli("rm", "gated@1", "--delete")
    assert cli("rollback", "production").exit_code == 1
    store = Store.open(str(tmp_path / ".moeflow" / "store"))
    with pytest.raises(NotStored, match="gated@1 is not in"):
        versions.rollback(store, "production")
    assert versions.labelled(store) == {"production": "gated@2"}
