"""Which experts a CUDA graph could hold: those whose forward never asks the GPU for a value."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from moeflow.model.formats import Format
from moeflow.model.routed_experts import RoutedExperts, waits
from tests.emulated_gpu import emulated

ALIKE, APART = (16, 16, 16, 16), (16, 16, 64, 64)
READS = (Tensor.tolist, Tensor.item, Tensor.__int__, Tensor.__bool__, Tensor.cpu, Tensor.numpy, Tensor.nonzero)
INDEXES = (Tensor.__getitem__, Tensor.__setitem__)


class Asked(TorchFunctionMode):
    """Notes the calls whose result, or its size, depends on the values of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = function in INDEXES and any(isinstance(t, Tensor) and t.dtype is torch.bool for t in tree_leaves(args[1]))
        if function in READS or masks:
            self.calls.append(function.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "format, waiting",
    [
        (Format(4), False),
        (Format(4, ALIKE, ALIKE, ALIKE), False),
        (Format(4, ALIKE, ALIKE, (0,) * 4), False),
        (Format(4, APART, APART, APART), True),
        (Format(4, (16, 0, 16, 16), (16, 0, 16, 16), ALIKE), True),
        (Format(4, (5, 5, 5, 5), (5, 5, 5, 5), (5, 5, 5, 5)), True),
    ],
)
def test_experts_of_one_kind_and_rank_do_not_wait_for_the_gpu(format: Format, waiting: bool) -> None:
    x, index, weights = torch.ones(6, 32), torch.arange(12).view(6, 2) % 4, torch.ones(6, 2)
    with emulated(), torch.inference_mode():
        experts = RoutedExperts(format, 32, 48, silu).to("cuda", torch.bfloat16)
        given = x.to("cuda", torch.bfloat16), index.to("cuda"), weights.to("cuda")
        with Asked() as asked:
            experts(*given)
    assert waits(format) == bool(asked.calls) == waiting, asked.calls
