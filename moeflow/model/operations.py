"""How many floating-point operations a step takes, from shapes alone: a multiplication and an addition are two. No torch.

Counted are products of matrices and, for eigenvalues and triangular factors, the leading term of the textbook algorithm. Norms,
activations and what moves bytes are left out.
"""

from collections.abc import Iterable, Mapping, Sequence

from moeflow.arch import Family
from moeflow.model.spec import HiddenSpec, LayerSpec, RestSpec, precision
from moeflow.step import Arithmetic

DECOMPOSED = 9
"""Operations of all eigenvalues and eigenvectors of a symmetric matrix of N rows, over N cubed (Golub and Van Loan, 8.3)."""


def forward(layers: Iterable[LayerSpec], sequences: int, length: int) -> int:
    """Of a forward pass of sequences of this length through decoder layers; attention over all pairs of positions."""
    return sum(sequences * length * (2 * layer.active + 4 * length * layer.heads) for layer in layers)


def passing(layers: Iterable[LayerSpec], states: HiddenSpec, dtype: str) -> Mapping[Arithmetic, int]:
    """Of a forward pass of these hidden states through decoder layers, in this precision."""
    return {precision(states.config, dtype): forward(layers, states.sequences, states.length)}


def together(*each: Mapping[Arithmetic, int]) -> Mapping[Arithmetic, int]:
    """The sums of several, kind by kind."""
    return {kind: sum(one.get(kind, 0) for one in each) for one in each for kind in one}


def head_numel(rest: RestSpec) -> int:
    """The weights of the head."""
    return int(rest.config["hidden_size"]) * int(rest.config["vocab_size"])


def head(rest: RestSpec, tokens: int, dtype: str) -> Mapping[Arithmetic, int]:
    """Of the logits of so many tokens, in this precision."""
    return {precision(rest.config, dtype): 2 * tokens * head_numel(rest)}


def every_expert(layer: LayerSpec, tokens: int) -> int:
    """Of all routed experts, each on all of these tokens."""
    return 2 * tokens * layer.expert_numel


def errors_of_subsets(layer: LayerSpec, tokens: int, subsets: int, dtype: str) -> Mapping[Arithmetic, int]:
    """Of the exact errors of so many subsets of a layer's experts: each expert's outputs, their products, and a form per subset."""
    products, forms = 2 * tokens * layer.experts**2 * int(layer.config["hidden_size"]), subsets * tokens * 2 * layer.experts**2
    done: dict[Arithmetic, int] = {"float64": products, "float32": forms}
    run = precision(layer.config, dtype)
    return done | {run: done.get(run, 0) + every_expert(layer, tokens)}


def moments(layer: LayerSpec, tokens: int, sides: Sequence[int]) -> int:
    """Of the second moments of what reaches a layer's experts, of these widths, and of running them so far."""
    each = 2 * layer.expert_numel // max(1, layer.experts)
    return tokens * Family.of(layer.config).top_k * (each + 2 * sum(side**2 for side in sides))
