"""Whether the experts of a served model are counted (`moeflow.serve.traffic`), and what it needs. No torch and no vLLM."""

import os
from typing import Any

VARIABLE = "MOEFLOW_TRAFFIC"
"""The variable of the environment that names the file to write."""


def wanted() -> str:
    """The file that is to be written; "" if none is."""
    return os.environ.get(VARIABLE, "")


def settle(parallel: Any) -> None:
    """Raise ValueError where vLLM's `ParallelConfig` gives a process other tokens or experts than those that are to be counted."""
    if parallel.enable_eplb:
        raise ValueError(f"{VARIABLE} counts experts, and --enable-eplb moves them between devices; leave one of them out")
    if parallel.data_parallel_size > 1:
        raise ValueError(
            f"{VARIABLE} counts one replica, and --data-parallel-size is {parallel.data_parallel_size}; record with one"
        )
    if parallel.use_sequence_parallel_moe:
        raise ValueError(f"{VARIABLE} counts all tokens of a process, and expert parallelism divides them here; record without it")
