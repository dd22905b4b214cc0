"""Distillation: a teacher's predictions, cut to its likeliest tokens or whole, and a model's divergence from them.

Shapes are suffixes: N sequences, n some of them, L positions, T tokens, D model width, V vocabulary, K tokens that are kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from moeflow.model.checkpoint import DTYPES
from moeflow.model.layout import Files
from moeflow.model.passes import Head


@torch.inference_mode()
def write_predictions(
    rest: Files, states: Path, out: Path, *, top: int, dtype: str, progress: Callable[[int, int, str], None]
) -> None:
    """Write a model's predictions from its hidden states [N, L, D] behind the last layer.

    For every position the file has the `top` likeliest next tokens `id_NLK` (int32), the logarithms of their probabilities
    `log_p_NLK`, and `log_rest_NL`, the logarithm of the probability of all other tokens together (fp32), minus infinity if all
    tokens are kept. `rest` holds config.json, final norm and head.
    """
    head = Head(rest, dtype)
    states_NLD = load_file(states)["hidden_NLD"]
    n, length = states_NLD.shape[:2]
    kept: dict[str, list[Tensor]] = {"id_NLK": [], "log_p_NLK": [], "log_rest_NL": []}
    for _, logits_TV in head.by_chunk(states_NLD.flatten(0, 1)):
        log_TV = logits_TV.log_softmax(-1)
        log_TK, id_TK = log_TV.topk(top, dim=-1)
        rest_T = log_TV.scatter(-1, id_TK, -torch.inf).logsumexp(-1)
        for name, part in zip(kept, (id_TK.int(), log_TK, rest_T), strict=True):
            kept[name].append(part.cpu())
        progress(sum(len(part) for part in kept["id_NLK"]), n * length, "tokens")
    save_file({name: torch.cat(parts).unflatten(0, (n, length)).contiguous() for name, parts in kept.items()}, out)


class _Rows:
    """Tensors of the same names in several files, each of any number of sequences, row by row."""

    def __init__(self, files: Sequence[Path], *names: str) -> None:
        self._files: list[Any] = [safe_open(file, "pt") for file in files]
        self._names = names
        self._ends = np.cumsum([file.get_slice(names[0]).get_shape()[0] for file in self._files])

    @property
    def dtype(self) -> str:
        """The precision of the first of them, by torch's name."""
        return str(DTYPES[self._files[0].get_slice(self._names[0]).get_dtype()]).removeprefix("torch.")

    def learned(self, rows: np.ndarray, learned_nL: Tensor) -> list[Tensor]:
        """Each tensor at the positions of these rows whose next token is learned: [T, ...], where the mask lies."""
        parts = [tuple(part[where] for part in self._row(int(row))) for row, where in zip(rows, learned_nL.cpu(), strict=True)]
        return [torch.cat(part).to(learned_nL.device) for part in zip(*parts, strict=True)]

    def _row(self, row: int) -> list[Tensor]:
        at = int(np.searchsorted(self._ends, row, side="right"))
        file, inside = self._files[at], row - (int(self._ends[at - 1]) if at else 0)
        return [file.get_slice(name)[inside : inside + 1][0, :-1] for name in self._names]


@dataclass(frozen=True)
class Likeliest:
    """A teacher's likeliest tokens and their logarithms, [T, K], and the logarithm of all others together, [T]."""

    id_TK: Tensor
    log_p_TK: Tensor
    log_rest_T: Tensor

    def divergence(self, logits_TV: Tensor) -> Tensor:
        """KL(p || q) from the teacher's predictions p to a model's logits, in nats, [T], fp32.

        All tokens but the teacher's likeliest count as one, so the result is a lower bound of the divergence; it is exact if the
        teacher's whole vocabulary is kept.
        """
        log_q_TV = logits_TV.float().log_softmax(-1)
        kl_T = (self.log_p_TK.exp() * (self.log_p_TK - log_q_TV.gather(-1, self.id_TK))).sum(-1)
        if self.id_TK.shape[-1] == logits_TV.shape[-1]:
            return kl_T
        rest_q_T = log_q_TV.scatter(-1, self.id_TK, -torch.inf).logsumexp(-1)
        return kl_T + self.log_rest_T.exp() * (self.log_rest_T - rest_q_T)


@dataclass(frozen=True)
class Whole:
    """The logarithms of a teacher's predictions for all tokens, [T, V]."""

    log_p_TV: Tensor

    def divergence(self, logits_TV: Tensor) -> Tensor:
        """KL(p || q) from the teacher's predictions p to a model's logits, in nats, [T], fp32."""
        return kl_div(logits_TV.float().log_softmax(-1), self.log_p_TV, reduction="none", log_target=True).sum(-1)


Taught = Likeliest | Whole


class Predictions:
    """Reads the files of `write_predictions`."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._rows = _Rows(files, "id_NLK", "log_p_NLK", "log_rest_NL")

    def of(self, rows: np.ndarray, learned_nL: Tensor) -> Taught:
        """What is predicted at the positions of these rows whose next token is learned."""
        id_TK, log_p_TK, log_rest_T = self._rows.learned(rows, learned_nL)
        return Likeliest(id_TK.long(), log_p_TK, log_rest_T)


class States:
    """Reads a teacher's hidden states behind the last layer, of which its head makes its whole predictions, in their precision."""

    def __init__(self, files: Sequence[Path], head: Files) -> None:
        self._rows = _Rows(files, "hidden_NLD")
        self._head = Head(head, self._rows.dtype)

    @torch.no_grad()
    def of(self, rows: np.ndarray, learned_nL: Tensor) -> Taught:
        """What is predicted at the positions of these rows whose next token is learned."""
        (states_TD,) = self._rows.learned(rows, learned_nL)
        return Whole(self._head.logits(states_TD).log_softmax(-1))


Teacher = Predictions | States


def loss_sum(logits_nLV: Tensor, ids_nL: Tensor, learned_nL: Tensor, taught: Taught | None, mix: float) -> Tensor:
    """The loss summed over the learned tokens: `mix` of the divergence from the teacher, the rest language modelling."""
    logits_TV = logits_nLV[:, :-1][learned_nL].float()
    if taught is not None and mix == 1:
        return taught.divergence(logits_TV).sum()
    lm = cross_entropy(logits_TV, ids_nL[:, 1:][learned_nL], reduction="sum")
    return lm if taught is None else mix * taught.divergence(logits_TV).sum() + (1 - mix) * lm
