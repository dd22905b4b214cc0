"""The grid on which a matrix is rounded, as a value that a step's parameters can carry. Knows no tensors."""

from dataclasses import dataclass

BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Grid:
    """`bits` a weight, with one scale for `group` consecutive inputs of a row, or for the whole row where that is 0.

    A symmetric grid has its zero in the middle; the other stores a zero point beside each scale. Raises ValueError for other bits
    and for a negative group.
    """

    bits: int = 4
    symmetric: bool = True
    group: int = 128

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits={self.bits} must be one of {', '.join(map(str, BITS))}")
        if self.group < 0:
            raise ValueError(f"group={self.group} must be a number of columns, or 0 for one scale a row")

    @property
    def lowest(self) -> int:
        """The smallest code; codes are signed, as compressed-tensors stores them."""
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """The largest code."""
        return -self.lowest - 1

    @property
    def levels(self) -> int:
        """How many steps lie between the smallest and the largest code."""
        return self.highest - self.lowest

    def check(self, columns: int) -> None:
        """Raise ValueError where a matrix with so many inputs does not fall into groups."""
        if self.group and columns % self.group:
            raise ValueError(f"group={self.group} does not divide {columns} columns; give a divisor, or 0 for one scale a row")

    def groups(self, columns: int) -> int:
        """How many scales a row has. Raises ValueError where the groups do not divide it."""
        self.check(columns)
        return columns // self.group if self.group else 1

    def nbytes(self, rows: int, columns: int, *, scale_bytes: int = 2) -> int:
        """Bytes of a packed matrix: codes and zero points in words of 32 bits, without gaps, and its scales."""
        groups = self.groups(columns)
        codes = rows * _words(columns * self.bits)
        return codes + rows * groups * scale_bytes + (0 if self.symmetric else groups * _words(rows * self.bits))


def _words(bits: int) -> int:
    return -(-bits // 32) * 4
