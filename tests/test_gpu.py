"""The table of a GPU: it runs where little is installed, says what is off, and every tensor path works on a device of its own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import gpu, gpu_paths
from benchmarks.gpu_paths import Place, TensorPath
from moeflow.methods.decompose.lowrank import components
from moeflow.methods.moments import second_moment
from moeflow.model.formats import Format
from moeflow.model.routed_experts import RoutedExperts
from tests.emulated_gpu import emulated

ABSENT = (
    "ray", "deepspeed", "boto3", "botocore", "typer", "datasets", "pyarrow", "accelerate", "compressed_tensors", "psutil", "xxhash",
    "threadpoolctl", "peft", "scipy", "pandas", "pytest", "moto",
)  # fmt: skip
"""What a machine with torch and transformers need not have."""

FIRST = (
    "MoE layer, deepseek_v3", "errors of subsets from Gram matrices, mixtral", "second moments of a layer",
    "decomposition, steep, which takes fp64", "GPTQ, activation order", "SparseGPT, 2:4", "Wanda, half",
    "routed experts, some whole, others ragged", "routed experts, gradients of ragged ranks", "observe, mixtral",
    "layers moved from files, mixtral",
)  # fmt: skip
"""Paths of every kind."""
PATHS = {path.name: path for path in gpu_paths.paths()}


@pytest.mark.parametrize("only", ["speed", pytest.param("", marks=pytest.mark.slow)])
def test_the_table_is_made_where_only_torch_and_transformers_are(only: str) -> None:
    arguments = ["gpu", "--small", *(["--only", only] if only else [])]
    code = (
        f"import sys, runpy; sys.modules |= dict.fromkeys({ABSENT}); sys.argv = {arguments}\n"
        "runpy.run_module('benchmarks.gpu', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    compared = [] if only else [f"| {name} | {precision} |" for name in PATHS for precision in gpu.DTYPES]
    assert all(any(start in row for row in rows) for start in compared)
    for work in ("low-rank forward", "observe", "search", "genetic search", "GPTQ", "SVD"):
        (row, *_) = (r for r in rows if r.startswith(f"| small | {work}"))
        ours, naive, faster, floor = re.search(
            r"\| ([\d.]+ m?µ?s) \| ([\d.]+ m?µ?s) \| ([\d.e+]+) \| ([\d.]+ m?µ?s) \|", row
        ).groups()  # type: ignore[union-attr]
        assert ours and naive and floor and float(faster) > 0
    assert re.search(r"^\d{4}-\d\d-\d\d, .*no GPU; Python [\d.]+, torch ", done.stdout, re.M)
    assert "every path is right" in done.stdout


def off_in_bf16(at: Place) -> Tensor:
    return torch.tensor([1.0 if at.dtype != torch.bfloat16 else 1.05])


def on_no_device(at: Place) -> Tensor:
    raise RuntimeError("Expected all tensors to be on the same device\nbut found two | devices")


def test_a_path_that_is_off_or_fails_is_a_failed_row_and_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    right = TensorPath("right", lambda at: at(torch.ones(3)))
    assert gpu.main(["--small", "--only", "correctness"], [right]) == 0
    assert "| right | fp32 | 0 | 0.0001 | yes |" in capsys.readouterr().out
    assert gpu.main(["--small", "--only", "correctness"], [right, TensorPath("off", off_in_bf16)]) == 1
    said = capsys.readouterr().out
    assert "| off | fp32 | 0 | 0.0001 | yes |" in said and "| off | bf16 | 0.05 | 0.03 | NO |" in said
    assert "a path is NOT right" in said
    assert gpu.main(["--small", "--only", "correctness"], [TensorPath("failing", on_no_device)]) == 1
    assert "NO: RuntimeError: Expected all tensors to be on the same device but found two / devices |" in capsys.readouterr().out


def test_a_number_that_is_none_is_no_small_distance(capsys: pytest.CaptureFixture[str]) -> None:
    nan = TensorPath("nan", lambda at: torch.tensor([1.0 if at.dtype == torch.float64 else torch.nan]))
    assert gpu.main(["--small", "--only", "correctness"], [nan]) == 1
    assert "| nan | fp32 | nan | 0.0001 | NO |" in capsys.readouterr().out


def test_what_does_not_fit_into_the_time_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--small", "--minutes", "0"], [PATHS["GPTQ"]]) == 0
    said = capsys.readouterr().out
    assert "| GPTQ | fp32 | | | not run: no time left |" in said
    assert all(f"| small | {work} | not run: no time left |" in said for work in gpu.WORKS)
    assert "every path is right" not in said and "not all was run" in said


def test_without_a_gpu_the_way_out_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit) as stopped:
        gpu.main([])
    assert stopped.value.code == 2
    assert "torch sees no GPU here; give --small" in capsys.readouterr().err


@pytest.mark.parametrize("name", [*FIRST, *(pytest.param(n, marks=pytest.mark.slow) for n in PATHS if n not in FIRST)])
def test_a_path_computes_on_a_device_what_it_does_on_the_processor(name: str) -> None:
    """On an emulated device, which refuses tensors of both."""
    path = PATHS[name]
    with emulated():
        for dtype in gpu.DTYPES.values():
            assert path.distance("cuda", dtype) <= path.bound(dtype)


def test_the_emulated_device_refuses_what_a_device_refuses() -> None:
    here, number = torch.ones(3), torch.tensor(2.0)
    with emulated():
        there = here.to("cuda")
        assert there.device.type == "cuda" and torch.zeros(2, device="cuda").is_cuda and there.new_tensor([1]).is_cuda
        assert torch.equal((there * number).cpu(), here * 2) and torch.equal(there[torch.tensor([0, 1])].cpu(), here[:2])
        for wrong in (
            lambda: there + here,
            lambda: here.add_(there.sum()),
            lambda: torch.cat([here, there]),
            lambda: here[there > 0],
        ):
            with pytest.raises(RuntimeError, match="same device"):
                wrong()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()


def test_experts_in_fp64_are_computed_on_a_device() -> None:
    """Its kernel for all experts at once knows no fp64."""
    path = PATHS["routed experts, ragged ranks"]
    with emulated():
        assert path.distance("cuda", torch.float64) < 1e-12


def test_experts_that_no_token_reaches_give_no_rows_and_a_zero_gradient() -> None:
    """Also where none of the experts that are low-rank is reached, on the way of a device."""
    ranks = (8, 0, 8, 0)
    experts = RoutedExperts(Format(4, ranks, ranks, ranks), 32, 16, torch.nn.functional.silu)
    with emulated():
        there = experts.to("cuda")
        for index in ([[1, 3]], [[0, 2]]):
            there(torch.ones(1, 32).to("cuda"), torch.tensor(index).to("cuda"), torch.ones(1, 2).to("cuda")).sum().backward()
        assert all(p.grad is not None for p in there.parameters())


def test_a_decomposition_that_fp32_cannot_do_is_done_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's solver gives up on some matrices whose eigenvalues repeat, where the processor's does not."""
    eigh, w_MN, x_TN = torch.linalg.eigh, torch.randn(6, 8), torch.randn(40, 8)
    expected = components(w_MN, input_moment_NN=second_moment(x_TN), rank=3).truncated(3).whole()

    def giving_up(matrix: Tensor) -> tuple[Tensor, Tensor]:
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", giving_up)
    torch.testing.assert_close(components(w_MN, input_moment_NN=second_moment(x_TN), rank=3).truncated(3).whole(), expected)
    wide = components(torch.stack([w_MN, w_MN]), input_moment_NN=second_moment(x_TN).expand(2, -1, -1), rank=3)
    torch.testing.assert_close(wide.truncated(3).whole()[1], expected)
