"""The benchmarks can be run, and say whether a claim held. They assert no time, and neither do these."""

import importlib
from pathlib import Path

import pytest

from benchmarks import real_sizes, unified
from benchmarks.__main__ import ALL, RESULTS, page
from benchmarks.quality import SHARED
from benchmarks.rows import Row
from moeflow.model.layout import Folder, headers


@pytest.mark.parametrize("name", ALL)
def test_every_benchmark_is_there(name: str) -> None:
    assert callable(importlib.import_module(f"benchmarks.{name}").main)


def test_a_claim_holds_on_the_right_side_of_its_bound() -> None:
    assert Row("faster", 13.1, "at least", 13, "times").holds and not Row("faster", 12.9, "at least", 13, "times").holds
    assert Row("slower", 1.2, "at most", 1.3, "times").holds and not Row("slower", 1.4, "at most", 1.3, "times").holds
    assert Row("slower", 1.4, "at most", 1.3, "times").line() == "| slower | 1.4 times | at most 1.3 | NO |"


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "models").is_dir(), reason="needs the model and the texts beside the clone, in ../shared")
def test_the_figures_of_the_recipe_of_ours_are_those_that_are_written_down() -> None:
    """Of the table of results, the row that the pipelines and the README speak of."""
    name = "low rank, three tenths, then GPTQ"
    (line,) = (line for line in RESULTS.read_text().splitlines() if line.startswith(f"| {name} |"))
    _, _, share, *_, divergence, _, _ = (cell.strip() for cell in line.split("|"))
    results, whole = unified.measured({name: unified.TOGETHER[name]})
    assert results[name].nbytes / whole == pytest.approx(float(share.rstrip("%")) / 100, abs=0.001)
    assert results[name].mean == pytest.approx(float(divergence), rel=0.1)


def test_a_checkpoint_of_real_size_takes_no_disk(tmp_path: Path) -> None:
    folder = real_sizes.mixtral_8x7b(tmp_path / "mixtral")
    files = [*folder.iterdir()]
    weights = [t.nbytes for t in headers(Folder(folder)).values()]
    assert sum(weights) == 93_405_585_408, "as the published index says"
    assert sum(f.stat().st_size for f in files) > 93e9 and sum(512 * f.stat().st_blocks for f in files) < 1e7


def test_a_benchmark_that_is_run_again_leaves_what_other_commands_measured() -> None:
    whole = page({"chaos": "## chaos\n", ALL[1]: f"## {ALL[1]}\n", ALL[0]: f"## {ALL[0]}\n"})
    assert [line for line in whole.splitlines() if line.startswith("## ")] == [f"## {ALL[0]}", f"## {ALL[1]}", "## chaos"]
