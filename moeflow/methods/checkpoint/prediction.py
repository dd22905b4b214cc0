"""What becomes of a checkpoint's multi-token-prediction layers, settled before any weight is read. No torch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moeflow.arch import Config, Family, layer_of
from moeflow.arch.prediction import (
    APART,
    ENORM,
    HNORM,
    NORM,
    PROJECTION,
    decoder_names,
    prediction_config,
    prediction_layers,
    without_prediction_layers,
)
from moeflow.model.asked import check_layer
from moeflow.model.header import TensorInfo
from moeflow.model.spec import LayerSpec

if TYPE_CHECKING:
    from moeflow.sources import Mtp


@dataclass(frozen=True)
class Settled:
    """A checkpoint's configuration and tensors, with the prediction layers that stay, by their numbers."""

    config: Config
    tensors: dict[str, TensorInfo]
    layers: tuple[int, ...]
    note: str


def settled(config: Config, tensors: Mapping[str, TensorInfo], mtp: "Mtp", uri: str) -> Settled:
    """Drop the prediction layers or not, as `mtp` says, with a note on what is dropped.

    Raises ValueError if they are to stay and cannot: their names do not tell their numbers, there are fewer than config.json says,
    or they are not what transformers would make of config.json.
    """
    count, number = Family.of(config).num_layers, prediction_layers(config)
    apart = sorted(n for n in tensors if n.startswith(APART))
    behind = sorted({i for n in tensors if (i := layer_of(n)) is not None and i >= count})
    if behind[number:]:
        raise ValueError(f"the checkpoint has tensors of layer {behind[-1]}, but config.json says {count} layers")
    if mtp == "drop":
        left = {n: t for n, t in tensors.items() if not n.startswith(APART) and layer_of(n) not in behind}
        notes = [f"multi-token-prediction layers {behind} are dropped ({OTHERWISE})"] if behind else []
        notes += [f"multi-token prediction ({apart[0]} and so on, {len(apart)} tensors) is dropped"] if apart else []
        return Settled(without_prediction_layers(config), left, (), "; ".join(notes))
    if apart:
        raise ValueError(
            f"mtp={mtp!r}: the multi-token prediction at {uri} is called {apart[0]} and so on, which is not numbered on behind the "
            f"{count} decoder layers, and transformers loads only such; take mtp='drop'"
        )
    if behind and len(behind) < number:
        raise ValueError(
            f"config.json at {uri} says {number} multi-token-prediction layers, and the tensors are of {len(behind)}; correct it, "
            "or take mtp='drop'"
        )
    for at, layer in enumerate(behind):
        _check(config, tensors, layer, at, uri)
    note = "" if behind else f"the model has no multi-token-prediction layers, so mtp={mtp!r} changes nothing"
    return Settled(config, dict(tensors), tuple(behind), note)


OTHERWISE = "mtp='keep' keeps them as they are, mtp='prune' prunes them, too"


def _check(config: Config, tensors: Mapping[str, TensorInfo], layer: int, at: int, uri: str) -> None:
    """Raise ValueError unless a prediction layer has the tensors that config.json asks for."""
    family = Family.of(config)
    width, prefix = family.size("hidden_size"), family.prefix(layer)
    for name, shape in {ENORM: (width,), HNORM: (width,), PROJECTION: (width, 2 * (width or 0)), NORM: (width,)}.items():
        stored = tensors.get(prefix + name)
        if stored is None or stored.shape != shape:
            raise ValueError(
                f"multi-token-prediction layer {layer} at {uri} has {'no' if stored is None else stored.shape} {prefix}{name}, "
                f"where config.json asks for {shape}; fetch the checkpoint again, or take mtp='drop'"
            )
    names = decoder_names(family, tensors, layer, at)
    try:
        check_layer(prediction_config(config), at, {new: (tensors[n].dtype, tensors[n].shape) for n, new in names.items()})
    except ValueError as error:
        raise ValueError(f"multi-token-prediction layer {layer} at {uri}: {error}") from None


def check_beside(layers: Sequence[LayerSpec], prediction: Sequence[LayerSpec]) -> None:
    """Raise ValueError if prediction layers cannot be loaded beside these decoder layers, as far as that is known before a run."""
    check_counts((layer.experts for layer in layers), (layer.experts for layer in prediction))
    packed = next((layer for layer in layers if layer.packed), None)
    if packed and (plain := next((layer for layer in prediction if not layer.packed), None)):
        raise ValueError(
            f"decoder layer {packed.layer} is packed and multi-token-prediction layer {plain.layer} is not: transformers reads "
            "both in one form; take mtp='drop', or slim with packed=false"
        )


def check_counts(decoder: Iterable[int], prediction: Iterable[int]) -> None:
    """Raise ValueError unless prediction layers have as many experts as the decoder layer with most, which config.json will say."""
    most = max(decoder, default=0)
    if other := next((n for n in prediction if n != most), None):
        raise ValueError(
            f"a multi-token-prediction layer has {other} experts and the decoder layers {most}: they load only with the same "
            "number; take mtp='prune' or mtp='drop'"
        )
