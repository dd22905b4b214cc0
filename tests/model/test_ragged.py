"""Experts of differing ranks in one kernel: where each matrix lies, and what the kernel gives, beside a loop over experts.

The kernel itself runs on a GPU, or, where Triton is installed, in its interpreter.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from benchmarks.gpu_paths import EXPERTS, Place, _filled
from moeflow.model import ragged
from moeflow.model.ragged import Matrices, Matrix
from tests.emulated_gpu import emulated


def by_loop(x_SN: Tensor, weights: Tensor, matrices: Matrices, ends_E: Tensor, out_SM: Tensor | None = None) -> Tensor:
    """`ragged.times` without a kernel."""
    made = torch.full((len(x_SN), matrices.rows), torch.nan, dtype=x_SN.dtype, device=x_SN.device) if out_SM is None else out_SM
    begin = 0
    for (at, rows, columns), end in zip(matrices.every, ends_E.tolist(), strict=True):
        own_MN = weights.reshape(-1)[at : at + rows * columns].view(rows, columns)
        made[begin:end, :rows] = x_SN[begin:end, :columns] @ own_MN.T if rows else made[begin:end, :rows]
        begin = end
    return made


@pytest.fixture
def kernel() -> Iterator[list[int]]:
    """The heights of the products that go through `ragged.times`, which is a loop meanwhile."""
    seen: list[int] = []

    def times(*given: Tensor, **more: Tensor) -> Tensor:
        made = by_loop(*given, **more)  # type: ignore[arg-type]
        seen.append(made.shape[1])
        return made

    with emulated(), patch.object(ragged, "AVAILABLE", True), patch.object(ragged, "times", times):
        yield seen


@pytest.mark.parametrize("name", EXPERTS)
def test_every_expert_finds_its_own_matrices(kernel: list[int], name: str) -> None:
    experts, inputs = _filled(EXPERTS[name], Place("cpu", torch.float64, torch.float64))
    with torch.no_grad():
        wanted = experts(*inputs)
        there = experts.to("cuda", torch.float32)
        given = [t.to("cuda", torch.float32) if t.is_floating_point() else t.to("cuda") for t in inputs]
        assert torch.allclose(there(*given).cpu().double(), wanted, rtol=1e-4, atol=1e-3)
    assert bool(kernel) == experts.apart == (name in {"ragged ranks", "some whole, others ragged", "no gate, biases", ODD})
    with torch.enable_grad():  # the kernel computes no gradients
        kernel.clear()
        there(*given)
    assert not kernel


ODD = "ragged ranks, multiples of nothing"


def cases() -> Iterator[tuple[Tensor, Tensor, Matrices, Tensor]]:
    """Experts without rows, without a matrix, taller than a tile and narrower than one; then a single row."""
    draw = torch.Generator().manual_seed(0)
    sides = [(16, 8), (0, 0), (200, 64), (24, 40), (72, 136), (40, 16), (8, 8)]
    begins = [sum(m * n for m, n in sides[:e]) for e in range(len(sides))]
    matrices = Matrices([Matrix(at, m, n) for at, (m, n) in zip(begins, sides, strict=True)])
    weights = torch.randn(sum(m * n for m, n in sides), generator=draw)
    for counts in ([5, 3, 70, 0, 33, 1, 200], [0, 0, 0, 1, 0, 0, 0]):
        yield torch.randn(sum(counts), 136, generator=draw), weights, matrices, torch.tensor(counts).cumsum(0, dtype=torch.int32)


def compare(device: str, dtype: torch.dtype) -> None:
    rtol, atol = (1e-4, 1e-4) if dtype is torch.float32 else (1e-2, 0.2)
    for x_SN, weights, matrices, ends_E in cases():
        given = x_SN.to(device, dtype), weights.to(device, dtype)
        was_SM = torch.full((len(x_SN), matrices.rows), 7.0)
        made = ragged.times(*given, matrices, ends_E.to(device), was_SM.to(device, dtype, copy=True)).cpu().float()
        wanted = by_loop(*(t.cpu().float() for t in given), matrices, ends_E, was_SM.clone())
        assert torch.allclose(made, wanted, rtol=rtol, atol=atol)


@pytest.mark.skipif(not (torch.cuda.is_available() and ragged.AVAILABLE), reason="there is no GPU with Triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_gives_what_a_loop_gives(dtype: torch.dtype) -> None:
    compare("cuda", dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which shows more")
def test_the_kernel_gives_what_a_loop_gives_in_its_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    code = "import torch, tests.model.test_ragged as t; t.compare('cpu', torch.float32)"
    interpreted = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=interpreted)
    assert done.returncode == 0, done.stderr[-2000:]
