"""The table of methods that make experts' weights sparse or quantized, and the options of Expert Slimming. No torch."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from moeflow.methods.rare import Rare, check_least
from moeflow.methods.slim.grid import Grid
from moeflow.methods.slim.pattern import Pattern
from moeflow.options import check_at_least, check_choices, only


@dataclass(frozen=True)
class Method:
    """One row of the table of methods."""

    kind: type[Pattern] | type[Grid]
    """What it puts into a matrix: zeros in a pattern, or codes on a grid."""
    needs: Literal["weights", "moments", "tokens"]
    """What it needs of a calibration: nothing, the second moment of each matrix's inputs, or all tokens of the layer at once."""
    fallback: str
    """The method that treats an expert by its weights alone if too few calibration tokens reach it."""
    code: str
    """Its function: `(weight_MN, moment_NN, how, scale_dtype)` to the slimmed matrix, or to a batch for a batch. If it needs all
    tokens: `(gate_EFD, up_EFD, down_EDF, how, inputs=, weights=, act=, scale_dtype=)` to `ScaledExperts`."""
    takes: tuple[str, ...] = ()
    """The fields of `Slimming` that it reads, besides those of its pattern or grid."""
    factors: bool = False
    """Whether it also treats the factors of low-rank experts."""
    memory: str = ""
    """A function of rows, columns and how: the bytes of working memory for one matrix. With it a GPU treats experts together."""

    @property
    def quantizes(self) -> bool:
        return self.kind is Grid

    @property
    def fields(self) -> tuple[str, ...]:
        """All fields of `Slimming` that it reads of what says how a matrix is treated."""
        return (*(("bits", "group", "symmetric", "packed") if self.quantizes else ("pattern",)), *self.takes)


AT_ONCE = 8 << 30
"""Bytes of working memory on a GPU, beside the weights, for experts that are treated together."""

METHODS = {
    "magnitude": Method(Pattern, "weights", "magnitude", "moeflow.methods.slim.masks:magnitude"),
    "wanda": Method(Pattern, "moments", "magnitude", "moeflow.methods.slim.masks:wanda", ("target",)),
    "sparsegpt": Method(
        Pattern, "moments", "magnitude", "moeflow.methods.slim.sparsegpt:sparsegpt", ("damp", "columns", "target"),
        memory="moeflow.methods.slim.sparsegpt:memory",
    ),
    "round_to_nearest": Method(
        Grid, "weights", "round_to_nearest", "moeflow.methods.slim.rounding:round_to_nearest", factors=True
    ),
    "gptq": Method(
        Grid, "moments", "round_to_nearest", "moeflow.methods.slim.gptq:gptq", ("activation_order", "damp", "columns", "target"),
        factors=True, memory="moeflow.methods.slim.gptq:memory",
    ),
    "awq": Method(Grid, "tokens", "round_to_nearest", "moeflow.methods.slim.awq:awq"),
}  # fmt: skip
"""Every method by its name."""


@dataclass(frozen=True)
class Share:
    """The experts of a layer that one of several tasks treats."""

    task: int = 0
    tasks: int = 1

    def of(self, experts: int) -> range:
        """Which of a layer's experts these are."""
        return range(experts * self.task // self.tasks, experts * (self.task + 1) // self.tasks)

    @property
    def first(self) -> bool:
        """Whether this task also writes all that is no expert's."""
        return self.task == 0


@dataclass(frozen=True)
class Slimming:
    """Expert Slimming: the weights inside the experts become sparse or are quantized. Raises ValueError for impossible options."""

    method: Annotated[str, METHODS]
    """The first three set weights to zero in a pattern; the others quantize them."""
    pattern: str = "2:4"
    """The weights that become zero: a part of all (0.5), or N:M, which keeps at most N of every M inputs of a row (2:4)."""
    bits: int = 4
    """Bits per weight: 2, 3, 4 or 8."""
    group: int = 128
    """Inputs of a row that share one scale; 0: the whole row."""
    symmetric: bool = True
    """A grid centred on zero; false adds a zero point to each scale, which vLLM reads at 4 bits, and transformers after import
    moeflow."""
    activation_order: bool = False
    """GPTQ first rounds the columns whose inputs have the most energy (its act-order)."""
    damp: float = 0.01
    """What SparseGPT and GPTQ add to the second moment's diagonal, as a fraction of its mean."""
    columns: int = 128
    """Columns that SparseGPT and GPTQ treat before they update all the following ones."""
    least: int = 1
    """An expert that fewer recorded tokens reach gets the fallback."""
    rare: Rare = "weights"
    """The fallback for experts that too few calibration tokens reach: treat them by their weights alone, or keep them whole."""
    shared: bool = False
    """Also treat the shared experts."""
    inputs: Literal["parallel", "sequential"] = "parallel"
    """The model that a layer's inputs come from: the given one, or the one with all earlier layers slimmed."""
    target: Literal["matrix", "expert", "model"] = "matrix"
    """What a matrix should give in spite of its treatment: its own outputs on what it sees, as published; "expert": the last matrix
    of an expert also makes up for what the ones before it lost; "model": and for what the layers before it lost. The last two need
    inputs=sequential."""
    packed: bool = True
    """Write codes and scales as transformers and vLLM read them; false writes the dequantized weights."""
    tasks: int = 0
    """Tasks that share the experts of a layer; 0: one, or as many as its size asks for where the next layer waits for it. None of
    them changes the result."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_least(self.least)
        check_at_least(self, columns=1, tasks=0)
        if not 0 < self.damp < 1:
            raise ValueError(f"damp={self.damp} must lie between 0 and 1: it is a part of the mean diagonal, such as 0.01")
        if self.target != "matrix" and (self.inputs != "sequential" or "target" not in self.row.takes):
            able = ", ".join(name for name, row in METHODS.items() if "target" in row.takes)
            raise ValueError(f"target={self.target} needs inputs=sequential and one of {able}; it has {self.inputs}, {self.method}")
        if not self.row.quantizes:
            Pattern.parse(self.pattern)
            return
        Grid(self.bits, self.symmetric, self.group)
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
        """The grid of a method that quantizes."""
        return Grid(self.bits, self.symmetric, self.group)

    @property
    def packs(self) -> bool:
        """Whether the experts are written as codes and scales."""
        return self.packed and self.row.quantizes

    @property
    def words(self) -> str:
        """The method and its bits or pattern, for reports."""
        return f"{self.method} {self.bits} bits" if self.row.quantizes else f"{self.method} {self.pattern}"

    @property
    def facts(self) -> dict[str, Any]:
        """What `facts.json` says of a slimmed layer: the method, and every field that it reads except `packed`."""
        return {"method": self.method, **{name: getattr(self, name) for name in self.row.fields if name != "packed"}}

    @property
    def of_a_layer(self) -> "Slimming":
        """The options that change a layer's bytes: without how the work is divided, and without what the method does not read."""
        return only(self, "least", "rare", "shared", "inputs", *self.row.fields)
