"""Every published compression fits the nodes of `ray_cluster.yaml` as it is written, planned for the real models without them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moeflow.cli import app
from tests import shells

ROOT = Path(__file__).parents[2]
MIXTRAL, QWEN, DEEPSEEK, OLMOE, PHI = shells.MODELS
Planned = Callable[..., dict[str, Any]]


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planned:
    """The plan of a pipeline on a model, for the nodes of the cluster file."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.chdir(tmp_path)

    def call(name: str, model: str, *words: str, exit_code: int = 0) -> dict[str, Any]:
        shells.fill(tmp_path / "hub", model)
        # copied: weights that are read where they lie are hashed when they are pinned, and these are 93 GB of nothing
        where = ["plan", f"{ROOT}/pipelines/{name}.py", "--on", f"{ROOT}/ray_cluster.yaml", "--json", "-p", "source=copy"]
        result = CliRunner().invoke(app, [*where, *words], catch_exceptions=False)
        assert result.exit_code == exit_code, result.output
        made: dict[str, Any] = json.loads(result.stdout)
        return made

    return call


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("mixtral", MIXTRAL),
        ("mixtral_moei2", MIXTRAL),
        ("mixtral_unified", MIXTRAL),
        pytest.param("olmoe", OLMOE, marks=pytest.mark.slow),
        ("phimoe", PHI),
        pytest.param("deepseek_v2_lite", DEEPSEEK, marks=pytest.mark.slow),
        pytest.param("deepseek_v2_lite_unified", DEEPSEEK, marks=pytest.mark.slow),
        pytest.param("qwen15_moe", QWEN, marks=pytest.mark.slow),
        pytest.param("qwen15_moe_unified", QWEN, marks=pytest.mark.slow),
    ],
)
def test_a_pipeline_fits_the_nodes_as_it_is_written_and_says_the_gpu_memory_of_every_step(
    name: str, model: str, planned: Planned
) -> None:
    plan = planned(name, model)
    assert plan["problems"] == [] and plan["reads"] > 10 << 30
    if name == "mixtral_moei2":  # the calibration's states and the sweep's are what could grow
        assert plan["reads"] <= 4e12 and plan["writes"] <= 0.6e12
    for row in plan["rows"]:
        assert bool(row["device"]) == bool(row["gpus"]), row["label"]
        assert row["device"] <= 45776 << 20 or row["optional"], row["label"]
    simulated = plan["simulated"]
    assert simulated["nodes"] == [["head", 1], ["gpu", 4]] and simulated["chain"]["seconds"] < simulated["seconds"] < 10**7
    assert simulated["dollars"] == pytest.approx((0.768 + 4 * 10.493) * simulated["seconds"] / 3600, rel=0.01)
    trained = {row["label"]: row["processes"] for row in plan["rows"] if row["name"] == "finetune.train"}
    assert simulated["gangs"].keys() == simulated["lost"].keys() == trained.keys()


@pytest.mark.slow
def test_a_budget_is_planned_for_the_nodes_and_says_what_is_in_reach(planned: Planned) -> None:
    words = ["-p", f"model={MIXTRAL}", "-p", "budget.bytes=24GB"]
    plan = planned("fit", MIXTRAL, *words)
    assert plan["problems"] == [] and all(bool(row["device"]) == bool(row["gpus"]) for row in plan["rows"])
    assert any("a budget in bytes can be from" in note for row in plan["rows"] for note in row["notes"])
    assert "the least" in json.dumps(planned("fit", MIXTRAL, *words[:-1], "budget.bytes=1GB", exit_code=2))


OURS = "counts.rule=exact search=swap search.span=1 decomposition.svd=whitened decomposition.ranks=global tune.loss=kl"


def test_what_moeflow_puts_beside_a_paper_fits_too(planned: Planned) -> None:
    plan = planned("mixtral_moei2", MIXTRAL, *(word for value in OURS.split() for word in ("-p", value)))
    assert plan["problems"] == [] and all(bool(row["device"]) == bool(row["gpus"]) for row in plan["rows"])
    assert {"decompose.spectra", "finetune.predictions", "calibrate.forks"} <= {row["name"] for row in plan["rows"]}


def test_every_pipeline_is_among_them() -> None:
    (marker,) = test_a_pipeline_fits_the_nodes_as_it_is_written_and_says_the_gpu_memory_of_every_step.pytestmark  # type: ignore[attr-defined]
    cases = {getattr(case, "values", case)[0] for case in marker.args[1]}
    assert cases | {"tiny", "fit"} == {path.stem for path in (ROOT / "pipelines").glob("*.py")}


def test_a_training_that_no_gpu_holds_is_refused_before_anything_runs(planned: Planned) -> None:
    (problem,) = planned("mixtral_moei2", MIXTRAL, "-p", "gang.processes=1", "-p", "gang.micro=0", exit_code=2)["problems"]
    assert problem.startswith("finetune.train ") and "133.0 GiB" in problem and "4 GPUs of 44.7 GiB" in problem
    assert problem.endswith("run more of them; with gang.device_memory what would fit is told")


def test_fp32_takes_twice_what_bf16_does(planned: Planned) -> None:
    def peaks(dtype: str) -> dict[str, tuple[int, int]]:
        made: dict[str, tuple[int, int]] = {}
        for row in planned("mixtral", MIXTRAL, "-p", f"calibration.dtype={dtype}")["rows"]:
            made[row["name"]] = max(made.get(row["name"], (0, 0)), (row["memory"], row["device"]))
        return made

    weights = 8 * 3 * 4096 * 14336  # those of one layer's experts
    halves, wholes = peaks("bfloat16"), peaks("float32")
    for name in ("calibrate.observe", "calibrate.advance", "prune.choose"):
        for half, whole in zip(halves[name], wholes[name], strict=True):
            assert whole >= half + 2 * weights, f"{name}: two bytes more for each weight of a layer"


def test_measuring_speed_is_planned_with_both_models_and_left_out_where_no_gpu_holds_them(planned: Planned) -> None:
    plan = planned("mixtral", MIXTRAL)
    (speed,) = (row for row in plan["rows"] if row["name"] == "evaluate.speed")
    both = 93e9 + 70e9
    assert 1.1 * both < speed["memory"] < 1.4 * both and speed["device"] > speed["memory"]
    (warning,) = (line for line in plan["warnings"] if line.startswith("evaluate.speed"))
    assert "leaves its figures out" in warning and plan["problems"] == []
