"""What an engine asks of the layers that a graph is to make, and of what is stored. No torch."""

from collections.abc import Sequence

from moeflow.arch import Config, Family
from moeflow.engines import Form, Packing
from moeflow.engines.otherwise import in_engines
from moeflow.model.spec import LayerSpec


def form_of(layers: Sequence[LayerSpec], config: Config) -> Form:
    """The form of a checkpoint with these layers. What a run decides counts as all that it may decide."""
    family = Family.of(config)
    moe = [layer for layer in layers if layer.experts]
    counts = {layer.experts for layer in moe} | {layer.least for layer in moe if layer.least and not layer.alike}
    free = any(layer.least not in (0, layer.experts) and not layer.alike for layer in moe)
    widths = any(layer.bits_decided for layer in moe)
    words = ["skipping of experts"] * any(layer.format.skip for layer in moe)
    words += ["Compressed Experts"] * any(layer.format.compressed for layer in moe)
    packings = {Packing(0) if (p := layer.packed) is None else Packing(p.bits, p.group, p.symmetric) for layer in moe}
    return Form(
        family.arch.model_type, frozenset(counts), family.expert_size,
        any(layer.ranks_decided or layer.format.low_rank or layer.format.added for layer in moe),
        any(not layer.least for layer in moe) or any(layer.format.gone for layer in layers), " and no ".join(words),
        frozenset(packings or {Packing(0)}), " and ".join(["counts"] * free + ["bits"] * widths),
        in_engines(config),
    )  # fmt: skip
