"""The grid to which a matrix is rounded. No torch."""

from dataclasses import dataclass
from math import gcd

BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Grid:
    """`bits` per weight, with one scale for `group` consecutive inputs of a row, or for the whole row if `group` is 0.

    A symmetric grid is centred on zero; an asymmetric one stores a zero point beside each scale. Raises ValueError for bits that
    are not in BITS and for a negative group.
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
        """The number of steps from the smallest to the largest code."""
        return self.highest - self.lowest

    def check(self, columns: int) -> None:
        """Raise ValueError if groups do not divide this number of inputs."""
        if self.group and columns % self.group:
            fits = gcd(self.group, columns)
            raise ValueError(
                f"group={self.group} does not divide {columns} columns; give a divisor such as {fits} (-p slim.group={fits}, "
                f"or offers.group of a fit), or 0 for one scale a row"
            )

    def groups(self, columns: int) -> int:
        """The number of scales of a row. Raises ValueError if groups do not divide the columns."""
        self.check(columns)
        return columns // self.group if self.group else 1
