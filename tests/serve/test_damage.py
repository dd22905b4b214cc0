"""A checkpoint whose tensors are not those that its configuration says is refused, whichever way it would run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moeflow.model.layout import Folder, read_config
from tests.compressed import compress, write
from tests.serve import forms
from tests.serve.engine import served

pytest.importorskip("vllm", reason="needs vLLM; `make test-serve` makes an environment with it")
pytestmark = pytest.mark.serve

E = "model.layers.1.block_sparse_moe.experts"
GATE = "model.layers.0.block_sparse_moe.gate.weight"


def swap(tensors: dict[str, Tensor], one: str, other: str) -> None:
    tensors[one], tensors[other] = tensors[other], tensors[one]


LOW_RANK: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "wrong rank": (
        lambda t: t.update({f"{E}.1.w1.factor_out": torch.zeros(96, 5), f"{E}.1.w1.factor_in": torch.zeros(5, 128)}),
        r"1\.w1\.factor_.* has shape .*5.* where config.json asks for .*6",
    ),
    "missing factor": (lambda t: t.pop(f"{E}.1.w1.factor_in"), "has no tensor .*1.w1.factor_in, which its config.json asks for"),
    "whole beside factors": (
        lambda t: t.update({f"{E}.1.w1.weight": torch.zeros(96, 128)}),
        "1.w1.weight, which its config.json leaves no place for",
    ),
    "swapped factors": (lambda t: swap(t, f"{E}.1.w1.factor_in", f"{E}.1.w1.factor_out"), "1.w1.factor_.* has shape"),
}
COUNTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing expert": (lambda t: [t.pop(f"{E}.7.w{i}.weight") for i in (1, 2, 3)], "has no tensor .*7.w1.weight"),
    "extra expert": (
        lambda t: t.update({f"{E}.8.w{i}.weight": t[f"{E}.7.w{i}.weight"].clone() for i in (1, 2, 3)}),
        "has .*8.w1.weight, .* leaves no place for",
    ),
    "wrong count of the router": (lambda t: t.update({GATE: torch.zeros(6, 128)}), r"gate.weight has shape \(6, 128\)"),
    "swapped matrices": (lambda t: swap(t, f"{E}.0.w1.weight", f"{E}.0.w2.weight"), r"0\.w[12]\.weight has shape"),
    "missing norm": (lambda t: t.pop("model.norm.weight"), "has no tensor model.norm.weight"),
    "extra tensor": (lambda t: t.update({"model.surprise": torch.zeros(1)}), "model.surprise, which its config.json leaves no"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return forms.original("mixtral", tmp_path_factory.mktemp("mixtral") / "original")


def refused(made: Path, change: Callable[[dict[str, Tensor]], Any], says: str, out: Path, **options: Any) -> None:
    tensors = {n: t for file in made.glob("*.safetensors") for n, t in load_file(file).items()}
    change(tensors)
    write(tensors, read_config(Folder(made)), out)
    with pytest.raises(ValueError, match=says), served(out, **options):
        pass


@pytest.mark.parametrize("way", ["native", "general"])
@pytest.mark.parametrize("kind", LOW_RANK)
def test_factors_that_are_not_as_the_configuration_says_are_refused(source: Path, kind: str, way: str, tmp_path: Path) -> None:
    refused(compress(source, tmp_path / "low"), *LOW_RANK[kind], tmp_path / "damaged", hf_overrides={"moeflow_way": way})


@pytest.mark.parametrize("way", ["native", "general"])
@pytest.mark.parametrize("kind", COUNTS)
def test_experts_that_are_not_as_the_configuration_says_are_refused(source: Path, kind: str, way: str, tmp_path: Path) -> None:
    refused(forms.counts(source, tmp_path / "counts"), *COUNTS[kind], tmp_path / "damaged", hf_overrides={"moeflow_way": way})


def test_a_packed_matrix_without_its_scales_is_refused(source: Path, tmp_path: Path) -> None:
    change = lambda t: t.pop("model.layers.0.block_sparse_moe.experts.3.w2.weight_scale")  # noqa: E731
    refused(forms.packed(source, tmp_path / "packed"), change, "3.w2.weight", tmp_path / "damaged")
