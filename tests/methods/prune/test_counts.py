"""A budget for the whole model becomes counts per layer, exactly, within what routers and serving kernels allow."""

import itertools
import json
import random
from pathlib import Path

import pytest

from moeflow.methods.prune import counts as counts_
from moeflow.methods.prune import steps as prune
from moeflow.methods.prune.counts import Counts
from moeflow.methods.records import Curves, Importance
from moeflow.step import Spec, Step, step
from moeflow.store import Store
from tests import running, tiny


@step("test.curves", version=1, spec=lambda *, value: Spec({"bytes": 100}))
def curves_of(context, *, value: dict) -> None:  # type: ignore[no-untyped-def]
    Curves(1, 0.0, value, {}).write(context.out)


@step("test.importance", version=1, spec=lambda *, layer, importance: Spec({"bytes": 100}))
def importance_of(context, *, layer: int, importance: list[float]) -> None:  # type: ignore[no-untyped-def]
    Importance(layer, tuple(importance), (1,) * len(importance)).write(context.out)


EIGHT = {str(i): 8 for i in range(3)}


def counts(store: Store, target: Step) -> dict[int, int]:
    running.run(store, target)
    record = json.loads(store.artifact(target.key).file("counts.json").read_text())
    assert record["total"] == sum(record["counts"].values())
    return {int(i): n for i, n in record["counts"].items()}


def test_the_exact_counts_are_those_of_trying_all(tmp_path: Path) -> None:
    store = running.store_in(tmp_path)
    for seed in range(6):
        rng = random.Random(seed)
        curves = {str(i): {str(n): rng.random() for n in range(2, 8)} for i in range(3)}
        legal = {str(i): sorted(rng.sample(range(2, 9), 5)) for i in range(3)}
        cost = [{n: curves[str(i)].get(str(n), 0.0) for n in legal[str(i)]} for i in range(3)]
        for total in {sum(rng.choice(legal[str(i)]) for i in range(3)) for _ in range(3)}:
            chosen = counts(
                store, prune.counts_exact(curves_of(value=curves), legal=legal, experts={str(i): 8 for i in range(3)}, total=total)
            )
            every = [c for c in itertools.product(*(legal[str(i)] for i in range(3))) if sum(c) == total]
            best = min(sum(cost[i][n] for i, n in enumerate(c)) for c in every)
            assert sum(chosen.values()) == total
            assert sum(cost[i][n] for i, n in chosen.items()) == pytest.approx(best)


def test_between_measured_counts_the_curve_is_a_straight_line_that_ends_at_zero(tmp_path: Path) -> None:
    # by the line, the first layer's cost at 5 is 1.5 and at 6 it is 1.0; the second's is 0.9 at 6
    value = {"0": {"2": 3.0, "4": 2.0}, "1": {"4": 1.8}}
    legal = {str(i): [4, 5, 6, 7, 8] for i in range(2)}
    target = prune.counts_exact(curves_of(value=value), legal=legal, experts={"0": 8, "1": 8}, total=12)
    assert counts(running.store_in(tmp_path), target) == {0: 8, 1: 4}


def test_by_the_papers_rule_the_less_important_layer_loses_more_and_none_more_than_it_can(tmp_path: Path) -> None:
    store, legal = running.store_in(tmp_path), {str(i): [2, 3, 4, 5, 6, 7, 8] for i in range(3)}
    layers = [importance_of(layer=i, importance=[v] * 8) for i, v in enumerate((0.1, 0.2, 0.4))]
    chosen = counts(store, prune.counts_paper(layers, legal=legal, experts=EIGHT, total=17))
    # 7 go: in proportion to 1/0.1, 1/0.2, 1/0.4 that is 4, 2 and 1
    assert chosen == {0: 4, 1: 6, 2: 7}
    extreme = [importance_of(layer=i, importance=[v] * 8) for i, v in enumerate((1e-6, 1.0, 1.0))]
    assert counts(store, prune.counts_paper(extreme, legal=legal, experts=EIGHT, total=14)) == {0: 2, 1: 6, 2: 6}


def test_a_layer_that_has_one_legal_count_takes_part(tmp_path: Path) -> None:
    target = prune.counts_exact(
        curves_of(value={"0": {"2": 3.0, "6": 1.0}}), legal={"0": [2, 6, 8], "1": [8]}, experts={"0": 8, "1": 8}, total=14
    )
    store = running.store_in(tmp_path)
    assert counts(store, target) == {0: 6, 1: 8}
    record = json.loads(store.artifact(target.key).file("counts.json").read_text())
    assert record["cost"] == 1.0 and "uniform" not in record


def test_a_total_that_no_counts_add_up_to_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no legal counts add up to 15 experts; nearest: 14 or 16"):
        counts_.check_total(15, {0: [4, 6, 8], 1: [4, 6, 8]})
    with pytest.raises(ValueError, match=r"add up to 3 experts; nearest: 8"):
        counts_.check_total(3, {0: [4, 6, 8], 1: [4, 6, 8]})


@pytest.mark.parametrize(
    ("family", "limits", "expected"),
    [
        ("mixtral", {}, [2, 3, 4, 5, 6, 7, 8]),
        ("mixtral", {"legal": (4, 6, 16)}, [4, 6]),
        ("mixtral", {"divisor": 4}, [4, 8]),
        ("mixtral", {"protected": ((0, 1), (0, 2), (0, 3))}, [3, 4, 5, 6, 7, 8]),
        ("deepseek_v3", {"protected": ((1, 0), (1, 1), (1, 2), (1, 3))}, [8]),  # a whole group
        ("deepseek_v3", {}, [6, 8]),  # two groups of which a token uses one, and three experts a token
    ],
)
def test_legal_counts_are_what_router_kernels_and_protection_leave(
    family: str, limits: dict, expected: list[int], tmp_path: Path
) -> None:
    model = running.model_in(tiny.write(family, tmp_path / "model"))
    assert counts_.legal_counts(model, Counts(0.5, **limits))[model.moe_layers[0] if family != "mixtral" else 0] == expected


def test_a_budget_is_the_same_in_experts_parameters_and_bytes(tmp_path: Path) -> None:
    model = running.model_in(tiny.write("mixtral", tmp_path / "model"))
    each = 3 * 48 * 32  # gate, up and down of one expert in fp32
    assert counts_.total_experts(model, Counts(0.75)) == 18
    assert counts_.total_experts(model, Counts(18)) == 18
    assert counts_.total_experts(model, Counts(18 * each, "parameters")) == 18
    assert counts_.total_experts(model, Counts(18 * each * 4, "bytes")) == 18
    assert counts_.total_experts(model, Counts(18 * each * 4 - 1, "bytes")) == 17
    with pytest.raises(ValueError, match="budget of 25 experts must lie between 0 and the 24"):
        counts_.total_experts(model, Counts(25))
    with pytest.raises(ValueError, match="unit='layers' is not known"):
        Counts(3, "layers")  # type: ignore[arg-type]


def test_no_legal_count_is_an_error_that_says_why(tmp_path: Path) -> None:
    model = running.model_in(tiny.write("mixtral", tmp_path / "model"))
    with pytest.raises(
        ValueError, match=r"layer 0 can keep 2 to 8 of its 8 experts, but no such count is among \[5, 7\], divides by 4"
    ):
        counts_.legal_counts(model, Counts(0.5, legal=(5, 7), divisor=4))
