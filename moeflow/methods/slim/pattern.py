"""Which weights of a matrix become zero. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Pattern:
    """Either a `ratio` of all weights is dropped, or at most `keep` of every `of` inputs of a row stay."""

    ratio: float = 0.0
    keep: int = 0
    of: int = 0

    @staticmethod
    def parse(text: str) -> "Pattern":
        """The pattern in words: "0.5" drops half of the weights, "2:4" keeps at most two of four consecutive inputs.

        N:M is from Mishra et al., Accelerating Sparse Deep Neural Networks, 2021, section 3. Raises ValueError for anything else.
        """
        keep, colon, of = text.partition(":")
        try:
            pattern = Pattern(keep=int(keep), of=int(of)) if colon else Pattern(ratio=float(keep))
        except ValueError:
            raise ValueError(f"pattern {text!r} must be the part of zeros, such as 0.5, or N:M, such as 2:4") from None
        if colon and not 1 <= pattern.keep < pattern.of:
            raise ValueError(f"pattern {text} must keep at least 1 and fewer than {pattern.of}, such as 2:4")
        if not colon and not 0 < pattern.ratio < 1:
            raise ValueError(f"pattern {text} of zeros must lie between 0 and 1; give a number such as 0.5 or N:M such as 2:4")
        return pattern

    def check(self, columns: int) -> None:
        """Raise ValueError if a matrix with this many inputs cannot have the pattern."""
        if self.of and columns % self.of:
            raise ValueError(
                f"pattern {self.keep}:{self.of} asks for columns in groups of {self.of}, which {columns} is no multiple of; "
                "give a ratio"
            )
