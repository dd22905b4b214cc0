"""One GPU kernel for a product with all of a layer's experts, whatever the shape of each one's matrix, without waiting for the GPU.

torch's grouped product needs experts of one shape; ranks that differ would need one call, and one wait, for each shape. This kernel
takes them all. It computes no gradients. Shapes are suffixes: S routed (token, expert) pairs sorted by expert, E experts, M rows
and N columns of a matrix.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

AVAILABLE = torch.version.cuda is not None and find_spec("triton") is not None
"""Whether this torch is one for NVIDIA's GPUs and has its compiler of kernels."""


class Matrix(NamedTuple):
    """Where one expert's matrix [M, N] lies in a parameter, row by row; an expert that has none there has no rows."""

    begin: int = 0  # the number of elements before it
    rows: int = 0  # M
    columns: int = 0  # N


class Matrices:
    """The matrices of all experts in one parameter, as the kernel reads them."""

    def __init__(self, every: Sequence[Matrix]) -> None:
        self.every = tuple(every)
        self.rows = max(one.rows for one in every)
        self.align = next(a for a in (16, 8, 1) if not any(value % a for one in every for value in one))
        self._there: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """The numbers of each matrix, [E, 3]; copied to a device once."""
        if device not in self._there:
            self._there[device] = torch.tensor(self.every, dtype=torch.int64, device=device)
        return self._there[device]


def times(x_SN: Tensor, weights: Tensor, matrices: Matrices, ends_E: Tensor, out_SM: Tensor | None = None) -> Tensor:
    """Rows sorted by expert, each times its expert's matrix, [S, M].

    The rows of expert e end before `ends_E[e]`, int32. M is that of the tallest matrix: what is beyond an expert's own rows is left
    as it was, and so are the rows of experts that have no matrix here. Without `out_SM` these are not initialized. `x_SN` may be
    wider than an expert's N, whose columns come first.
    """
    from moeflow.model.ragged_kernel import launch

    if out_SM is None:
        out_SM = x_SN.new_empty(len(x_SN), matrices.rows)
    if len(x_SN) and matrices.rows:
        launch(x_SN, weights, matrices.on(x_SN.device), ends_E, out_SM, align=matrices.align)
    return out_SM
