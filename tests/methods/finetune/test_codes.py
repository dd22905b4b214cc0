"""Codes of packed experts that are trained: what moves one, how far, in every form, and in processes that divide the weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig

from moeflow.arch import layer_of
from moeflow.methods.data import steps as data_
from moeflow.methods.finetune.memory import Work
from moeflow.methods.finetune.packed import CODES_PACE, LONG, Points, Rounding, Scaling, codes_pace, recoded
from moeflow.methods.finetune.recipe import Gang, Recipe
from moeflow.methods.finetune.trained import _file_of
from moeflow.methods.graph import Sample
from moeflow.methods.recipes import tune, unified
from moeflow.methods.slim.methods import Slimming
from moeflow.model.packed import PACKED, SCALE, codes_of, pack
from moeflow.store import Store
from tests import normal, tiny
from tests.methods.finetune.test_packed import ALIKE, HOW, differing, loss_of, losses, packed_as, stored, trained
from tests.models import calibrated, loaded, pulled
from tests.running import alone, matrix_of, model_in, run, store_in
from tests.slimmed import FOUR

CODES = torch.tensor([1.0, -2.0, 0.0, 1.0]).repeat(4).view(1, 1, 16)
STEPS = torch.tensor([0.5, 0.5, 0.25, 0.25]).repeat(4).view(1, 1, 16)
PACE = codes_pace(100)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return store_in(tmp_path)


def test_a_code_changes_once_it_has_moved_by_half_and_never_beyond_what_its_bits_say() -> None:
    """And every number gets the gradient of its weight, rounded or not, but where it would leave these points."""
    weight = CODES * STEPS
    rounding = Rounding(weight, 2, Points(CODES, STEPS, bits=2), PACE, shape=(1, 1, 16))
    assert torch.equal(rounding(weight), weight)
    with torch.no_grad():
        rounding.codes.copy_((torch.tensor([0.4, 0.6, -0.6, 0.6]) / PACE).repeat(4))
    out = rounding(weight)
    assert torch.equal(out, torch.tensor([1.0, -1.0, -1.0, 1.0]).repeat(4) * STEPS)
    out.sum().backward()
    open_ = torch.tensor([0.0, 1.0, 1.0, 0.0]).repeat(4)
    assert torch.allclose(rounding.codes.grad / PACE, STEPS * open_), "1 is the most of 2 bits"
    with torch.no_grad():
        rounding.scales.fill_(0.02)  # 1.1 of each, at the pace of scales
    assert torch.allclose(rounding(weight), out * 1.1)
    stored_as = pack(CODES[0].to(torch.int8), STEPS[0, :, ::2], 2)
    words = recoded(stored_as, PACE * rounding.codes.detach()[0])
    assert codes_of({**stored_as, PACKED: words}).tolist() == [4 * [1, -1, -1, 1]], "on disk as in training"


def test_codes_travel_no_farther_in_a_long_training() -> None:
    assert codes_pace(0) == codes_pace(LONG) == CODES_PACE
    assert [codes_pace(LONG * n) * LONG * n for n in (2, 10)] == [CODES_PACE * LONG] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_with_zero_points(dtype: torch.dtype, store: Store, tmp_path: Path) -> None:
    source = tiny.write("mixtral", tmp_path / "model", dtype=dtype)
    how = Slimming("round_to_nearest", symmetric=False, **FOUR)
    packed = unified.slim(calibrated(model_in(source), tmp_path), how)
    tuned = trained(packed, tmp_path, packed="codes")
    out = pulled(store, tuned.model, tmp_path)
    assert differing(stored(pulled(store, packed, tmp_path / "before")), stored(out), PACKED) == 1
    first, last = losses(store, tuned)
    assert last < first - 0.02
    assert loss_of(out, tmp_path) == pytest.approx(last, abs=1e-4 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("what", ["scales", "codes"])
def test_what_lies_beside_packed_experts_is_not_trained_as_their_scales(what: str, tmp_path: Path) -> None:
    """A scale on disk is of the codes alone, and would scale the addition in memory, too."""
    source = tiny.write("mixtral", tmp_path / "model")
    tuned = trained(packed_as(ALIKE, source, tmp_path), tmp_path)
    message = (
        rf"layer 0 has low-rank additions beside its packed experts, .* and packed='{what}' trains these; take packed='beside'"
    )
    with pytest.raises(ValueError, match=message):
        trained(tuned.model, tmp_path, packed=what)
    assert trained(tuned.model, tmp_path, packed=what, targets=("attention",)).trained is not None


def test_what_codes_need_is_planned_and_scales_are_advised_where_they_would_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny.write("mixtral", tmp_path / "model")
    packed = packed_as(ALIKE, source, tmp_path)
    data = data_.tokens(matrix_of(tmp_path), packed, Sample(8, 16))
    whole = model_in(source)
    weights = sum(w.numel() for n, w in loaded(pulled(store_in(tmp_path), whole, tmp_path)).named_parameters() if ".experts." in n)

    def need(what: Any, gang: Gang = Gang(zero=0)) -> int:
        return int(tune.tune(packed, data, Recipe(**(HOW | {"packed": what})), gang=gang).trained.resources.device)

    for most, taken in ((weights, "codes"), (weights - 1, "scales")):
        monkeypatch.setattr("moeflow.methods.finetune.recipe.CODES", most)
        assert need("auto") == need(taken), "by how many weights are packed"
    more, layers = need("codes") - need("scales"), len(whole.layers)
    kept = (
        (4 + 4 + 4) * (layers + 2) / layers
    )  # in fp32 where codes are, and the sums before scales; of the largest layer twice more
    assert more == pytest.approx(1.1 * weights * (8 + 4 + 4 + 8 + kept), rel=1e-3), "moments, gradient, code, start and distance"
    between = (need("codes", Gang(zero=0, micro=1)) + need("scales", Gang(zero=0, micro=1))) // 2
    with pytest.raises(ValueError, match=r"; packed=scales, which trains no codes, needs 1\.1 GB"):
        need("codes", Gang(zero=0, micro=1, device_memory=between))
    apart = need("scales", Gang(processes=2, zero=3, micro=1))
    assert apart < need("codes", Gang(processes=2, zero=3, micro=1, checkpointing=True, offload=True)), "which nothing makes fit"
    with pytest.raises(ValueError, match=r"; packed=scales, which trains no codes: zero=3 needs 1\.1 GB$"):
        need("codes", Gang(processes=2, zero=0, micro=1, device_memory=apart))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("what", ["codes", "scales"])
def test_what_a_forward_pass_keeps_is_counted(what: Any, dtype: torch.dtype) -> None:
    """Beside the parameters themselves; and how many numbers are trained."""
    config = MixtralConfig(num_hidden_layers=1, num_local_experts=2, hidden_size=128, intermediate_size=256).to_dict()
    names = [(f"model.layers.0.block_sparse_moe.experts.{e}.w2.weight", (128, 256)) for e in range(2)]
    recipe = Recipe(packed=what, targets=("experts",), steps=8, rank=2, dtype=str(dtype).removeprefix("torch."))
    work = Work(config, {0: dict(names)}, {}, {0: dict(names)}, recipe, 16, packed={0: 32})
    weight, shape = torch.randn(2, 128, 256, dtype=dtype), (2, 128, 256)
    points = Points(torch.zeros(shape), torch.ones(shape), bits=4)
    addition = Rounding(weight, 32, points, PACE, shape=shape) if what == "codes" else Scaling(weight, 32, shape=shape)
    kept: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = addition(weight)
    own = {p.untyped_storage().data_ptr() for p in (weight, *addition.parameters())}
    assert work.made(0) == out.nbytes + sum(size for at, size in kept.items() if at not in own)
    assert work.count == sum(p.numel() for p in addition.parameters() if p.requires_grad)


@pytest.mark.parametrize("family, targets", [("mixtral", ("experts",)), ("nemotron_h", ("attention", "experts"))])
@pytest.mark.parametrize("what", ["codes", "scales"])
def test_packed_experts_are_written_where_nothing_else_of_their_layer_is_trained(
    family: str, targets: Any, what: str, store: Store, tmp_path: Path
) -> None:
    """Also in a model whose layers are either attention or experts; that layout's names are not those that transformers loads."""
    make = normal.write if family in normal.FAMILIES else tiny.write
    packed = packed_as(ALIKE, make(family, tmp_path / "model"), tmp_path)
    tuned = trained(packed, tmp_path, packed=what, targets=targets)
    before, out = (pulled(store, m, tmp_path / n) for n, m in {"before": packed, "after": tuned.model}.items())
    changed = {layer_of(n) for n, t in stored(before).items() if n.endswith(SCALE) and not torch.equal(t, stored(out)[n])}
    assert changed == {*packed.moe_layers}
    if family == "mixtral":
        assert loss_of(out, tmp_path) == pytest.approx(losses(store, tuned)[1], rel=1e-3)


