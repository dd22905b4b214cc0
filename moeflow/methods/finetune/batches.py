"""The sequences of each optimizer step, the same for any number of processes, and each process's share of them. No torch.

Shapes are suffixes: N sequences, n some of them, L positions.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from moeflow.methods.graph import LEARNED, TOKENS
from moeflow.step import Artifact


@dataclass(frozen=True)
class Rows:
    """A matrix of token ids [N, L], and a mask of the learned tokens."""

    ids_NL: Any
    learned_NL: Any

    @staticmethod
    def of(artifact: Artifact) -> "Rows":
        """Read the rows of an artifact; without `learned.npy` every token is learned. Raises ValueError if no token is."""
        ids_NL = np.load(artifact.file(TOKENS), mmap_mode="r")
        if LEARNED in artifact.names():
            learned_NL = np.load(artifact.file(LEARNED), mmap_mode="r")
            if learned_NL.shape != ids_NL.shape:
                raise ValueError(f"{LEARNED} has shape {learned_NL.shape} and {TOKENS} {ids_NL.shape}; make the data again")
        else:
            learned_NL = np.broadcast_to(np.uint8(1), ids_NL.shape)
        rows = Rows(ids_NL, learned_NL)
        if not rows.counts_N.any():
            raise ValueError(
                f"nothing is to be predicted in the {len(ids_NL)} sequences: {LEARNED} is zero behind their first tokens"
            )
        return rows

    def __len__(self) -> int:
        return len(self.ids_NL)

    @property
    def length(self) -> int:
        return int(self.ids_NL.shape[1])

    @cached_property
    def counts_N(self) -> np.ndarray:
        """The number of learned tokens in each sequence, without its first token, which nothing predicts."""
        return np.count_nonzero(self.learned_NL[:, 1:], axis=1)

    def at(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The ids [n, L], and a mask of the learned tokens after each first one, bool [n, L-1]."""
        return np.asarray(self.ids_NL[rows], dtype=np.int64), np.asarray(self.learned_NL[rows])[:, 1:] != 0


def batch_of(step: int, batch: int, count: int, seed: int) -> np.ndarray:
    """The rows of one optimizer step. Every row comes once, in an order drawn from the seed, then again in another order."""
    first = step * batch
    epochs = range(first // count, (first + batch - 1) // count + 1)
    order = np.concatenate([np.random.default_rng([seed, epoch]).permutation(count) for epoch in epochs])
    return order[first - epochs[0] * count :][:batch]


def dealt(rows: np.ndarray, rank: int, processes: int, micro: int) -> list[np.ndarray]:
    """The micro-batches of one process: its share of the rows, in their order."""
    share = rows.reshape(processes, -1)[rank]
    return list(share.reshape(-1, micro))
