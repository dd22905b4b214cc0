"""What becomes of a checkpoint's multi-token-prediction layers, settled before any weight is read. No torch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeflow.arch import Config, Family, Layout, layer_of
from moeflow.arch.found import Found
from moeflow.arch.prediction import (
    APART,
    COUNT_KEY,
    COUNT_KEYS,
    ENORM,
    HNORM,
    KINDS,
    NORM,
    ONE_HEAD,
    OTHER_COUNT_KEYS,
    PROJECTION,
    decoder_names,
    numbered_behind,
    prediction_config,
    prediction_layers,
    without_prediction_layers,
)
from moeflow.model.asked import check_layer
from moeflow.model.formats import some
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


def apart(tensors: Iterable[str], family: Family, found: Found | None) -> tuple[tuple[str, str], ...]:
    """The names of a prediction layer that is kept apart, and what they are behind the decoder layers (`Layout.apart`)."""
    layout = Layout() if found is None else found.layout
    return numbered_behind(tensors, layout.on_disk(family.prefix(family.num_layers)))


def settled(config: Config, tensors: Mapping[str, TensorInfo], mtp: "Mtp", uri: str, layout: Layout) -> Settled:
    """Drop the prediction layers or not, as `mtp` says, with a note on what is dropped.

    If the one that there is has a number here only (`Layout.apart`), the configuration also says what transformers asks of it.
    Raises ValueError if they are to stay and cannot: their names do not tell their numbers, there are fewer than config.json says,
    or they are not what transformers would make of config.json.
    """
    family, apart = Family.of(config), bool(layout.apart)
    count, number = family.num_layers, max(int(apart), prediction_layers(config))
    others = sorted(n for n in tensors if n.startswith(APART))
    behind = sorted({i for n in tensors if (i := layer_of(n)) is not None and i >= count})
    if behind[number:]:
        raise ValueError(f"the checkpoint has tensors of layer {behind[-1]}, but config.json says {count} layers")
    if mtp == "drop":
        left = {n: t for n, t in tensors.items() if not n.startswith(APART) and layer_of(n) not in behind}
        notes = [f"multi-token-prediction layers {behind} are dropped ({OTHERWISE})"] if behind else []
        if others:
            can_stay = f" ({OTHERWISE})" if numbered_behind(others, family.prefix(count)) else ""
            notes += [f"multi-token prediction ({others[0]} and so on, {len(others)} tensors) is dropped{can_stay}"]
        return Settled(without_prediction_layers(config), left, (), "; ".join(notes))
    if others:
        raise ValueError(
            f"mtp={mtp!r}: the multi-token prediction at {uri} is called {others[0]} and so on, and transformers loads only "
            f"layers that are numbered on behind the {count} decoder layers, or one in {', '.join(f'{n}*' for n, _ in ONE_HEAD)}; "
            "take mtp='drop'"
        )
    if behind and not apart and all(config.get(key) is None for key in COUNT_KEYS):
        raise ValueError(
            f"mtp={mtp!r}: transformers knows no multi-token prediction of a {family.arch.model_type}, of which config.json at "
            f"{uri} says {', '.join(key for key in OTHER_COUNT_KEYS if config.get(key))}; take mtp='drop'"
        )
    if behind and len(behind) < number:
        raise ValueError(
            f"config.json at {uri} says {number} multi-token-prediction layers, and the tensors are of {len(behind)}; correct it, "
            "or take mtp='drop'"
        )
    alike = [_alike(family, tensors, layer, uri, layout) for layer in behind]
    config = _told(config, tensors, alike[0]) if apart else config
    for at, layer in enumerate(behind):
        _check(config, tensors, layer, at, uri, layout)
    note = "" if behind else f"the model has no multi-token-prediction layers, so mtp={mtp!r} changes nothing"
    return Settled(config, dict(tensors), tuple(behind), note)


OTHERWISE = "mtp='keep' keeps them as they are, mtp='prune' prunes them, too"


def _alike(family: Family, tensors: Mapping[str, TensorInfo], layer: int, uri: str, layout: Layout) -> list[int]:
    """The decoder layers with experts that have the tensors of a prediction layer, but for the experts: it is of their kind.

    Raises ValueError if there is none.
    """

    def shapes(number: int) -> dict[str, tuple[int, ...]]:
        names = decoder_names(family, by_layer.get(number, ()), number, layer)
        return {new: tensors[n].shape for n, new in names.items() if not new.startswith(family.experts(layer))}

    by_layer: dict[int | None, list[str]] = {}
    for name in tensors:
        by_layer.setdefault(layer_of(name), []).append(name)
    own = shapes(layer)
    if alike := [i for i in family.moe_layers if shapes(i) == own]:
        return alike
    last = shapes(family.moe_layers[-1])
    differ = sorted(_in_file(n, layout) for n in {*own, *last} if own.get(n) != last.get(n))
    raise ValueError(
        f"multi-token-prediction layer {layer} at {uri} is like no decoder layer with experts ({some(differ)}), and transformers "
        "makes it as one of those; take mtp='drop'"
    )


def _in_file(name: str, layout: Layout) -> str:
    return layout.in_file(layout.on_disk(name))


def _told(config: Config, tensors: Iterable[str], alike: Sequence[int]) -> Config:
    """config.json with what transformers asks of a prediction layer that is kept apart: that there is one, and its kind."""
    family = Family.of(config)
    said: dict[str, Any] = {}
    for key in KINDS:
        listed = config.get(key)
        if isinstance(listed, list) and len(kinds := {listed[i] for i in alike}) == 1:
            said[f"mtp_{key}"] = [*kinds]
    own = f"{family.prefix(alike[0])}self_attn."
    if config.get(KINDS[0]) is None and {*alike} != {*family.moe_layers} and any(n.startswith(own) for n in tensors):
        said[f"mtp_{KINDS[0]}"] = ["full_attention"]  # the kinds follow from an interval
    return said | config | {key: 1 for key in COUNT_KEYS if key in config} | {COUNT_KEY: 1}


def _check(config: Config, tensors: Mapping[str, TensorInfo], layer: int, at: int, uri: str, layout: Layout) -> None:
    """Raise ValueError unless a prediction layer has the tensors that config.json asks for."""
    family = Family.of(config)
    width, prefix = family.size("hidden_size"), family.prefix(layer)
    for name, shape in {ENORM: (width,), HNORM: (width,), PROJECTION: (width, 2 * (width or 0)), NORM: (width,)}.items():
        stored = tensors.get(prefix + name)
        if stored is None or stored.shape != shape:
            raise ValueError(
                f"multi-token-prediction layer {layer} at {uri} has {'no' if stored is None else stored.shape} "
                f"{_in_file(prefix + name, layout)}, "
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
