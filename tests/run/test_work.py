"""How many threads a step computes with, in a process in which others have computed before."""

import subprocess
import sys

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
