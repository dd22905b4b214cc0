"""Which weights of a matrix become zero, as a value that can be a step's parameter. No torch."""

from dataclasses import dataclass
from math import isfinite


@dataclass(frozen=True)
class Pattern:
    """Either a `ratio` of all weights is dropped, or at most `keep` of every `of` inputs of a row stay.

    "0.5" drops half of the weights, "2:4" keeps at most two of four consecutive inputs (Mishra et al., Accelerating Sparse Deep
    Neural Networks, 2021, section 3). Raises ValueError if the numbers make no pattern.
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
        """The pattern for "0.5", 0.5 or "2:4"; a `Pattern` is returned as it is. Raises ValueError for anything else."""
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
        """Raise ValueError if a matrix with this many inputs cannot have the pattern."""
        if self.of and columns % self.of:
            raise ValueError(
                f"pattern {self} asks for columns in groups of {self.of}, which {columns} is no multiple of; give a ratio"
            )
