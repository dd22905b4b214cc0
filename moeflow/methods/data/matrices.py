"""Ready-made matrices of token ids in `.npy` files, checked when the graph is built."""

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from moeflow.sources import Source

HEAD = 4096  # bytes in which the header of an .npy file lies
AT_ONCE = 64 << 20  # bytes of ids that are read at a time


@dataclass(frozen=True)
class Matrix:
    """What the header of a token matrix says: [sequences, length] integers from the byte `begin` on."""

    shape: tuple[int, int]
    dtype: "np.dtype[np.integer]"
    by_columns: bool  # the first ids of all sequences come first
    begin: int

    def sequence(self, at: int) -> int:
        """The sequence of the id that is the `at`-th of the file."""
        return at % self.shape[0] if self.by_columns else at // self.shape[1]


def matrix_of(source: "Source", vocabulary: int) -> Matrix:
    """The token matrix in a pinned file. Raises ValueError if it is none, and for ids that a model of `vocabulary` tokens lacks."""
    matrix = _described(source)
    name, width = source.files[0].name, matrix.dtype.itemsize
    step, end = AT_ONCE // width * width, source.files[0].size
    for start in range(matrix.begin, end, step):
        ids = np.frombuffer(source.read(name, start, min(start + step, end)), matrix.dtype)
        outside = (ids < 0) | (ids >= vocabulary)
        if outside.any():
            at = int(outside.argmax())
            sequence = matrix.sequence((start - matrix.begin) // width + at)
            raise ValueError(
                f"{name} at {source.uri} has the token id {ids[at]} in sequence {sequence}, and the model has the ids 0 to "
                f"{vocabulary - 1} (vocab_size in config.json); make it with this model's tokenizer"
            )
    return matrix


def _described(source: "Source") -> Matrix:
    name, size = source.files[0].name, source.files[0].size
    try:
        head = io.BytesIO(source.read(name, 0, min(size, HEAD)))
        version = np.lib.format.read_magic(head)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_columns, dtype = read(head)
    except Exception as error:  # the header is a Python literal, over which Python's parser raises what it likes
        why = " ".join(str(error).split())[:99]
        raise ValueError(f"{name} at {source.uri} is no .npy matrix ({why}); save it again with numpy") from None
    if len(shape) != 2 or min(shape) < 1 or shape[1] < 2 or dtype.kind not in "iu":
        raise ValueError(f"{name} has shape {shape} and type {dtype}; a token matrix is [sequences, length] of integers")
    if (needed := head.tell() + shape[0] * shape[1] * dtype.itemsize) != size:
        raise ValueError(f"{name} at {source.uri} has {size:,} bytes where {shape} needs {needed:,}; save it again")
    return Matrix((shape[0], shape[1]), dtype, by_columns, head.tell())
