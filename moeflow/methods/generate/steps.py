"""Training text that the model itself writes: it goes on with the beginnings of some rows of a text. No torch.

A model's own text is text of which there is as much as is asked for, and it holds more of what the model knows than a small text
does (data-free distillation, as in LLM-QAT: Liu et al., arXiv 2305.17888, section 3.1). The beginnings are those of real rows, so
that it keeps to their kinds.
"""

from typing import Any

import numpy as np

from moeflow.arch import Family
from moeflow.methods.graph import LEARNED, TOKENS
from moeflow.model.memory import on_device, together
from moeflow.model.spec import CheckpointSpec, TokensSpec, element_bytes, precision
from moeflow.step import Artifact, Context, Spec, Step, step

BEGINNING = 16
"""Tokens of a row that are the text's, or half of a row where that is less; they are taken from anywhere in it."""
ROWS = 512
"""Rows of one task, which loads the whole model."""
ROOM, TOGETHER = 8 << 30, 256
"""Bytes for the keys and values of the rows that are written together, and how many these are at most."""
READ = 64
"""With how many rows a token's products take as long as reading the weights does: with fewer, a plan counts as many."""


def partly(matrix: Step, checkpoint: Step, part: float, *, seed: int, dtype: str) -> Step:
    """The same token matrix, in which the checkpoint's model goes on with `part` of the rows, spread evenly over it."""
    spec: TokensSpec = matrix.spec.output
    count = len(_chosen(spec.sequences, part))
    if not count:
        return matrix
    tasks = -(-count // ROWS)
    parts = tuple(written(checkpoint, matrix, part=part, share=(i, tasks), seed=seed, dtype=dtype) for i in range(tasks))
    return mixed(matrix, parts, part=part)


def alone(matrix: Step, checkpoint: Step, rows: int, *, seed: int, dtype: str) -> Step:
    """So many rows that the checkpoint's model writes, at most as many as the matrix has, whose rows they begin with."""
    sequences = matrix.spec.output.sequences
    return written(checkpoint, matrix, part=min(rows, sequences) / sequences, share=(0, 1), seed=seed, dtype=dtype)


def _chosen(rows: int, part: float) -> list[int]:
    """Which of so many rows are written, in their order."""
    count = round(part * rows)
    return [(2 * i + 1) * rows // (2 * count) for i in range(count)]


def _of_task(rows: int, part: float, share: tuple[int, int]) -> list[int]:
    chosen, (task, tasks) = _chosen(rows, part), share
    return chosen[len(chosen) * task // tasks : len(chosen) * (task + 1) // tasks]


def _beginning(length: int) -> int:
    return max(1, min(BEGINNING, length // 2))


def _written_spec(model: CheckpointSpec, matrix: TokensSpec, *, part: float, share: tuple[int, int], seed: int, dtype: str) -> Spec:
    rows, length = len(_of_task(matrix.sequences, part, share)), matrix.length
    made = TokensSpec(rows, length)
    of_row = _kept(model) * element_bytes(model.config, dtype) * length
    at_once = together(ROOM, of_row, min(rows, TOGETHER))
    need = model.loaded(dtype) + at_once * (of_row + int(model.config["vocab_size"]) * (4 * _beginning(length) + 24))
    turns = -(-rows // at_once) * (length - _beginning(length))
    done = 2 * turns * max(at_once * model.active, READ * model.parameters)
    return Spec(
        made, reads=model.nbytes + 4 * matrix.tokens, writes=made.nbytes, operations={precision(model.config, dtype): done},
        memory=need + 8 * matrix.tokens, device=on_device(need),
    )  # fmt: skip


def _kept(model: CheckpointSpec) -> int:
    """How many numbers of one token its keys and values are, in all layers; those of all heads where heads share them otherwise."""
    config, layers = model.config, Family.of(model.config).num_layers
    heads, few = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if heads and few and "kv_lora_rank" not in config:
        return 2 * layers * few * int(config.get("head_dim") or config["hidden_size"] // heads)
    return max(3 * model.heads, 2 * layers * int(config["hidden_size"]))


@step("generate.rows", version=1, spec=_written_spec, gpus=1)
def written(
    context: Context, model: Artifact, matrix: Artifact, *, part: float, share: tuple[int, int], seed: int, dtype: str
) -> None:
    """The rows of `share` (this task, of so many) that the model goes on with: `tokens.npy`.

    What is drawn is decided by the seed and the row's place in the matrix, not by the task.
    """
    from moeflow.methods.generate.drawing import continued

    ids_NL = np.load(matrix.file(TOKENS), mmap_mode="r")
    length = ids_NL.shape[1]
    beginning = _beginning(length)
    begun, draws = [], []
    for row in _of_task(len(ids_NL), part, share):
        random = np.random.default_rng([seed, row])
        start = int(random.integers(length - beginning + 1))
        begun.append(ids_NL[row, start : start + beginning])
        draws.append(random.random(length - beginning))
    ids = continued(model.folder(), np.stack(begun), np.stack(draws), dtype, ROOM, context.progress)
    np.save(context.out / TOKENS, ids)


def _mixed_spec(matrix: TokensSpec, parts: tuple[TokensSpec, ...], *, part: float) -> Spec:
    made = TokensSpec(matrix.sequences, matrix.length, masked=matrix.masked)
    reads = matrix.nbytes + sum(part.nbytes for part in parts)
    return Spec(made, reads=reads, writes=matrix.nbytes, memory=2 * (reads + matrix.nbytes))


@step("generate.mixed", version=1, spec=_mixed_spec)
def mixed(context: Context, matrix: Artifact, parts: tuple[Artifact, ...], *, part: float) -> None:
    """A token matrix with `part` of its rows replaced by those that were written; all tokens of these are learned."""
    ids_NL = np.load(matrix.file(TOKENS)).astype(np.int32)
    rows = _chosen(len(ids_NL), part)
    ids_NL[rows] = np.concatenate([np.load(one.file(TOKENS)) for one in parts])
    np.save(context.out / TOKENS, ids_NL)
    if LEARNED in matrix.names():
        learned_NL: Any = np.load(matrix.file(LEARNED))
        learned_NL[rows] = 1
        np.save(context.out / LEARNED, learned_NL)
