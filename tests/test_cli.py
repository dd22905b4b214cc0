"""The command line: what it prints, what it leaves and how it exits."""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import moeflow
from moeflow.cli import app
from moeflow.store import Store, names, versions
from tests import servers

PIPELINE = Path(__file__).with_name("toy_pipeline.py")
ROOT = Path(__file__).parents[1]

Cli = Callable[..., Result]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """`moeflow WORDS` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def call(*words: str) -> Result:
        return CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)

    return call


def last_json(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def error(result: Result) -> str:
    """The one line that an error is."""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert line == result.stderr.splitlines()[-1] and "Traceback" not in result.output
    return line


def test_run_publishes_shows_the_reports_and_says_where_it_lies(cli: Cli, tmp_path: Path) -> None:
    result = cli("run", PIPELINE)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert any("original" in line and "compressed" in line for line in lines)
    assert any(line.split() == ["perplexity", "12.5", "13.25"] for line in lines)
    assert "- without a tokenizer" in lines
    assert any(line.startswith("toy_pipeline@1  toy.total-") for line in lines)
    assert str(tmp_path / ".moeflow" / "store") in result.stdout
    assert "8 steps: 8 run, 0 stored" in result.stderr


def test_run_as_json_ends_with_one_line(cli: Cli) -> None:
    printed = last_json(cli("run", PIPELINE, "--json"))
    assert printed.pop("seconds") > 0
    assert printed.pop("key").startswith("toy.total-")
    assert printed == {"name": "toy_pipeline", "version": 1, "steps": {"run": 8, "stored": 0}}
    again = last_json(cli("run", PIPELINE, "--json"))
    assert (again["version"], again["steps"]) == (1, {"run": 0, "stored": 8})


@pytest.mark.parametrize("words", [["-m", "moeflow"], ["-c", "from moeflow.cli import main; main()"]])
def test_the_command_says_its_version_also_by_python_m(words: list[str]) -> None:
    done = subprocess.run([sys.executable, *words, "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"moeflow {moeflow.__version__}\n", "")


def test_another_parameter_makes_another_version(cli: Cli) -> None:
    cli("run", PIPELINE, "--name", "small")
    printed = last_json(cli("run", PIPELINE, "--name", "small", "-p", "numbers=4", "--json"))
    assert (printed["name"], printed["version"], printed["steps"]) == ("small", 2, {"run": 3, "stored": 7})


def test_a_pipeline_file_run_by_itself_is_the_same_thing(cli: Cli, tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, PIPELINE, "-p", "numbers=2", "--store", "store", "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    alone = json.loads(done.stdout.splitlines()[-1])
    through = last_json(cli("run", PIPELINE, "-p", "numbers=2", "--store", "store", "--json"))
    assert through["key"] == alone["key"] and through["name"] == alone["name"] == "toy_pipeline"
    assert through["steps"] == {"run": 0, "stored": alone["steps"]["run"]}


def test_a_file_may_hand_over_a_graph_function_of_any_name(tmp_path: Path) -> None:
    file = tmp_path / "two"
    file.write_text(
        '"""Two graphs."""\nfrom moeflow.cli import main\nfrom tests.run import toy\n'
        "def half(n: int = 6):\n    return toy.half(toy.number(n=n))\nmain(half)\n"
    )
    words = [sys.executable, str(file), "-p", "n=8", "--store", str(tmp_path / "store"), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["name"] == "two"


def test_a_finished_pipeline_never_looks_for_ray(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cli("run", PIPELINE)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # where nothing listens
    assert last_json(cli("run", PIPELINE, "--json"))["steps"]["run"] == 0


def test_plan_says_what_run_then_does(cli: Cli) -> None:
    cli("run", PIPELINE)
    planned = last_json(cli("plan", PIPELINE, "-p", "numbers=5", "--json"))
    assert planned["steps"] == {"run": 5, "stored": 7, "same content": 0, "not needed": 0}
    shown = cli("plan", PIPELINE, "-p", "numbers=5")
    assert "12 steps: 5 to run, 7 stored; reads 56 bytes, writes 40 bytes" in shown.stdout
    assert "number n 50" in cli("plan", PIPELINE, "-p", "numbers=5", "--all").stdout
    assert last_json(cli("run", PIPELINE, "-p", "numbers=5", "--json"))["steps"] == {"run": 5, "stored": 7}


def test_what_cannot_work_is_refused_by_plan_and_by_run(cli: Cli) -> None:
    planned = cli("plan", PIPELINE, "-p", "huge=true")
    assert planned.exit_code == 2 and "cannot work: " in planned.stdout
    result = cli("run", PIPELINE, "-p", "huge=true")
    assert result.exit_code == 2 and "free" in error(result)
    assert not list(Store.open(".moeflow/store").blobs.list("manifests/")), "nothing was started"


def test_failed_work_is_one_line_and_exit_code_one(cli: Cli) -> None:
    result = cli("run", PIPELINE, "-p", "fail=true")
    assert result.exit_code == 1
    assert "toy.fail failed: ArithmeticError: no such expert (key toy.fail-" in error(result)
    told = cli("run", PIPELINE, "-p", "fail=true", "--json")
    assert json.loads(told.stdout.splitlines()[-1])["exit"] == told.exit_code == 1
    assert f"error: {json.loads(told.stdout.splitlines()[-1])['error']}" == error(told)


def test_debug_shows_the_traceback(cli: Cli) -> None:
    result = cli("run", PIPELINE, "-p", "fail=true", "--debug")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr and "raise ArithmeticError(message)" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", PIPELINE, "-p", "keep=4"], "no parameter 'keep'; it has numbers, size, fail, huge"),
        (["run", PIPELINE, "-p", "numbers=many"], "whole number"),
        (["run", "missing.py"], "no pipeline missing.py"),
        (["run", PIPELINE, "--name", "a/b"], "name 'a/b'"),
        (["run", PIPELINE, "--store", "s3://"], "s3://"),
        (["plan", PIPELINE, "-p", "fail=perhaps"], "true or false"),
        (["show", "toy_pipeline"], "no store"),
        (["ls", "--store", "elsewhere"], "no store"),
        (["pull", "nothing@1", "folder", "--store", "."], "nothing@1"),
        (["promote", "nothing@1", "label"], "nothing@1"),
        (["gc", "--grace", "soon", "--store", "."], "as in 7d"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_code_two(cli: Cli, words: list[str], said: str) -> None:
    result = cli(*words)
    assert result.exit_code == 2
    assert said in error(result)


def test_an_unknown_option_exits_with_two(cli: Cli) -> None:
    assert cli("run", PIPELINE, "--nonsense").exit_code == 2


def test_ls_lists_versions_newest_last_with_labels(cli: Cli) -> None:
    cli("run", PIPELINE)
    cli("run", PIPELINE, "-p", "size=9")
    assert cli("promote", "toy_pipeline@1", "production").exit_code == 0
    head, *lines = (line.strip() for line in cli("ls").stdout.splitlines())
    assert head.split() == ["version", "made", "(UTC)", "weights", "resident", "KL", "key", "labels"]
    assert [line.split()[0] for line in lines] == ["toy_pipeline@1", "toy_pipeline@2"]
    assert lines[0].endswith("production") and not lines[1].endswith("production")
    printed = last_json(cli("ls", "--json"))
    assert [(v["ref"], v["labels"]) for v in printed] == [("toy_pipeline@1", ["production"]), ("toy_pipeline@2", [])]
    assert last_json(cli("ls", "other", "--json")) == []
    assert cli("ls", "toy_pipelin").stderr.strip().endswith("; did you mean toy_pipeline?")


def test_show_tells_lineage_parameters_libraries_sources_and_reports(cli: Cli) -> None:
    key = last_json(cli("run", PIPELINE, "--json"))["key"]
    shown = cli("show", "toy_pipeline").stdout
    assert "toy_pipeline@1" in shown and key in shown and "size = 8" in shown
    assert "toy.number" in shown and "toy.half" in shown and "numpy" in shown and "12.5" in shown
    source = Store.open(".moeflow/store").manifest(key).source
    assert source[:8] in shown
    printed = last_json(cli("show", key, "--json"))
    assert printed["key"] == key and printed["version"]["ref"] == "toy_pipeline@1"
    assert len(printed["lineage"]) == 7 and printed["reports"][0]["rows"][0]["name"] == "perplexity"
    assert all(m["key"] in cli("show", "toy_pipeline", "--all").stdout for m in printed["lineage"])


def test_show_tells_the_pipeline_and_the_parameters_that_were_given_whatever_the_name(cli: Cli) -> None:
    cli("run", PIPELINE, "--name", "small", "-p", "numbers=2", "-p", "size=16")
    lines = cli("show", "small").stdout.splitlines()
    assert lines[0] == "small@1" and f"pipeline   {shlex.quote(str(PIPELINE))}" in lines
    assert [line.split() for line in lines if " -p " in f" {line}"] == [["given", "-p", "numbers=2"], ["-p", "size=16"]]
    record = last_json(cli("show", "small", "--json"))["version"]["record"]
    assert (record["pipeline"], record["given"]) == (str(PIPELINE), ["numbers=2", "size=16"])
    assert record["parameters"] == {"numbers": "2", "size": "16", "fail": "false", "huge": "false"}
    cli("run", PIPELINE)
    assert not any("-p" in line.split() for line in cli("show", "toy_pipeline").stdout.splitlines())


def test_gpus_that_this_machine_lacks_are_refused_in_one_line(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    refused = cli("run", PIPELINE, "--gpus", "1")
    assert refused.exit_code == 2
    assert error(refused) == (
        "error: --gpus 1: torch sees no GPU on this machine; leave --gpus away, or start where GPUs are, as with --runner ray"
    )
    assert last_json(cli("ls", "--json", "--store", ".moeflow/store")) == []
    assert cli("run", PIPELINE, "--gpus", "0").exit_code == 0
    assert cli("run", PIPELINE, "--gpus", "1").exit_code == 0, "nothing is left to run"


def test_show_takes_labels_and_beginnings_of_keys(cli: Cli) -> None:
    key = last_json(cli("run", PIPELINE, "--json"))["key"]
    cli("promote", "toy_pipeline", "production", "--json")
    for ref in ("production", key, key[:-8]):
        assert last_json(cli("show", ref, "--json"))["key"] == key


def test_pull_copies_and_refuses_a_folder_that_holds_something(cli: Cli, tmp_path: Path) -> None:
    key = last_json(cli("run", PIPELINE, "--json"))["key"]
    printed = last_json(cli("pull", key, "out", "--json"))
    assert (printed["key"], printed["files"], printed["bytes"]) == (key, 1, 8)
    mine = tmp_path / "out" / "n"
    assert mine.read_text().strip() == "30"
    mine.write_text("spoilt")
    assert Store.open(".moeflow/store").artifact(key).file("n").read_text().strip() == "30"
    result = cli("pull", key, "out")
    assert result.exit_code == 2 and "not empty" in error(result)
    assert mine.read_text() == "spoilt"


def test_gc_lists_before_it_deletes_and_spares_what_a_version_reaches(cli: Cli) -> None:
    kept = last_json(cli("run", PIPELINE, "--json"))["key"]
    cli("run", PIPELINE, "-p", "fail=true", "-p", "size=16")  # leaves a total that nothing reaches
    store = Store.open(".moeflow/store")
    assert last_json(cli("gc", "--json"))["manifests"] == [], "everything is younger than a week"
    listed = last_json(cli("gc", "--grace", "0s", "--json"))
    (dead,) = listed["manifests"]
    assert not listed["deleted"] and store.has(dead)
    assert "delete with --delete" in cli("gc", "--grace", "0s").stdout
    gone = last_json(cli("gc", "--grace", "0s", "--delete", "--json"))
    assert gone["manifests"] == [dead] and gone["deleted"]
    assert not store.has(dead) and store.has(kept)
    assert last_json(cli("run", PIPELINE, "--json"))["steps"]["run"] == 0
    assert "nothing to delete" in cli("gc", "--grace", "0s").stdout


def test_verify_tells_what_is_damaged_and_repair_drops_it(cli: Cli) -> None:
    cli("run", PIPELINE)
    assert "all as they were written" in cli("verify", "--all").stdout
    assert cli("verify", "toy_pipeline").exit_code == 0
    store = Store.open(".moeflow/store")
    key = next(k for k in store.index(["toy.number"]).keys)
    blob = names.blob(store.manifest(key).files["n"].sha256)
    store.blobs.delete([blob])
    told = cli("verify", "toy_pipeline")
    assert told.exit_code == 1 and blob in told.stdout and "toy_pipeline@1 rests on them" in told.stdout
    printed = json.loads(cli("verify", "--all", "--json").stdout)
    assert printed["damaged"].keys() == {blob} and key in printed["keys"] and store.has(key)
    assert cli("verify", "--all", "--repair").exit_code == 0 and not store.has(key)
    assert last_json(cli("run", PIPELINE, "--json"))["steps"]["run"] > 1
    assert cli("verify", "--all").exit_code == 0


def test_verify_wants_a_version_or_all(cli: Cli) -> None:
    cli("run", PIPELINE)
    for words in (["verify"], ["verify", "toy_pipeline", "--all"]):
        result = cli(*words)
        assert result.exit_code == 2 and "name a version or key, or say --all" in error(result)


def test_promote_moves_a_label(cli: Cli) -> None:
    cli("run", PIPELINE)
    cli("run", PIPELINE, "-p", "size=9")
    cli("promote", "toy_pipeline@1", "production")
    printed = last_json(cli("promote", "toy_pipeline@2", "production", "--json"))
    assert (printed["label"], printed["ref"]) == ("production", "toy_pipeline@2")
    assert versions.labelled(Store.open(".moeflow/store")) == {"production": "toy_pipeline@2"}


def test_a_store_that_goes_with_the_ray_cluster_is_warned_about(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "working_dir_files" / "_ray_pkg_0"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    assert "pass --store" in cli("run", PIPELINE).stderr
    assert "pass --store" not in cli("run", PIPELINE, "--store", "here").stderr


def test_the_command_line_needs_no_torch_and_no_ray_to_say_what_is_stored(cli: Cli, tmp_path: Path) -> None:
    cli("run", PIPELINE)
    script = (
        "import sys; from moeflow.cli import app\n"
        "app(['ls'], standalone_mode=False)\n"
        "print(sorted({'torch', 'ray', 'transformers', 'pyarrow'} & set(sys.modules)))"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_a_run_outlasts_an_outage_and_says_so_once(cli: Cli, s3_url: str, server: servers.Proxy) -> None:
    down: dict[str, float] = {}

    def fault(method: str, path: str) -> servers.Fault | None:
        if method == "PUT" and "/blobs/" in path:
            down.setdefault("since", time.monotonic())
        away = "since" in down and time.monotonic() < down["since"] + 3
        return servers.Fault(520, "Down") if away else None

    server.fault = fault
    result = cli("run", PIPELINE, "--store", s3_url, "--patience", "2m")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("does not answer; it is waited for, up to 2 min") == 1


@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_store_that_is_down_is_no_wrong_request(cli: Cli, s3_url: str, server: servers.Proxy, command: str) -> None:
    server.fault = lambda method, path: servers.Fault(520, "Down")
    result = cli(command, PIPELINE, "--store", s3_url, "--patience", "1s")
    assert result.exit_code == 1
    assert "it was waited for, 1 s" in error(result)
    assert cli("ls", "--store", s3_url).exit_code == 1


def test_a_plan_writes_nothing(cli: Cli, s3_url: str, server: servers.Proxy, tmp_path: Path) -> None:
    server.fault = lambda method, path: None if method in ("GET", "HEAD") else servers.Fault(403, "AccessDenied")
    assert cli("plan", PIPELINE, "--store", s3_url).exit_code == 0
    assert cli("plan", PIPELINE).exit_code == 0
    assert not (tmp_path / ".moeflow").exists()
    (tmp_path / "file").write_text("")
    assert "is a file" in error(cli("plan", PIPELINE, "--store", "file"))


def test_a_time_that_is_none_is_told(cli: Cli) -> None:
    assert "--patience 15: write a number and s, m, h or d" in error(cli("run", PIPELINE, "--patience", "15"))


def test_a_version_is_removed_after_what_that_frees_was_listed(cli: Cli) -> None:
    for numbers in (3, 4):
        cli("run", PIPELINE, "-p", f"numbers={numbers}")
    listed = cli("rm", "toy_pipeline@1")
    assert listed.stdout.splitlines()[0] == "toy_pipeline@1" and "delete with --delete" in listed.stdout
    assert len(last_json(cli("ls", "--json"))) == 2
    gone = last_json(cli("rm", "toy_pipeline@1", "--delete", "--json"))
    assert gone["versions"] == ["toy_pipeline@1"] and len(gone["manifests"]) == 1 and gone["bytes"] == 0
    (left,) = last_json(cli("ls", "--json"))
    assert (left["ref"], left["bytes"]) == ("toy_pipeline@2", 8)
    assert "8 bytes" in cli("ls").stdout
    assert "write toy_pipeline@2" in error(cli("rm", "toy_pipeline"))
    cli("promote", "toy_pipeline@2", "production")
    assert "production is toy_pipeline@2" in error(cli("rm", "toy_pipeline@2"))


def test_results_stay_and_the_rest_is_computed_again_when_it_is_asked_for(cli: Cli) -> None:
    cli("run", PIPELINE)
    first = last_json(cli("run", PIPELINE, "--json"))
    assert last_json(cli("gc", "--keep-results", "--delete", "--json"))["bytes"] > 0
    again = last_json(cli("run", PIPELINE, "--json"))
    assert again["steps"]["run"] == 0 and again["version"] == first["version"]
    more = last_json(cli("run", PIPELINE, "-p", "size=9", "--json"))
    assert more["steps"]["run"] == 7
    assert "toy.number" in cli("show", "toy_pipeline@1").stdout
    assert last_json(cli("gc", "--keep", "1", "--json"))["versions"] == ["toy_pipeline@1"]
