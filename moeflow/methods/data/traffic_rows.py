"""One row of what a serving engine recorded: a request with the experts that its tokens were sent to, or the sums of many.

SGLang returns experts as base64 of int32 numbers, in `meta_info` of an answer of /generate or in `sgl_ext` of an OpenAI choice;
vLLM as base64 of an .npy file in a choice. Suffixes: T tokens, L layers, k experts a token, E experts.
"""

import base64
import binascii
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

SUMS = "moeflow_traffic"
"""The key of the sums that moeflow's vLLM plug-in writes; its value is the version of the format."""
VERSION = 1
NPY = b"\x93NUMPY"  # how an .npy file begins
ROUTED = "routed_experts"
COLUMNS = (
    SUMS, "model_type", "top_k", "hidden_size", "vocab_size", "layers", ROUTED, "meta_info", "sgl_ext", "choices", "input_ids",
    "output_ids", "prompt_token_ids", "token_ids",
)  # fmt: skip


@dataclass(frozen=True)
class Served:
    """The model that was served, as far as a row can be compared with it."""

    model_type: str
    decoder_layers: int
    experts: tuple[tuple[int, int], ...]
    """Its MoE layers, each with its number of experts."""
    top_k: int
    hidden: int
    vocabulary: int


@dataclass(frozen=True)
class Sums:
    """What the tokens of one layer add up to."""

    tokens: int
    count_E: np.ndarray
    together_EE: np.ndarray
    """How many tokens were sent to both; to one and the same: its count."""
    weight_E: np.ndarray | None = None
    """The sum of routing weights; None where they were not recorded."""


@dataclass(frozen=True)
class Request:
    """One request: its tokens, if they were recorded, and the experts of all or the last of them in every MoE layer, [T, L, k]."""

    ids: tuple[int, ...]
    experts_TLk: np.ndarray

    def sums(self, at: int, experts: int) -> Sums:
        """What it adds to the MoE layer that is the `at`-th, which has so many experts."""
        chosen_TE = np.zeros((len(self.experts_TLk), experts))
        np.put_along_axis(chosen_TE, self.experts_TLk[:, at], 1.0, axis=1)
        return Sums(len(chosen_TE), chosen_TE.sum(0), chosen_TE.T @ chosen_TE)


def sums_of(row: Mapping[str, Any], served: Served) -> dict[int, Sums]:
    """What a row of sums says of each MoE layer. Raises ValueError if it is of another model, or contradicts itself."""
    if row[SUMS] != VERSION:
        raise ValueError(f"{SUMS} is {row[SUMS]!r}, and this moeflow reads {VERSION}; record it with the same moeflow")
    own = {"model_type": served.model_type, "top_k": served.top_k, "hidden_size": served.hidden, "vocab_size": served.vocabulary}
    for key, value in own.items():
        if row.get(key) != value:
            raise ValueError(f"{key} is {row.get(key)!r}, and the model has {value!r}; record the traffic of this model")
    layers = row.get("layers")
    if not isinstance(layers, dict) or not all(isinstance(v, dict) for v in layers.values()):
        raise ValueError("layers is no object with an object for each MoE layer; record it again")
    if strange := sorted({*layers} - {str(i) for i, _ in served.experts}):
        raise ValueError(f"layer {strange[0]} has no routed experts in the model; record the traffic of this model")
    return {i: _sums(layers[str(i)], i, experts, served.top_k) for i, experts in served.experts if str(i) in layers}


def _sums(said: Mapping[str, Any], layer: int, experts: int, top_k: int) -> Sums:
    tokens = said.get("tokens")
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 0:
        raise ValueError(f"tokens of layer {layer} is {tokens!r}, no whole number; record it again")
    count_E = _numbers(said, "counts", layer, (experts,))
    together_EE = _numbers(said, "together", layer, (experts, experts))
    weight_E = _numbers(said, "weights", layer, (experts,)) if said.get("weights") is not None else None
    if count_E.max() > tokens or count_E.sum() > tokens * top_k:
        raise ValueError(
            f"counts of layer {layer} are more than {tokens} tokens can have with {top_k} experts each; record it again"
        )
    if (together_EE != together_EE.T).any() or (np.diag(together_EE) != count_E).any():
        raise ValueError(f"together of layer {layer} is not symmetric with counts on its diagonal; record it again")
    return Sums(tokens, count_E, together_EE, weight_E)


def _numbers(said: Mapping[str, Any], name: str, layer: int, shape: tuple[int, ...]) -> np.ndarray:
    try:
        values = np.array(said.get(name), dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} of layer {layer} are no numbers; record it again") from None
    if values.shape != shape:
        raise ValueError(
            f"{name} of layer {layer} have shape {list(values.shape)}, and the model's {shape[0]} experts need {list(shape)}; "
            "record the traffic of this model"
        )
    if not (values >= 0).all() or np.isinf(values).any():
        raise ValueError(f"{name} of layer {layer} have a number that is negative or none; record it again")
    return values


def requests_of(row: Mapping[str, Any], served: Served) -> Iterator[Request]:
    """The requests of a row: one, or as many as an answer has choices.

    Raises ValueError if there are none, or they do not fit the model.
    """
    choices = row.get("choices")
    if choices is not None:
        if not isinstance(choices, list) or not choices or not all(isinstance(c, dict) for c in choices):
            raise ValueError("choices is no list of objects; give the engine's answers, one a line")
        for choice in choices:
            yield _request(
                {"prompt_token_ids": row.get("prompt_token_ids")} | {k: v for k, v in choice.items() if v is not None}, served
            )
        return
    yield _request(row, served)


