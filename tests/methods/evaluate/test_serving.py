"""Both models are measured in an engine that runs in a process of its own; here it is one that computes nothing."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from moeflow.methods.evaluate.options import Serving
from moeflow.methods.evaluate.steps import serving
from moeflow.methods.graph import Pass
from moeflow.methods.recipes import compare
from moeflow.model.spec import CheckpointSpec, TokensSpec
from moeflow.report.figures import figures_of
from moeflow.run import pipeline
from moeflow.step import Context, Spec, Step, step, upstream
from tests import running, tiny
from tests.methods.evaluate.fake_engine import ROOT, program

HOW = Serving(requests=(1, 3), prompt=6, tokens=4, rounds=3)


@step("test.checkpoint", version=1, spec=lambda folder: Spec(CheckpointSpec({"dtype": "float32"}, 1, 1, 1, 1, 1)))
def checkpoint(context: Context, *, folder: str) -> None:
    """A checkpoint that lies in a folder."""
    for file in Path(folder).iterdir():
        (context.out / file.name).write_bytes(file.read_bytes())


@step("test.tokens", version=1, spec=lambda: Spec(TokensSpec(4, 8)))
def tokens(context: Context) -> None:
    np.save(context.out / "tokens.npy", np.arange(3, 35).reshape(4, 8))


def measured(tmp_path: Path, folders: list[Path], engine: str, **settings: Any) -> tuple[dict[str, Any], Step]:
    made = serving(*(checkpoint(folder=str(f)) for f in folders), tokens(), how=HOW, machine={})
    made = made.on(settings={"python": engine, **settings})
    store = running.store_in(tmp_path)
    running.run(store, made)
    return json.loads(store.artifact(made.key).file("report.json").read_text()), made


@torch.inference_mode()
def told_of(folder: Path) -> dict[str, Any]:
    """What transformers writes behind the prompts that the step cuts from the tokens, with log-probabilities."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    written, logs = [], []
    for prompt in np.arange(3, 21).reshape(3, 6).tolist():
        ids = list(prompt)
        for _ in range(HOW.tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        log = model(torch.tensor([ids[:-1]])).logits[0, len(prompt) - 1 :].log_softmax(-1)
        written.append(ids[len(prompt) :])
        logs.append(log.gather(-1, torch.tensor(written[-1])[:, None])[:, 0].tolist())
    return {"way": "stock", "resident": 500, "seconds": 2.0, "written": written, "logs": logs}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [tiny.write("mixtral", folder / "original"), tiny.write("olmoe", folder / "compressed")]


def size(folder: Path) -> str:
    return str((folder / "config.json").stat().st_size)


def test_both_models_are_measured_in_turns_and_compared_with_transformers(tmp_path: Path, folders: list[Path]) -> None:
    first, second = map(told_of, folders)
    second |= {"way": "native", "resident": 200, "seconds": 1.0}
    second["written"][0][-1] = (second["written"][0][-1] + 1) % 96  # one token of twelve is another
    told = {size(f): t for f, t in zip(folders, (first, second), strict=True)}
    report, made = measured(tmp_path, folders, str(program(tmp_path, told)))
    found = {figure.word: figure for figure in figures_of(report) if figure.figure}
    assert {*found} == {*made.spec.figures}, "a gate may ask for all that is reported"
    assert found["served_prefill[3]"].compressed == pytest.approx(2 * (found["served_prefill[3]"].original or 0), rel=0.15)
    assert found["served_decode[1]"].original == pytest.approx(3 / 2.2, rel=0.1)
    assert (found["served_memory[3]"].original, found["served_resident"].compressed) == (3000, 200)
    assert found["served_agreement"].original == 1 and found["served_agreement"].compressed == pytest.approx(11 / 12)
    assert 0 <= (found["served_apart"].original or 0) < 1e-5 < (found["served_apart"].compressed or 0)
    assert report["notes"] == ["vllm 9.9.9 runs the original the stock way, the compressed model the native way"]
    rows = {row["name"]: row for row in report["rows"]}
    low, high = (rows[f"served prefill, 3 requests, {end} quartile"]["original"] for end in ("lower", "upper"))
    assert low < found["served_prefill[3]"].original < high
    assert not alive(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize(
    "load, says",
    [
        ("raise ValueError('no kernel\\n for this')", "ValueError: no kernel for this"),
        ("import nowhere_at_all", "ModuleNotFoundError: .*; serving.python is the Python of an environment"),
        ("sys.exit('leaves')", "SystemExit: leaves"),
        ("os._exit(3)", "it ended with exit code 3; it said nothing"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "it ended by SIGKILL, as where memory runs out; it said nothing"),
        ("os.write(2, b'RuntimeError: all is lost\\nbye\\n'); os._exit(1)", "exit code 1; it said RuntimeError: all is lost"),
        ("time.sleep(600)", "has not answered to 'load' within 0.05 minutes; raise serving.minutes"),
    ],
)
def test_an_engine_that_fails_leaves_figures_out_and_says_why_in_one_line(
    load: str, says: str, tmp_path: Path, folders: list[Path]
) -> None:
    report, _ = measured(tmp_path, folders, str(program(tmp_path, load=load)), minutes=0.05 if "sleep" in load else 1)
    (note,) = report["notes"]
    assert note.startswith("serving is left out: ") and "\n" not in note
    assert re.search(says, note), note
    assert all(row["original"] is None and row["compressed"] is None for row in report["rows"])
    assert not alive(int((tmp_path / "pid").read_text()))


def test_where_there_is_no_engine_the_report_says_so(tmp_path: Path, folders: list[Path]) -> None:
    (note,) = measured(tmp_path, folders, "/nowhere/python")[0]["notes"]
    assert "serving.python=/nowhere/python cannot be started (No such file or directory); serving.python is the Python of" in note


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_the_engine_ends_with_the_process_that_started_it_however_that_ends(tmp_path: Path) -> None:
    engine = program(tmp_path, load="subprocess.Popen(['sleep', '600']); time.sleep(600)")
    asks = f"Engine({str(engine)!r}, Path({str(tmp_path / 'log')!r}), 600).ask('load', folder='', options={{}})"
    code = f"from pathlib import Path; from moeflow.methods.evaluate.engine import Engine; {asks}"
    asking = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    until = time.monotonic() + 60
    children: list[int] = []
    while len(children) < 1 and time.monotonic() < until:
        time.sleep(0.05)
        if (tmp_path / "pid").exists() and (pid := (tmp_path / "pid").read_text()):
            listed = Path(f"/proc/{pid}/task/{pid}/children")
            children = [int(c) for c in listed.read_text().split()] if listed.exists() else []
    assert children and alive(int(pid)) and alive(children[0])
    os.kill(asking.pid, signal.SIGKILL)
    asking.wait()
    while (alive(int(pid)) or alive(children[0])) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(int(pid)) and not alive(children[0])


def test_where_the_engine_is_enters_no_key_and_its_version_does(tmp_path: Path) -> None:
    model = running.model_in(tiny.write("mixtral", tmp_path / "model"))
    matrix = running.matrix_of(tmp_path).spec

    def made(python: str, **how: Any) -> Step:
        heldout = compare.HeldOut(matrix, 4, 16, serving=Serving(python, **how))
        return next(s for s in compare.reports(model, model, heldout, Pass(2)) if s.name == "evaluate.serving")

    one, other = (program(_made(tmp_path / name)) for name in ("one", "other"))
    first = made(str(one))
    assert first.key == made(str(other), minutes=3).key != made(str(one), tokens=8).key and not first.notes
    assert first.key != made(str(one), again=1).key
    assert first.resources.settings == {"python": str(one), "minutes": 30.0} and "served_decode[32]" in first.spec.figures
    lacking = made(str(tmp_path / "nowhere"))
    assert lacking.key != first.key and "is no Python with vLLM on this machine" in lacking.notes[0]
    assert str(one) not in json.dumps([s.params for s in upstream([first])])
    assert made(str(one), options='{"tensor_parallel_size": 2}').resources.gpus == 2
    with pytest.raises(ValueError, match="serving.python names no engine"):
        made("", tokens=8)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize("file", ["mixtral", "olmoe", "mixtral_moei2", "mixtral_unified", "fit", "tiny"])
def test_pipelines_and_fit_take_it_as_they_take_tasks(file: str) -> None:
    build = pipeline.load(Path(ROOT) / "pipelines" / f"{file}.py")
    words = ["model=MODEL", "serving=/env", "serving.requests=[1,4]"] + ["budget.ratio=0.5"] * (file == "fit")
    asked = pipeline.values(build, words)["heldout"].serving
    assert asked.python == "/env" and asked.requests == (1, 4)


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"requests": (0, 8)}, r"requests=\(0, 8\) must be different numbers of at least 1"),
        ({"requests": (8, 8)}, "different numbers"),
        ({"requests": ()}, "different numbers"),
        ({"tokens": 1}, "tokens=1 must be at least 2"),
        ({"prompt": 0}, "prompt=0 must be at least 1"),
        ({"minutes": 0}, "minutes=0 must be a time above 0"),
        ({"dtype": "fp8"}, "dtype='fp8' is not known; choose one of auto"),
        ({"options": "{"}, "options={ is no JSON .*; write it like"),
        ({"options": "[1]"}, "is no JSON object"),
        ({"options": '{"model": "x"}'}, "says model, which the measuring sets by itself; leave it out"),
        ({"options": '{"tensor_parallel_size": "two"}'}, "tensor_parallel_size='two', which must be a whole number above 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Serving("python", **wrong)


def test_the_page_names_every_figure_and_its_command_is_one_that_moeflow_takes() -> None:
    """What the command asks for is looked at; running it takes an environment with vLLM."""
    page = (Path(ROOT) / "docs" / "serve.md").read_text()
    assert all(f"`{word.partition('[')[0]}" in page for word in HOW.figures)
    (command,) = re.findall(r"^ +moeflow run (.*?)\n\n", page, re.DOTALL | re.MULTILINE)
    words = shlex.split(command.replace("\\\n", " "))
    values = pipeline.values(pipeline.load(Path(ROOT) / words[0]), [w for w in words[1:] if w != "-p"])
    assert (values["heldout"].serving.python, values["heldout"].serving.tokens) == (".venv-serve", 16)
