"""Every method behind every other: either the graph is refused when it is built, with the reason, or it runs and loads."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.decompose.options import Decomposition
from moeflow.methods.fewer_active import steps as fewer_active
from moeflow.methods.graph import Calibration, Model, Pass, Sample
from moeflow.methods.prune.counts import Counts
from moeflow.methods.prune.searches import Search
from moeflow.methods.recipes import moei2, naee, unified
from moeflow.methods.slim.methods import Slimming
from moeflow.methods.trim import steps as trim
from moeflow.store import Store
from tests import tiny
from tests.models import PLAIN, loaded
from tests.running import matrix_of, model_in, run, store_in

FOUR: dict[str, Any] = {"bits": 4, "group": 8, "inputs": "parallel"}


def experts(calibration: Calibration) -> int:
    return sum(calibration.model.layers[i].spec.output.experts for i in calibration.model.moe_layers)


METHODS: dict[str, Callable[[Calibration], Model]] = {
    "prune": lambda calibration: naee.prune(calibration, 6, Search("reap")),
    "prune unevenly": lambda calibration: moei2.prune(
        calibration, Counts(experts(calibration) - 4, rule="paper", importance="recon")
    ),
    "decompose": lambda calibration: moei2.decompose(calibration, Decomposition(ratio=0.3, ranks="uniform", multiple=4)),
    "decompose unevenly": lambda calibration: moei2.decompose(
        calibration, Decomposition(ratio=0.3, ranks="paper", importance="recon", multiple=4)
    ),
    "skip": lambda calibration: fewer_active.skip(calibration, fewer_active.Skipping(1.5)),
    "compressed experts": lambda calibration: fewer_active.attach(calibration.model),
    "expert drop": lambda calibration: trim.trim(calibration, trim.Trimming("experts", 2, least=4)),
    "layer drop": lambda calibration: trim.trim(calibration, trim.Trimming("moe_blocks", 1)),
    "block drop": lambda calibration: trim.trim(calibration, trim.Trimming("decoder_layers", 1)),
    "wanda": lambda calibration: unified.slim(calibration, Slimming(method="wanda", pattern="0.5", inputs="parallel")),
    "quantize": lambda calibration: unified.slim(calibration, Slimming(method="gptq", bits=8, group=4, inputs="parallel")),
    "awq": lambda calibration: unified.slim(calibration, Slimming(method="awq", **FOUR)),
}
SLIM = ("wanda", "quantize", "awq")
CUT = ("decompose", "decompose unevenly")
REACH = ("skip", "compressed experts")
REFUSED: dict[tuple[tuple[str, ...], tuple[str, ...]], str] = {
    (("skip",), ("prune", "prune unevenly", *CUT, "expert drop", *REACH)): "skips experts by a threshold",
    (("compressed experts",), ("prune", "prune unevenly", *CUT, "expert drop", *REACH, *SLIM)): "has Compressed Experts",
    (CUT, CUT): "factored already|is slimmed or decomposed already",
    (CUT, ("wanda", "awq")): "has low-rank experts, whose factors (wanda|awq) does not slim",
    (SLIM, CUT): "is slimmed or decomposed already|is packed in",
    (SLIM, SLIM): "is slimmed already|is packed in",
    (("layer drop",), ("prune", *CUT, *REACH, "expert drop")): "keeps its experts is decided by a run",
    (("prune unevenly", "decompose unevenly", "expert drop", "layer drop"), ("prune unevenly",)): "has is decided by a step",
    (("prune unevenly", "expert drop"), ("prune",)): "has between . and 8 experts, as a run decides; keep at most",
    (("prune unevenly", "decompose unevenly", "expert drop"), ("compressed experts",)): "how many experts layer . keeps is decided",
}
"""What cannot follow what, and why."""
FAMILY_REFUSES = {"phimoe": {"skip": "sparsemixer|Phi|phimoe"}}


def reason(first: str, second: str) -> str:
    found = [why for (firsts, seconds), why in REFUSED.items() if first in firsts and second in seconds]
    return "|".join(found)


OFTEN = ("mixtral", "qwen2_moe", "deepseek_v3")


@pytest.fixture(scope="module", params=[pytest.param(f, marks=() if f in OFTEN else pytest.mark.slow) for f in tiny.FAMILIES])
def start(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Model, Store, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    fewer = {"num_experts_per_tok": 2} if request.param.startswith("deepseek") else {}  # so that groups may be smaller
    source = tiny.write(request.param, folder / "model", num_hidden_layers=4, **fewer, **PLAIN.get(request.param, {}))
    return request.param, model_in(source), store_in(folder), folder


def calibrated(model: Model, folder: Path) -> Calibration:
    matrix = data.tokens(matrix_of(folder), model, Sample(8, 16))
    return calibrate.run(model, matrix, Pass(batch=4, shard=8, stage=3), between=True)


@pytest.mark.parametrize("first", METHODS)
def test_any_two_methods_work_or_are_refused_when_the_graph_is_built(
    first: str, start: tuple[str, Model, Store, Path], request: pytest.FixtureRequest
) -> None:
    """Graphs of every pair are built for every family; every second pair runs on one, with --slow every pair on all."""
    family, model, store, folder = start
    if first in FAMILY_REFUSES.get(family, {}):
        with pytest.raises(ValueError, match=FAMILY_REFUSES[family][first]):
            METHODS[first](calibrated(model, folder))
        return
    before = calibrated(METHODS[first](calibrated(model, folder)), folder)
    for second in METHODS:
        why = "|".join(w for w in (reason(first, second), FAMILY_REFUSES.get(family, {}).get(second, "")) if w)
        try:
            made = METHODS[second](before)
            target = checkpoint.checkpoint_of(made)
        except ValueError as error:
            assert why, f"{second} behind {first} of {family} is refused, and nothing says why: {error}"
            assert "\n" not in str(error)
            with pytest.raises(ValueError, match=why):
                raise
            continue
        assert not reason(first, second), f"{second} behind {first} of {family} should be refused"
        if request.config.getoption("slow") or family == turn(first, second):
            run(store, target)
            out = folder / f"{first}-{second}"
            store.fetch(target.key, out)
            with torch.inference_mode():
                assert torch.isfinite(loaded(out)(torch.arange(3, 12)[None]).logits).all()


def turn(first: str, second: str) -> str | None:
    at = list(itertools.product(METHODS, METHODS)).index((first, second))
    at += at // len(METHODS)  # another one in each row
    return None if at % 2 else OFTEN[at // 2 % len(OFTEN)]
