"""What transformers makes of a packed checkpoint in bf16 whose layers differ: in any precision, and saved again."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moeflow.methods.decompose.options import Decomposition
from moeflow.methods.evaluate.timing import measure
from moeflow.methods.graph import Model
from moeflow.methods.recipes import moei2, unified
from moeflow.methods.slim.methods import Slimming
from moeflow.methods.slim.steps import slimmed
from moeflow.methods.trim import steps as trim
from moeflow.model.layout import Folder, headers, read_config
from moeflow.model.loading import model_in as model_from
from moeflow.model.packed import PACKED
from tests import tiny
from tests.compressed import load
from tests.models import calibrated, close, loaded, logits, pulled
from tests.running import model_in, store_in
from tests.slimmed import FOUR, plain

FORMS = ["counts differ", "factors beside whole matrices", "bits differ, and some layers are whole"]
FAMILIES = ["mixtral", *(pytest.param(name, marks=pytest.mark.slow) for name in tiny.FAMILIES if name != "mixtral")]


@pytest.fixture(params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tiny.write(request.param, tmp_path / "model", dtype=torch.bfloat16)


def compressed(source: Path, form: str, folder: Path) -> Model:
    calibration = calibrated(model_in(source), folder)
    if form == "factors beside whole matrices":
        return moei2.decompose(calibration, Decomposition(ratio=0.3, ranks="global", multiple=8))
    layers = len(calibration.model.moe_layers)
    uneven = 2 if calibration.model.config.get("n_group") else layers + 1  # of each group as many stay
    return trim.trim(calibration, trim.Trimming("experts", dropped=uneven / layers, across="model"))


def slimmed_as(form: str, source: Path, folder: Path) -> Model:
    how = Slimming("round_to_nearest", **FOUR)
    if not form.startswith("bits"):
        return unified.slim(calibrated(compressed(source, form, folder), folder), how)
    calibration = calibrated(model_in(source), folder)
    first, *others = calibration.model.moe_layers
    bits = {first: replace(how, bits=8), others[-1]: how}  # what is between them stays whole
    made = {i: slimmed(*calibration.of(i), at=i, how=own, dtype=calibration.dtype) for i, own in bits.items()}
    return calibration.model.with_layers(made)


@pytest.mark.parametrize("form", FORMS)
def test_packed_layers_that_differ_compute_in_the_precision_asked_for_and_are_saved_whole(
    source: Path, form: str, tmp_path: Path
) -> None:
    model = slimmed_as(form, source, tmp_path)
    out = pulled(store_in(tmp_path), model, tmp_path)
    assert any(n.endswith(PACKED) for n in headers(Folder(out))), "nothing is packed"
    assert read_config(Folder(out))["model_type"].startswith("moeflow_"), "no layer differs"
    for dtype in (torch.float32, torch.bfloat16):
        exact = load(out, dtype=dtype)
        assert {p.dtype for n, p in exact.named_parameters() if ".experts." in n} == {dtype}
        exact.save_pretrained(tmp_path / f"{dtype}")
        assert "quantization_config" not in read_config(Folder(tmp_path / f"{dtype}"))
        assert torch.equal(logits(load(tmp_path / f"{dtype}", dtype=dtype), tmp_path), logits(exact, tmp_path))
    close(logits(load(out, dtype=torch.float32), tmp_path), logits(loaded(plain(out, tmp_path / "plain")), tmp_path))


@pytest.mark.parametrize("form", ["every layer alike", "counts differ"])
def test_loading_and_timing_packed_models_draws_no_bars(form: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = tiny.write("mixtral", tmp_path / "model")
    model = model_in(source) if form == "every layer alike" else compressed(source, form, tmp_path)
    out = pulled(store_in(tmp_path), unified.slim(calibrated(model, tmp_path), Slimming("round_to_nearest", **FOUR)), tmp_path)
    capfd.readouterr()
    measure([source, out], "cpu", 8, lambda *_: None)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("form", FORMS)
def test_who_loads_a_packed_model_is_told_nothing(
    form: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Neither bars, also at its first pass, nor a warning for every layer that its classes hold otherwise than the engine's do."""
    source = tiny.write("mixtral", tmp_path / "model", dtype=torch.bfloat16)
    folder = pulled(store_in(tmp_path), slimmed_as(form, source, tmp_path), tmp_path)
    capfd.readouterr()
    model = model_from(folder)
    assert model.config.model_type == "moeflow_mixtral"
    model(torch.arange(4)[None])
    assert capfd.readouterr() == ("", "")
    assert not [r for r in caplog.records if r.name.startswith("compressed_tensors")]
