"""How similar hidden states are that lie some decoder layers apart: mean cosines on recorded tokens.

Shapes are suffixes: N sequences, L positions, R recorded tokens, D model width.
"""

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from moeflow.model.checkpoint import Tensors
from moeflow.model.layout import Files


@torch.inference_mode()
def across(states: Sequence[Sequence[Files]], *, gap: int, tokens: int, progress: Callable[[int, int, str], None]) -> list[float]:
    """The mean cosine between the states before layer i and before layer i + `gap`, for every i (He et al., arXiv 2406.02500, 4.3).

    `states`: those of every shard before each layer, and behind the last one. The first `tokens` of each shard are compared.
    Cosines are fp32, their sum fp64. Memory holds `gap` + 1 states of one shard at a time.
    """
    total, count = torch.zeros(len(states) - gap, dtype=torch.float64), 0
    for n, shard in enumerate(zip(*states, strict=True)):
        window: deque[Tensor] = deque(maxlen=gap + 1)
        for at, files in enumerate(shard):
            window.append(_states(files, tokens))
            if len(window) > gap:
                total[at - gap] += cosine_similarity(window[0], window[-1], dim=-1).sum(dtype=torch.float64)
            progress(n * len(shard) + at + 1, len(states[0]) * len(shard), "states")
        count += len(window[0])
    return (total / count).tolist()


def _states(files: Files, tokens: int) -> Tensor:
    tensors = Tensors(files)
    state = tensors["hidden_RD"] if "hidden_RD" in tensors else tensors["hidden_NLD"].flatten(0, 1)
    return state[:tokens].float()
