"""How many threads, and how much of a GPU, a step computes with, in a process in which others have computed before."""

import subprocess
import sys
from collections.abc import Iterable

import pytest

from moeflow.machine import gpu_share
from moeflow.run import in_process
from moeflow.step import Context, step
from moeflow.store import Store

PROGRAM = """
from moeflow.run.work import threads

def now():
    lines = torch.__config__.parallel_info().splitlines()
    return [line.rpartition(" ")[2] for line in lines if "get_num_threads" in line or "mkl_get_max_threads" in line]

with threads(1):
    import torch
    torch.ones(64, 64) @ torch.ones(64, 64)
    print(*now())
with threads(2):
    print(*now())
torch.set_num_threads(3)
with threads(1):
    print(*now())
print(*now())
"""


def test_a_step_with_two_cpus_computes_on_two_behind_one_that_loaded_torch_with_one() -> None:
    """Also the products of matrices, which are MKL's where torch has it: it reads its number once, when it is loaded."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    each = [set(line.split()) for line in done.stdout.splitlines()]
    assert each == [{"1"}, {"2"}, {"1"}, {"3"}]


shares: list[float] = []


@step("toy.share", version=1)
def share(context: Context, *, n: int) -> None:
    shares.append(gpu_share())


@pytest.mark.parametrize(("gpus", "told"), [((0.5, 1, 0), [0.5, 1, 1]), ((2, 0.25), [1, 0.25])])
def test_a_step_that_has_a_part_of_a_gpu_knows_it_and_the_next_one_does_not(
    gpus: Iterable[float], told: list[float], store: Store
) -> None:
    shares.clear()
    for n, part in enumerate(gpus):
        in_process.run([share(n=n).on(gpus=part)], store)
    assert shares == told and gpu_share() == 1
