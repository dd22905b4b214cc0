"""--engine holds every command to what the engine runs: pruning and its counts, and compressing again."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from moeflow.cli import app
from tests.running import SMALL

ROOT = Path(__file__).parents[2]
SHORT = (
    f"model={SMALL}", "tokens=python:stdlib/a*.py", "heldout=python:stdlib/t*.py", "calibration.sequences=8",
    "calibration.length=32", "heldout.length=32",
)  # fmt: skip
COUNTS = ("tune=none", "removed=0.25", "search=swap", "search.span=1", "decomposition.ratio=0")


def planned(pipeline: str, words: tuple[str, ...], *more: str) -> tuple[int, str]:
    given = [w for word in (*SHORT, *words) for w in ("-p", word)]
    done = CliRunner().invoke(app, ["plan", str(ROOT / "pipelines" / f"{pipeline}.py"), *given, "--store", "none", *more])
    return done.exit_code, done.output


@pytest.mark.parametrize(
    ("pipeline", "words", "engine", "says"),
    [
        ("mixtral_moei2", (*COUNTS, "counts.rule=exact"), ("vllm",), "layers have as many experts as a run decides"),
        ("mixtral", ("keep=6", "search=reap"), ("vllm", "--ep", "4"), "ep=4 does not divide 6 experts"),
        ("mixtral", ("keep=6", "search=reap", "skipping=median"), ("sglang",), "sglang has no skipping of experts"),
        pytest.param(
            "mixtral_unified",
            ("slim=none", "trim=experts", "trim.dropped=2"),
            ("vllm",),
            "as many experts as a run decides",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_plan_that_prunes_is_held_to_its_engine(
    pipeline: str, words: tuple[str, ...], engine: tuple[str, ...], says: str
) -> None:
    code, said = planned(pipeline, words, "--engine", *engine)
    assert code == 2 and len(said.strip().splitlines()) == 1 and says in said, said
    assert planned(pipeline, words, "--engine", "moeflow")[0] == 0


def test_compressing_again_is_held_to_its_engine(tmp_path: Path) -> None:
    """It is refused before anything is read of the texts, with the exit code of a wrong request."""
    words = [w for word in (*SHORT[1:], "keep=6", "search=reap", "skipping=median") for w in ("-p", word)]
    same = [
        "recompress",
        str(ROOT / "pipelines" / "mixtral.py"),
        "--source",
        str(SMALL),
        "--promote",
        "production",
        "--settle",
        "0s",
    ]
    done = CliRunner().invoke(app, [*same, *words, "--store", str(tmp_path / "store"), "--engine", "vllm", "--tp", "2"])
    assert done.exit_code == 2 and "--engine vllm,tp=2: vllm,tp=2 has no skipping of experts" in done.output, done.output
    done = CliRunner().invoke(app, [*same, "--store", str(tmp_path / "store"), "--tp", "2"])
    assert done.exit_code == 2 and "say which, as in --engine vllm" in done.output
