"""Which weights of a matrix may be zero, as a value that a step's parameters can carry. Knows no tensors."""

from dataclasses import dataclass
from math import isfinite


@dataclass(frozen=True)
class Pattern:
    """Either `ratio`, the part of the weights that goes, wherever they stand, or at most `keep` of every `of` inputs of a row.

    "0.5" is half of the weights, "2:4" at most two of four consecutive inputs (Mishra et al., Accelerating Sparse Deep Neural
    Networks, 2021, section 3). Raises ValueError where the numbers say nothing that can be done.
    """

    ratio: float = 0.0
    keep: int = 0
    of: int = 0

    def __post_init__(self) -> None:
        if self.of or self.keep:
            if self.ratio:
                raise ValueError(f"a pattern is a ratio ({self.ratio}) or N:M ({self.keep}:{self.of}), not both; give one")
            if not 1 <= self.keep < self.of:
                raise ValueError(f"pattern {self.keep}:{self.of} must keep at least 1 and fewer than {self.of}, such as 2:4")
        elif not (isfinite(self.ratio) and 0 < self.ratio < 1):
            raise ValueError(f"ratio={self.ratio} of zeros must lie between 0 and 1; give a number such as 0.5 or N:M such as 2:4")

    @staticmethod
    def parse(text: "str | float | Pattern") -> "Pattern":
        """The pattern that "0.5", 0.5 or "2:4" names; a pattern is itself. Raises ValueError for anything else."""
        if isinstance(text, Pattern):
            return text
        keep, colon, of = str(text).partition(":")
        try:
            return Pattern(keep=int(keep), of=int(of)) if colon else Pattern(ratio=float(keep))
        except ValueError as error:
            if "literal" in str(error) or "convert" in str(error):
                raise ValueError(f"pattern {text!r} must be the part of zeros, such as 0.5, or N:M, such as 2:4") from None
            raise

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}" if self.of else f"{self.ratio:g}"

    def check(self, columns: int) -> None:
        """Raise ValueError where a matrix with so many inputs cannot have this pattern."""
        if self.of and columns % self.of:
            raise ValueError(
                f"pattern {self} asks for columns in groups of {self.of}, which {columns} is no multiple of; give a ratio"
            )
