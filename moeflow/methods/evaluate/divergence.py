"""How far one model's predictions are from another's, computed from the hidden states behind the last layer of each.

Shapes are suffixes: N sequences, L positions, T tokens, D model width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from moeflow.model.layout import Files
from moeflow.model.passes import Head


@dataclass(frozen=True)
class Comparison:
    """Two models on one token matrix; means over all positions that predict a token."""

    tokens: int
    """Positions that predict a token."""
    losses: tuple[float, float]
    """The mean loss of each model, in nats."""
    divergence: float
    """The KL divergence of the second model from the first, in nats."""
    agreement: float
    """The fraction of positions at which both predict the same token."""
    by_sequence: list[float]
    """The divergence of each sequence."""
    losses_by_sequence: tuple[list[float], list[float]]
    """The mean loss of each model on each sequence, in nats."""
    agreement_by_sequence: list[float]
    """The fraction of each sequence's positions at which both predict the same token."""


@torch.inference_mode()
def compared(
    first: Files, second: Files, ids: np.ndarray, first_states: Sequence[Path], second_states: Sequence[Path],
    *, dtype: str, progress: Callable[[int, int, str], None],
) -> Comparison:  # fmt: skip
    """Compare the predictions of two models for the tokens `ids` [N, L].

    `first` and `second` hold config.json, final norm and head. The states [n, L, D] of each may be in any number of files. A
    position counts if a token follows it. Raises ValueError if a model has too few or too many sequences.
    """
    one, other = Head(first, dtype), Head(second, dtype)
    ids_NL = torch.from_numpy(ids.astype(np.int64))
    sums = torch.zeros(4, dtype=torch.float64)
    done, total = 0, ids_NL[:, 1:].numel()
    by_sequence: list[list[float]] = []  # the four means of each sequence
    for ids_L, one_LD, other_LD in zip(ids_NL, _sequences(first_states), _sequences(second_states), strict=True):
        target_T = ids_L[1:].to(one.device)
        before = sums.clone()
        for (rows, one_TV), (_, other_TV) in zip(one.by_chunk(one_LD[:-1]), other.by_chunk(other_LD[:-1]), strict=True):
            sums += _sums(one_TV, other_TV, target_T[rows])
            done += len(one_TV)
        by_sequence.append(((sums - before) / max(1, len(target_T))).tolist())
        progress(done, total, "tokens")
    first_loss, second_loss, divergence, agreement = (sums / done).tolist()
    one_N, other_N, divergence_N, agreement_N = ([means[n] for means in by_sequence] for n in range(4))
    losses = first_loss, second_loss
    return Comparison(done, losses, divergence, agreement, divergence_N, (one_N, other_N), agreement_N)


def _sequences(files: Sequence[Path]) -> Iterator[Tensor]:
    """The hidden states [L, D] of each sequence in turn."""
    for file in files:
        yield from load_file(file)["hidden_NLD"]


def _sums(first_TV: Tensor, second_TV: Tensor, target_T: Tensor) -> Tensor:
    """The sums over tokens [4]: both losses, the divergence, and the number of agreements; fp64."""
    log_p, log_q = first_TV.log_softmax(-1), second_TV.log_softmax(-1)
    parts = (
        cross_entropy(first_TV, target_T, reduction="none"),
        cross_entropy(second_TV, target_T, reduction="none"),
        kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1),
        first_TV.argmax(-1) == second_TV.argmax(-1),
    )
    return torch.stack([p.double().sum() for p in parts]).cpu()
