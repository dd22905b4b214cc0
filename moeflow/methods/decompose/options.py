"""The options of a decomposition. No torch."""

from dataclasses import dataclass
from typing import Literal

from moeflow.methods.rare import Rare, check_least
from moeflow.options import check_at_least, check_choices, only


@dataclass(frozen=True)
class Decomposition:
    """Experts' matrices as products of two smaller ones. Raises ValueError for impossible options.

    `ratio` or `rank` says how small; without either of them the model does not change.
    """

    ratio: float = 0.0
    """The part of the experts' parameters that is removed."""
    rank: int = 0
    """The rank of every matrix, instead of ratio."""
    ranks: Literal["uniform", "paper", "global"] = "global"
    """How the remaining parameters are spread: the same rank everywhere, MoE-I2's formula, or what costs least in the model."""
    svd: Literal["vanilla", "whitened"] = "whitened"
    """What a factored matrix preserves best: its weights (MoE-I2), or its outputs on the expert's tokens."""
    importance: Literal["recon", "kl", "lm_loss"] = "kl"
    """How MoE-I2's formula measures an expert's importance: how far the layer's output (recon) or the model's predictions (kl) move
    without it, or how much the model's loss grows (lm_loss)."""
    together: int = 1
    """How many experts are left out at a time to measure kl or lm_loss, where each by itself costs too much; they share what it
    did by how much each changes its layer's output."""
    alpha: float = 0.15
    """The exponent of importance in MoE-I2's formula; 0 makes all ranks the same."""
    r_min: int = 1
    """The smallest rank."""
    r_max: int = 0
    """The largest rank; 0: break-even, above which factors are larger than the matrix."""
    multiple: int = 1
    """Ranks are multiples of it."""
    least: int = 1
    """An expert that fewer recorded tokens reach gets the fallback."""
    rare: Rare = "weights"
    """The fallback for experts that too few calibration tokens reach: cut them by their weights alone, or keep them whole."""
    weighted: bool = True
    """Weight each token by its routing weight for the expert."""
    shrink: float = 0.03
    """The part of white inputs that is mixed into the tokens' statistics, from 0 to 1."""
    force: bool = False
    """Allow a rank above break-even."""
    measured: int = 16_384
    """Approximate number of tokens measured through the whole model, for ranks=global and importance=kl or lm_loss; for each
    alternative of each layer their hidden states are in memory."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_least(self.least)
        check_at_least(self, multiple=1, r_max=0, r_min=1, measured=1, together=1, alpha=0, rank=0)
        if not 0 <= self.shrink <= 1:
            raise ValueError(f"shrink={self.shrink} must lie between 0, trusting the tokens alone, and 1")
        if self.ratio and self.ranks == "global" and self.svd == "vanilla":
            raise ValueError("ranks='global' goes by what whitening loses; with svd='vanilla' take ranks='paper' or 'uniform'")
        if self.ratio and self.ranks == "uniform" and self.rare == "keep":
            raise ValueError(
                "rare='keep' lets the others pay, by ranks that a run decides; take ranks='global', or 'paper' with alpha=0"
            )
        if self.rank and self.ratio:
            raise ValueError(f"rank={self.rank} stands in the place of ratio={self.ratio}; give one of them")

    @property
    def of_spectra(self) -> "Decomposition":
        """The options that a layer's spectra depend on."""
        return only(self, "least", "rare", "weighted", "shrink")

    @property
    def of_paper_ranks(self) -> "Decomposition":
        """The options that ranks by MoE-I2's formula depend on, besides the importances."""
        return only(self, "ratio", "alpha", "r_min", "r_max", "multiple", "least", "rare")

    @property
    def of_global_ranks(self) -> "Decomposition":
        """The options that ranks by spectra depend on, besides the spectra's own."""
        return only(self, "ratio", "r_min", "r_max", "multiple")

    @property
    def of_a_layer(self) -> "Decomposition":
        """The options that a layer's factors depend on, besides their ranks."""
        return only(self, "svd", "least", "rare", "force", *(("weighted", "shrink") if self.svd == "whitened" else ()))
