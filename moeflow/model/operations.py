"""How many floating-point operations a step takes, from shapes alone: a multiplication and an addition are two. No torch.

Counted are products of matrices and, for eigenvalues and factors, the leading term of the textbook algorithm. Norms, activations
and what moves bytes are left out.
"""

from collections.abc import Iterable, Sequence

from moeflow.model.spec import HiddenSpec, LayerSpec, RestSpec

DECOMPOSED = 9
"""Operations of all eigenvalues and eigenvectors of a symmetric matrix of N rows, over N cubed (Golub and Van Loan, 8.3)."""
TRAINED = 6
"""Operations of a forward and a backward pass for each weight and token; without gradients of the weights 4."""


def forward(layers: Iterable[LayerSpec], tokens: int, length: int) -> int:
    """Of a forward pass of so many tokens, in sequences of `length`, through decoder layers; attention over all pairs."""
    return sum(tokens * (2 * layer.active + 4 * length * layer.heads) for layer in layers)


def passing(layers: Iterable[LayerSpec], states: HiddenSpec) -> int:
    """Of a forward pass of these hidden states through decoder layers."""
    return forward(layers, states.sequences * states.length, states.length)


def head(rest: RestSpec, tokens: int) -> int:
    """Of the logits of so many tokens."""
    return 2 * tokens * int(rest.config["hidden_size"]) * int(rest.config["vocab_size"])


def every_expert(layer: LayerSpec, tokens: int) -> int:
    """Of all routed experts, each on all of these tokens."""
    return 2 * tokens * layer.expert_numel


def errors_of_subsets(layer: LayerSpec, tokens: int, subsets: int, top_k: int) -> int:
    """Of the exact errors of so many subsets of a layer's experts: each expert's outputs, their products, and a form per subset."""
    width = int(layer.config["hidden_size"])
    return every_expert(layer, tokens) + 2 * tokens * layer.experts**2 * width + subsets * tokens * 8 * top_k**2


def moments(layer: LayerSpec, tokens: int, top_k: int, sides: Sequence[int]) -> int:
    """Of the second moments of what reaches a layer's experts: inputs of the first matrices and of the last, of these widths."""
    return tokens * top_k * (2 * layer.expert_numel // max(1, layer.experts) + 2 * sum(side**2 for side in sides))


def factored(experts: int, rows: int, columns: int) -> int:
    """Of cutting the three matrices of so many experts to lower ranks, by the eigenvectors of the smaller of their products."""
    less, more = sorted((rows, columns))
    return 3 * experts * (4 * more * less**2 + DECOMPOSED * less**3)