def _request(said: Mapping[str, Any], served: Served) -> Request:
    inside = [v for name in ("meta_info", "sgl_ext") if isinstance(v := said.get(name), dict)]
    routed = next((v for one in (said, *inside) if (v := one.get(ROUTED)) is not None), None)
    if routed is None:
        raise ValueError(f"has no {ROUTED}; start the engine with --enable-return-routed-experts, and ask for them")
    ids = tuple(i for name in _names(said) for i in _ids(said, name, served.vocabulary))
    flat = _array(routed, served)
    return Request(ids, _of_moe_layers(flat, served, _tokens(ids, inside)))


def _names(said: Mapping[str, Any]) -> tuple[str, str]:
    """The names of a request's tokens: SGLang's, or vLLM's."""
    return ("input_ids", "output_ids") if said.get("input_ids") is not None else ("prompt_token_ids", "token_ids")


def _ids(said: Mapping[str, Any], name: str, vocabulary: int) -> list[int]:
    ids = said.get(name)
    if ids is None:
        return []
    if not isinstance(ids, list) or any(type(i) is not int for i in ids):
        raise ValueError(f"{name} is no list of token ids; write it as [1, 2, 3]")
    if outside := [i for i in ids if not 0 <= i < vocabulary]:
        raise ValueError(
            f"{name} has the token id {outside[0]}, and the model has the ids 0 to {vocabulary - 1}; record the traffic of "
            "this model"
        )
    return ids


def _tokens(ids: tuple[int, ...], inside: list[dict[str, Any]]) -> int:
    """How many tokens a request has, of which the last may never have been an input; 0 where nothing says it."""
    names = ("prompt_tokens", "completion_tokens")
    counted = [n for one in inside for name in names if isinstance(n := one.get(name), int)]
    return len(ids) or (sum(counted) if len(counted) == len(names) else 0)


def _array(routed: Any, served: Served) -> np.ndarray:
    """The experts as they were returned: [T, L, k], or flat where their form does not say it."""
    try:
        if isinstance(routed, str):
            data = base64.b64decode(routed, validate=True)
            array = np.load(io.BytesIO(data), allow_pickle=False) if data.startswith(NPY) else np.frombuffer(data, "<i4")
        else:
            array = np.array(routed)
    except (binascii.Error, ValueError, TypeError, EOFError, OSError) as error:
        raise ValueError(
            f"{ROUTED} cannot be read ({' '.join(str(error).split())[:80]}); give it as the engine returns it"
        ) from None
    if array.dtype.kind not in "iu" or array.ndim not in (1, 3):
        raise ValueError(f"{ROUTED} has {array.ndim} dimensions of {array.dtype}; it is whole numbers [tokens, layers, experts]")
    if array.ndim == 3 and array.shape[2] != served.top_k:
        raise ValueError(
            f"{ROUTED} has {array.shape[2]} experts a token, and the model {served.top_k}; record the traffic of this model"
        )
    return array.astype(np.int64)


def _of_moe_layers(array: np.ndarray, served: Served, tokens: int) -> np.ndarray:
    """Of what was returned the MoE layers, [T, L, k]: engines have a place for every decoder layer, or for these alone."""
    moe = [i for i, _ in served.experts]
    widths = dict.fromkeys((served.decoder_layers, len(moe)))
    if array.ndim == 3:
        fitting = [array] if array.shape[1] in widths else []
    else:
        fitting = [array.reshape(-1, n, served.top_k) for n in widths if not array.size % (n * served.top_k)]
        fitting = [a for a in fitting if len(a) in (tokens, tokens - 1)] or [a for a in fitting if not tokens or len(a) <= tokens]
    if not fitting:
        what = f"{list(array.shape)}" if array.ndim == 3 else f"{array.size} numbers"
        of = f" for {tokens} tokens" if tokens and array.ndim == 1 else ""
        raise ValueError(
            f"{ROUTED} is {what}{of}, and the model has {served.decoder_layers} layers ({len(moe)} with experts), {served.top_k} "
            "experts a token; record the traffic of this model"
        )
    experts_TLk = fitting[0] if fitting[0].shape[1] == len(moe) else fitting[0][:, moe]
    if tokens and len(experts_TLk) > tokens:
        raise ValueError(f"{ROUTED} has {len(experts_TLk)} tokens, and the request {tokens}; give both as the engine returns them")
    for at, (layer, experts) in enumerate(served.experts):
        ranked_Tk = np.sort(experts_TLk[:, at], axis=1)
        outside = ranked_Tk[(ranked_Tk < 0) | (ranked_Tk >= experts)]
        if outside.size:
            raise ValueError(
                f"{ROUTED} has expert {outside[0]} in layer {layer}, and the model has 0 to {experts - 1}; record the traffic of "
                "this model"
            )
        if (ranked_Tk[:, 1:] == ranked_Tk[:, :-1]).any():
            raise ValueError(
                f"{ROUTED} has an expert twice for one token of layer {layer}: the engine did not record it; record it again"
            )
    return experts_TLk
