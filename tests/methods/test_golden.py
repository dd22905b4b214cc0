"""The authors' own code computed these numbers (NAEE); ours must come out the same, through the command line as people use it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from moeflow.cli import app
from tests import running

GOLDEN = running.GOLDEN / "naee-7"
PIPELINE = Path(__file__).parents[2] / "pipelines" / "mixtral.py"


def moeflow(*words: str) -> str:
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return json.loads((GOLDEN / "expected.json").read_text())


@pytest.fixture(scope="module", params=["layerwise", "progressive"])
def search(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=[6, pytest.param(4, marks=pytest.mark.slow)])
def pruned(
    request: pytest.FixtureRequest, search: str, expected: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The folder that `pull` leaves, what `show` says of it, and what the authors' code made."""
    folder = tmp_path_factory.getbasetemp() / "golden"
    store, keep = str(folder / "store"), request.param
    given = {"model": GOLDEN / "model", "tokens": GOLDEN / "tokens.npy", "keep": keep, "search": search}
    given |= {"search.loss": "batch-sum", "search.batch": 2}
    words = [w for name, value in given.items() for w in ("-p", f"{name}={value}")]
    told = json.loads(moeflow("run", str(PIPELINE), *words, "--store", store, "--json").splitlines()[-1])
    out = folder / f"{search}-{keep}"
    moeflow("pull", told["key"], str(out), "--store", store)
    shown = json.loads(moeflow("show", f"{told['name']}@{told['version']}", "--store", store, "--json"))
    return out, shown, expected[search][str(keep)]


def choices_of(shown: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    store = folder.parent / "store"
    keys = [step["key"] for step in shown["lineage"] if step["step"] == "prune.choose"]
    texts = [CliRunner().invoke(app, ["pull", k, str(folder.parent / "choices" / k), "--store", str(store)]) for k in keys]
    assert all(t.exit_code in (0, 2) for t in texts)
    found = [json.loads((folder.parent / "choices" / k / "choice.json").read_text()) for k in keys]
    return sorted(found, key=lambda c: c["layer"])


def test_every_loss_and_every_choice_is_the_authors(pruned: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    folder, shown, expected = pruned
    found = choices_of(shown, folder)
    assert len(found) == len(expected["layers"]) == 4
    for mine, theirs in zip(found, expected["layers"], strict=True):
        assert mine["keep"] == theirs["keep"]
        assert mine["losses"] == pytest.approx(theirs["loss"], rel=1e-5)


@torch.inference_mode()
def test_the_pulled_model_has_the_authors_loss_and_logits(pruned: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    folder, shown, expected = pruned
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.from_numpy(np.load(GOLDEN / "tokens.npy"))
    assert float(model(ids, labels=ids).loss) == pytest.approx(expected["nll_after"], abs=1e-4)
    rows = {r["name"]: r for report in shown["reports"] for r in report["rows"]}
    assert rows["loss (token matrix)"]["compressed"] == pytest.approx(expected["nll_after"], abs=1e-4)
    if sample := expected.get("logits_sample"):
        last = model(ids[:1]).logits[0, -1]
        assert any(
            torch.allclose(candidate[: len(sample)], torch.tensor(sample), atol=1e-4)
            for candidate in (last, *model(ids[:1]).logits[0])
        )


@torch.inference_mode()
def test_skipping_has_the_authors_thresholds_and_loss(expected: dict[str, Any], tmp_path: Path) -> None:
    golden = expected["dynamic_skipping"]
    store, out = str(tmp_path / "store"), tmp_path / "model"
    given = {"model": GOLDEN / "model", "tokens": GOLDEN / "tokens.npy", "keep": 8, "skipping": "median", "calibration.batch": 2}
    words = [w for name, value in given.items() for w in ("-p", f"{name}={value}")]
    told = json.loads(moeflow("run", str(PIPELINE), *words, "--store", store, "--json").splitlines()[-1])
    moeflow("pull", told["key"], str(out), "--store", store)
    found = [{"layer": i} | done for i, (done,) in running.facts_of(out, "fewer_active.skipping").items()]
    for mine in found:
        assert mine["threshold"] == pytest.approx(golden["beta_median"][str(mine["layer"])], rel=1e-5)
        assert mine["mean"] == pytest.approx(golden["ratio_mean"][str(mine["layer"])], rel=1e-5)
    assert len(found) == 4
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    ids = torch.from_numpy(np.load(GOLDEN / "tokens.npy"))
    assert float(model(ids, labels=ids).loss) == pytest.approx(golden["nll_after"], abs=1e-5)
    shown = json.loads(moeflow("show", f"{told['name']}@{told['version']}", "--store", store, "--json"))
    rows = {r["name"]: r for report in shown["reports"] for r in report["rows"]}
    assert rows["loss (token matrix)"]["compressed"] == pytest.approx(golden["nll_after"], abs=1e-5)
    assert rows["experts a token (token matrix)"]["compressed"] == pytest.approx(1.5, abs=0.01)
