"""Every method that makes an expert's weights sparse or rounds them, a row each, and the options of Expert Slimming. No torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from moeflow.methods.rare import Rare, check_least
from moeflow.methods.slim.grid import Grid
from moeflow.methods.slim.pattern import Pattern
from moeflow.options import check_choices, only


@dataclass(frozen=True)
class Method:
    """One row of the table of methods."""

    kind: type[Pattern] | type[Grid]
    """What it makes of a matrix: zeros of a pattern, or codes on a grid."""
    needs: Literal["weights", "moments", "tokens"]
    """What it needs of a calibration: nothing beside the weights, the second moment of each matrix's inputs, or all tokens of the
    layer at once."""
    fallback: str
    """The row that treats an expert by its weights alone, if too few calibration tokens reach it."""
    code: str
    """Its function: `treat(weight_MN, moment_NN, how, scale_dtype)` gives the slimmed matrix, of a batch of matrices a batch. If it
    needs all tokens: `treat(gate_EFD, up_EFD, down_EDF, how, inputs=, weights=, act=, scale_dtype=)` gives `ScaledExperts`."""
    takes: tuple[str, ...] = ()
    """The fields of `Slimming` that it reads beside those of its pattern or grid."""
    factors: bool = False
    """Whether it also treats the factors of low-rank experts."""
    memory: str = ""
    """A function of rows, columns and how: the bytes that it works in for one matrix. With it a GPU treats experts together."""

    @property
    def quantizes(self) -> bool:
        return self.kind is Grid


METHODS = {
    "magnitude": Method(Pattern, "weights", "magnitude", "moeflow.methods.slim.masks:drop_by_magnitude"),
    "wanda": Method(Pattern, "moments", "magnitude", "moeflow.methods.slim.masks:drop_by_wanda"),
    "sparsegpt": Method(
        Pattern, "moments", "magnitude", "moeflow.methods.slim.sparsegpt:treat", ("damp", "block"),
        memory="moeflow.methods.slim.sparsegpt:memory",
    ),
    "round_to_nearest": Method(
        Grid, "weights", "round_to_nearest", "moeflow.methods.slim.rounding:treat", factors=True
    ),
    "gptq": Method(
        Grid, "moments", "round_to_nearest", "moeflow.methods.slim.gptq:treat", ("activation_order", "damp", "block"),
        factors=True, memory="moeflow.methods.slim.gptq:memory",
    ),
    "awq": Method(Grid, "tokens", "round_to_nearest", "moeflow.methods.slim.awq:treat"),
}  # fmt: skip
"""Every method by its name."""

OF_A_KIND: dict[type[Pattern] | type[Grid], tuple[str, ...]] = {
    Pattern: ("pattern",),
    Grid: ("bits", "group", "symmetric", "packed"),
}
"""The fields of `Slimming` that every method of a kind reads."""

if TYPE_CHECKING:
    Name = str
else:
    Name = Literal[*METHODS]


@dataclass(frozen=True)
class Slimming:
    """Expert Slimming: the weights inside the experts become sparse, or are quantized. Raises ValueError for what cannot be."""

    method: Name
    """The first three leave zeros of a pattern, the others round to codes of some bits."""
    pattern: str = "2:4"
    """The zeros: a part of all weights (0.5), or N:M, at most N of every M inputs of a row (2:4)."""
    bits: int = 4
    """The bits of a code: 2, 3, 4 or 8."""
    group: int = 128
    """The inputs of a row that share one scale; 0: the whole row."""
    symmetric: bool = True
    """A grid around zero; false adds a zero point to each scale, which needs packed=false."""
    activation_order: bool = False
    """GPTQ rounds the columns whose inputs have most energy first (its act-order)."""
    damp: float = 0.01
    """What SparseGPT and GPTQ add to the second moment's diagonal, as a part of its mean."""
    block: int = 128
    """The columns that SparseGPT and GPTQ treat before they update all that follow."""
    least: int = 1
    """An expert that fewer recorded tokens reach gets the fallback."""
    rare: Rare = "weights"
    """The fallback for experts that too few calibration tokens reach: treat them by their weights alone, or keep them whole."""
    shared: bool = False
    """Treat the shared experts, too."""
    inputs: Literal["parallel", "sequential"] = "parallel"
    """What a layer sees: the inputs that the given model has there, or those behind the slimmed layers before it."""
    packed: bool = True
    """Write codes and scales as transformers and vLLM read them; false writes the weights that they stand for."""
    tasks: int = 1
    """The tasks between which a layer's experts are divided; the result is the same."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_least(self.least)
        if self.block < 1 or not 0 <= self.damp < 1:
            raise ValueError(
                f"block={self.block} columns must be at least 1, and damp={self.damp} a part of the mean diagonal, such as 0.01"
            )
        if not self.row.quantizes:
            Pattern.parse(self.pattern)
            return
        Grid(self.bits, self.symmetric, self.group)
        if self.packed and not self.symmetric:
            raise ValueError(
                "zero points of packed experts are read by neither transformers nor vLLM; give symmetric=True, or packed=False"
            )
        if self.packed and self.rare == "keep":
            raise ValueError(
                "rare='keep' leaves whole experts beside packed ones, which transformers does not load; give packed=False"
            )
        if self.packed and self.shared and self.row.needs == "tokens":
            raise ValueError(f"{self.method} packs routed experts only; give shared=False, or packed=False")

    @property
    def row(self) -> Method:
        """The method's row in the table."""
        return METHODS[self.method]

    @property
    def grid(self) -> Grid:
        """The grid of a method that rounds."""
        return Grid(self.bits, self.symmetric, self.group)

    @property
    def packs(self) -> bool:
        """Whether the experts are written as codes and scales."""
        return self.packed and self.row.quantizes

    @property
    def words(self) -> str:
        """The method and how much is left, for reports."""
        return f"{self.method} {self.bits} bits" if self.row.quantizes else f"{self.method} {self.pattern}"

    @property
    def facts(self) -> dict[str, Any]:
        """What is told of a slimmed layer: the method, and every field that it reads, but for how it is packed."""
        names = (*OF_A_KIND[self.row.kind], *self.row.takes)
        return {"method": self.method, **{name: getattr(self, name) for name in names if name != "packed"}}

    @property
    def of_a_layer(self) -> "Slimming":
        """The same options without what changes no byte of a layer: how the work is divided, and what the method does not read."""
        return only(self, "least", "rare", "shared", "inputs", *OF_A_KIND[self.row.kind], *self.row.takes)
