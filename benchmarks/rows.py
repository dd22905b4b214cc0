"""One measured claim, and the table of them."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Row:
    """`value` of what `name` says, and the bound it should keep."""

    name: str
    value: float
    bound: Literal["at least", "at most"]
    target: float
    unit: str

    @property
    def holds(self) -> bool:
        return self.value >= self.target if self.bound == "at least" else self.value <= self.target

    def line(self) -> str:
        return f"| {self.name} | {self.value:.3g} {self.unit} | {self.bound} {self.target:g} | {'yes' if self.holds else 'NO'} |"