def test_something_trained_that_has_no_place_is_an_error() -> None:
    files = {"a.weight": "layer.safetensors", "b.weight": "other.safetensors"}
    assert [_file_of(f"a.weight{end}", files) for end in ("", SCALE, PACKED)] == 3 * ["layer.safetensors"]
    with pytest.raises(RuntimeError, match=r"c\.weight_packed was trained, and the checkpoint has no such tensor"):
        _file_of("c.weight" + PACKED, files)


@pytest.mark.slow
def test_processes_that_divide_the_weights_train_the_same_codes(tmp_path: Path) -> None:
    source = tiny.write("mixtral", tmp_path / "model")
    packed = model_in(pulled(store_in(tmp_path), packed_as("factors beside whole matrices", source, tmp_path), tmp_path))
    before = stored(pulled(store_in(tmp_path), packed, tmp_path / "before"))
    data = data_.tokens(matrix_of(tmp_path), packed, Sample(8, 16))
    courses = []
    for name, gang in {"one": Gang(), "divided": Gang(processes=2, zero=3)}.items():
        tuned = tune.tune(packed, data, Recipe(**(HOW | {"packed": "codes"})), validation={"same": data}, gang=gang)
        assert tuned.trained is not None
        run(store_in(tmp_path / name), alone(tuned.trained) if name == "one" else tuned.trained)
        course = store_in(tmp_path / name).artifact(tuned.trained.key).file("training.json").read_text()
        courses.append(json.loads(course)["losses"])
        out = pulled(store_in(tmp_path / name), tuned.model, tmp_path / f"out {name}")
        assert differing(before, stored(out), PACKED) == 1
    assert courses[1] == pytest.approx(courses[0], rel=1e-3)
