"""Moving a matrix, before it is made sparse or quantized, so that it makes up for what its inputs have lost already.

GPTQ as published gives each matrix its own outputs on what it sees. Where what it sees has changed, another target is nearer to the
model: the outputs that the matrix gave before the change, as in GPTAQ (Li et al., arXiv 2504.02692, section 3). There it is a term
of GPTQ's updates; here the weight is moved by least squares first, so that any method may follow.

Shapes are suffixes: T tokens, t some of them, M outputs and N inputs of a matrix.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moeflow.methods.moments import INNER_AT_ONCE

DAMPS = (0.1, 1.0)
"""What is added to the diagonal, as parts of its mean: the first one that helps is taken, or no correction where neither does."""


@dataclass(frozen=True)
class Seen:
    """Some tokens as a matrix sees them; each row is multiplied by what its token counts."""

    now_tN: Tensor
    """The inputs as they are now."""
    before_tN: Tensor
    """The inputs as they were: what the matrix gave for these is wanted."""
    lacks_tM: Tensor | None = None
    """What is wanted beside."""


@dataclass(frozen=True)
class Wanted:
    """What a matrix should give for `count` tokens; `seen` returns some of them."""

    count: int
    seen: Callable[[slice], Seen]

    def behind(self, in_RN: Tensor, before_RN: Tensor) -> "Wanted":
        """The same of a factor [M, R], which sees these inputs through another one, that was `before_RN`."""

        def seen(rows: slice) -> Seen:
            one = self.seen(rows)
            return Seen(one.now_tN.float() @ in_RN.float().mT, one.before_tN.float() @ before_RN.float().mT, one.lacks_tM)

        return Wanted(self.count, seen)


@dataclass(frozen=True)
class Sums:
    """Sums over tokens, of what a weight [M, N] gives and should give; in fp64."""

    moment_NN: Tensor
    """The inputs' second moment."""
    missing_MN: Tensor
    """The products of what its outputs lack with the inputs."""
    squares: Tensor
    """The sum of the squares of what its outputs lack."""

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.moment_NN + other.moment_NN, self.missing_MN + other.missing_MN, self.squares + other.squares)

    def gain(self, move_MN: Tensor) -> float:
        """By how much the squares of what is missing fall if the weight moves so."""
        move_MN = move_MN.double()
        return float(2 * (move_MN * self.missing_MN).sum() - ((move_MN @ self.moment_NN) * move_MN).sum())


@dataclass(frozen=True)
class Corrected:
    """A weight that was moved, in its own dtype, and what is known of it."""

    weight_MN: Tensor
    before_MN: Tensor
    sums: Sums

    def missed(self, now_MN: Tensor) -> float:
        """What this weight, the moved one slimmed, misses of the wanted outputs: its squares over those of its first outputs."""
        before_MN = self.before_MN.double()
        missing = max(0.0, float(self.sums.squares) - self.sums.gain(now_MN.double() - before_MN))
        return missing / max(float(((before_MN @ self.sums.moment_NN) * before_MN).sum()), 1e-30)


@torch.no_grad()
def corrected(w_MN: Tensor, wanted: Wanted) -> Corrected:
    """The weight, moved so that its outputs are nearer to the wanted ones.

    Each half of the tokens judges what the other half asks for, so that few tokens, or noise, move nothing. The halves are cut in
    the tokens' order, in which neighbours belong to one text.
    """
    middle = wanted.count // 2
    one, other = (_sums(w_MN, wanted, half) for half in (slice(0, middle), slice(middle, wanted.count)))
    both = one + other
    for damp in DAMPS if middle else ():
        if one.gain(_solved(other, damp)) + other.gain(_solved(one, damp)) > 0:
            return Corrected((w_MN.float() + _solved(both, damp)).to(w_MN.dtype), w_MN, both)
    return Corrected(w_MN, w_MN, both)


def _sums(w_MN: Tensor, wanted: Wanted, half: slice) -> Sums:
    rows, columns = w_MN.shape
    moment_NN, missing_MN, squares = (
        torch.zeros(shape, dtype=torch.float64, device=w_MN.device) for shape in ((columns, columns), (rows, columns), ())
    )
    for now in _chunks(half):
        seen = wanted.seen(now)
        x_tN = seen.now_tN.float()
        lacks_tM = (seen.before_tN.float() - x_tN) @ w_MN.float().mT
        if seen.lacks_tM is not None:
            lacks_tM += seen.lacks_tM
        moment_NN += x_tN.mT @ x_tN
        missing_MN += lacks_tM.mT @ x_tN
        squares += lacks_tM.square().sum(dtype=torch.float64)
    return Sums(moment_NN, missing_MN, squares)


def _chunks(half: slice) -> Iterator[slice]:
    for start in range(half.start, half.stop, INNER_AT_ONCE):
        yield slice(start, min(start + INNER_AT_ONCE, half.stop))


def _solved(sums: Sums, damp: float) -> Tensor:
    """The move [M, N], fp32, that takes away most of what is missing; none if all inputs are zero."""
    moment_NN, missing_MN = sums.moment_NN, sums.missing_MN
    diagonal_N = moment_NN.diagonal()
    mean = diagonal_N.sum() / (diagonal_N > 0).sum().clamp(min=1)
    if not mean > 0:
        return torch.zeros_like(missing_MN, dtype=torch.float32)
    damped_NN = (moment_NN / mean).float()
    damped_NN.diagonal().add_(damp)
    return torch.cholesky_solve((missing_MN / mean).float().mT, torch.linalg.cholesky(damped_NN)).mT
