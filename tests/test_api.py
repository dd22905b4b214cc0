"""moeflow from Python: the same run, checks and messages as the command line, and what is done with the version that it returns."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import moeflow
from moeflow.cli import app
from moeflow.methods.graph import Calibrating
from moeflow.methods.prune.searches import Search
from moeflow.run import pipeline
from moeflow.run.opening import shipped
from moeflow.run.words_of import words_of
from moeflow.step import Step
from moeflow.store import NotStored, StoreError
from tests import servers
from tests.run import toy
from tests.running import SMALL

TOY = Path(__file__).with_name("toy_pipeline.py")
ROOT = Path(__file__).parents[1]
SHORT: dict[str, Any] = dict(
    model=SMALL, tokens="python:stdlib/a*.py", heldout={"texts": "python:stdlib/t*.py", "sequences": 2, "length": 64},
    calibration=Calibrating(8, 64),
)  # fmt: skip


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return str(tmp_path / "store")


def python(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_moeflow_imports_nothing_that_is_large() -> None:
    loaded = python("import sys; before = {*sys.modules}; import moeflow; print(*{*sys.modules} - before)")
    assert {name for name in loaded if name.startswith("moeflow")} == {"moeflow", "moeflow.model", "moeflow.model.autoload"}
    assert not {"torch", "transformers", "ray", "boto3", "numpy", "rich", "typer"} & {*loaded}


def test_a_run_returns_what_the_command_line_publishes(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = moeflow.run(TOY, store=store, name="toy", numbers=2)
    assert "6 steps: 6 run" in capsys.readouterr().err
    result = CliRunner().invoke(app, ["run", str(TOY), "--store", store, "--name", "toy", "-p", "numbers=2", "--json"])
    told = json.loads(result.stdout.splitlines()[-1])
    assert told["key"] == made.key and told["steps"]["run"] == 0
    assert (made.ref, made.about.record["given"]) == ("toy@1", ["numbers=2"])


def test_text_that_nobody_named_is_said_to_be_the_default(store: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    default = "by default that is text on the hub: hf://datasets/"
    with pytest.raises(ValueError, match=f"^-p tokens= and -p heldout= were not given, and {default}allenai/c4@main"):
        moeflow.run("mixtral", model=SMALL, store=store, patience="0s")
    with pytest.raises(ValueError, match=f"^-p heldout= was not given, and {default}Salesforce/wikitext@main.*heldout=FILE"):
        moeflow.run("mixtral", **SHORT | {"heldout": {"length": 64}}, store=store, patience="0s")
    with pytest.raises(ValueError, match="^hf://datasets/org/text/a.txt: the hub"):
        moeflow.run("mixtral", model=SMALL, tokens="hf://datasets/org/text/a.txt", store=store, patience="0s")


def test_an_error_of_options_names_the_parameters_that_it_is_about(store: str) -> None:
    with pytest.raises(ValueError, match="^-p heldout.length, -p calibration.length: length=2048 is more than the model's 512"):
        moeflow.fit(str(SMALL), bytes="1MiB", tokens="python:stdlib/a*.py", heldout="python:stdlib/t*.py", store=store)
    with pytest.raises(ValueError, match="^-p heldout.length: length=600 is more than the model's 512"):
        moeflow.run("mixtral", **SHORT | {"heldout": {"texts": "python:stdlib/t*.py", "length": 600}}, store=store)
    with pytest.raises(ValueError, match="^-p calibration: shard=-1 sequences and stage=8 layers must be at least 1"):
        moeflow.run("mixtral", **SHORT | {"calibration": {"shard": -1}}, store=store)


def test_a_device_is_said_as_transformers_says_it() -> None:
    with pytest.raises(TypeError, match="^device='cpu': where a model is loaded is said by device_map='cpu'$"):
        moeflow.load(str(SMALL), device="cpu")


def test_progress_is_shown_only_where_it_is_wanted(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    moeflow.run(TOY, store=store, progress=False)
    assert capsys.readouterr() == ("", "")


def test_the_figures_are_records_and_a_table(store: str) -> None:
    table = moeflow.run(TOY, store=store, progress=False).report
    assert table.records == [{"kind": "quality", "name": "perplexity", "original": 12.5, "compressed": 13.25, "unit": ""}]
    assert str(table).splitlines()[-1].split() == ["perplexity", "12.5", "13.25"]
    assert '<td style="text-align:left">perplexity</td>' in table._repr_html_()
    assert table.row("perplexity")["original"] == 12.5
    with pytest.raises(KeyError, match="no figure 'ppl'; there are perplexity"):
        table.row("ppl")


def test_a_version_shows_itself_in_a_line_and_in_a_notebook(store: str) -> None:
    made = moeflow.run(TOY, store=store, progress=False, numbers=2)
    assert repr(made).startswith("<toy_pipeline@1: ") and " of files in " in repr(made) and "\n" not in repr(made)
    assert "perplexity" in str(made) and "made by" in str(made) and "numbers=2" in str(made)
    page = made._repr_html_()
    assert "<b>toy_pipeline@1</b>" in page and "<li>without a tokenizer</li>" in page


def test_a_version_is_compared_with_others_and_found_by_its_names(store: str) -> None:
    one, two = (moeflow.run(TOY, store=store, progress=False, numbers=n) for n in (2, 3))
    (row,) = two.compare(one).records
    told = {"name": "perplexity", "original": 12.5, "toy_pipeline@2": 13.25, "toy_pipeline@1": 13.25}
    assert told.items() <= row.items()
    assert {o["name"] for o in two.compare(one).options if len({*o["values"]}) > 1} == {"numbers"}
    assert two.compare("toy_pipeline@1").records == two.compare(one).records
    asked = ["compare", "toy_pipeline@2", "toy_pipeline@1", "--store", store]
    assert json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout) == json.loads(json.dumps(two.compare(one).told))
    terminal, shown = CliRunner().invoke(app, asked).stdout, two.compare(one)
    for words in ("layers that differ", "numbers", "of its own, version 1", "the same", "perplexity"):
        assert words in terminal and words in repr(shown) and words in shown._repr_html_()
    with pytest.raises(ValueError, match="compare needs two versions or more, and toy_pipeline@2 is one"):
        two.compare()
    assert CliRunner().invoke(app, ["promote", "toy_pipeline@1", "production", "--store", store]).exit_code == 0
    assert moeflow.version("production", store=store).key == moeflow.version(one.key, store=store).key == one.key
    assert [v.ref for v in moeflow.versions(store=store)] == ["toy_pipeline@1", "toy_pipeline@2"]
    assert one.labels == ("production",)
    with pytest.raises(NotStored, match="no version, label or key"):
        moeflow.version("nothing", store=store)


def test_pulling_fills_a_new_folder_and_refuses_another(store: str, tmp_path: Path) -> None:
    made = moeflow.run(TOY, store=store, progress=False)
    assert [*made.pull(tmp_path / "out").iterdir()]
    with pytest.raises(FileExistsError, match="not empty"):
        made.pull(tmp_path / "out")


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (dict(numbers="four"), "numbers=four"),
        (dict(numbres=4), "numbres=4"),
        (dict(fail="perhaps"), "fail=perhaps"),
        (dict(size={"bits": 3}), "size.bits=3"),
    ],
)
def test_what_is_wrong_is_said_in_the_words_of_the_command_line(given: dict[str, Any], word: str, store: str) -> None:
    with pytest.raises(ValueError) as raised:
        moeflow.run(TOY, store=store, progress=False, **given)
    told = CliRunner().invoke(app, ["run", str(TOY), "--store", store, "-p", word]).stderr
    assert told == f"error: {raised.value}\n" and word in told


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: moeflow.run("something"), "there is no pipeline something; name one that comes with moeflow"),
        (lambda: moeflow.run("mixtrall"), "there is no pipeline mixtrall; did you mean mixtral?"),
        (lambda: moeflow.run(TOY, runner="slurm"), "runner='slurm': choose one of auto, process, ray"),
        (lambda: moeflow.run(TOY, patience="soon"), "--patience soon: write a number"),
        (lambda: moeflow.run(TOY, gpus=-1), "gpus=-1 must not be negative"),
        (lambda: moeflow.fit("model"), "give one budget"),
        (lambda: moeflow.fit("model", bytes="24GB", keep=6), "the pipeline has no parameter 'keep'"),
        (lambda: moeflow.run(TOY, numbers=object()), "numbers=<object .*: give a number, a text"),
        (lambda: moeflow.run(TOY, numbers=Search("reap")), "numbers=Search.* is not what the pipeline takes there: int"),
        (lambda: moeflow.load("nowhere"), "nowhere is no folder here, and there is no store"),
        (lambda: moeflow.versions(), "there is no store"),
    ],
)
def test_a_wrong_request_is_one_line(call: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, TypeError, OSError, LookupError), match=said) as raised:
        call()
    assert "\n" not in str(raised.value)


def received(build: Any, **given: Any) -> dict[str, Any]:
    """What `build` receives for values from Python, by way of words."""
    got: dict[str, Any] = {}

    def asked(**values: Any) -> Step:
        got.update(values)
        return toy.number(n=1)

    asked.__signature__ = __import__("inspect").signature(build)  # type: ignore[attr-defined]
    asked.__annotations__ = build.__annotations__
    pipeline.call(asked, words_of(build, given))
    return got


def options_pipeline(
    *, keep: int = 6, search: Search = Search("layerwise", seed=42), other: Search | None = None, rate: float = 0.1
) -> Step:
    raise AssertionError("never built")


@pytest.mark.parametrize("search", [Search("swap", seed=42, starts=3), Search("layerwise", seed=42), {"seed": 7}, "reap"])
def test_options_arrive_as_they_were_given(search: Any) -> None:
    """Whatever the pipeline's own defaults, and the type's, are."""
    wanted = {"reap": Search("reap", seed=42)}.get(search) if isinstance(search, str) else search
    wanted = Search("layerwise", seed=7) if isinstance(search, dict) else wanted
    assert received(options_pipeline, search=search)["search"] == wanted
    if isinstance(search, Search):
        assert received(options_pipeline, other=search)["other"] == search


def test_plain_values_arrive_as_they_were_given() -> None:
    got = received(options_pipeline, keep=4, rate=1 / 3, other=None)
    assert (got["keep"], got["rate"], got["other"]) == (4, 1 / 3, None)


def test_every_pipeline_has_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert {"mixtral", "fit", "tiny"} <= {*moeflow.pipelines()} == {p.stem for p in (ROOT / "pipelines").glob("*.py")}
    assert all(callable(pipeline.load(path)) for path in shipped().values())
    result = CliRunner().invoke(app, ["run", "mixtral", "--help"])
    assert result.exit_code == 0 and "search.seed" in result.stdout and "NAEE" not in result.stderr


def test_a_hub_that_refuses_is_named_with_the_way_out(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = moeflow.run(TOY, store=store, progress=False)
    with servers.hub_server(writers=("mine",)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        with pytest.raises(StoreError, match="does not let this user write to theirs/small.*hf auth login") as raised:
            made.push_to_hub("theirs/small", token="hf_token")
        assert "\n" not in str(raised.value)
        with pytest.raises(ValueError, match="no name of a repository"):
            made.push_to_hub("not a name", token="hf_token")
        made.push_to_hub("mine/small", token="hf_token")
        assert {*hub.files[f"models/mine/small@{hub.refs['models/mine/small@main']}"]} == {"n"}


@pytest.mark.slow
def test_types_are_told_to_who_calls(tmp_path: Path) -> None:
    (tmp_path / "uses.py").write_text(
        "import moeflow\n"
        "v: moeflow.Version = moeflow.run('mixtral', model='m', keep=6)\n"
        "w = moeflow.fit('m', bytes='24GB')\n"
        "reveal_type(w.report.records)\n"
        "moeflow.run('mixtral', gpus='many')\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--follow-imports=silent", str(tmp_path / "uses.py")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    lines = [line.partition("uses.py:")[2] for line in done.stdout.splitlines() if "uses.py" in line]
    assert (len(lines) == 2 and "builtins.list" in lines[0]) or "list[dict[str" in lines[0], done.stdout
    assert lines[1].startswith("5: error:") and "gpus" in lines[1]


@pytest.mark.slow
def test_a_model_is_compressed_fitted_and_loaded_in_a_few_lines(store: str, tmp_path: Path) -> None:
    """Whatever form the results have: whole experts, and layers that differ."""
    made = moeflow.run("mixtral", store=store, keep=6, **SHORT)
    assert made.report.row("experts per layer")["compressed"] == 6
    assert made.report.frame().set_index("name")["compressed"]["experts per layer"] == 6
    fitted = moeflow.fit(
        SMALL, bytes="2MiB", store=store, offers={"group": 16, "measured": 256}, **{k: SHORT[k] for k in SHORT if k != "model"}
    )
    assert fitted.report.row("bytes")["compressed"] <= 2 << 20
    words = fitted.tokenizer()("def __init__(self", return_tensors="pt")
    for model in (made.load(), fitted.load(), moeflow.load(fitted.pull(tmp_path / "out")), moeflow.load("fit", store=store)):
        assert model.generate(**words, max_new_tokens=4).shape[1] == words["input_ids"].shape[1] + 4
