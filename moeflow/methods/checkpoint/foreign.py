"""What lies in a checkpoint's folder and is no part of the model: other copies of the weights, buffers, a training's wrapping.

Nothing of it gets into the result: it is left out and named in a note, or refused. No torch.
"""

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from moeflow.arch import Config
from moeflow.model.formats import some
from moeflow.model.header import TensorInfo
from moeflow.model_files import ADAPTERS, HISTORY, INDEX, named_like

if TYPE_CHECKING:
    from moeflow.sources import Source

SINGLE = "model.safetensors"
"""The file of a model that has one. transformers reads it before it looks for an index."""
KEY = "transformers_weights"
"""The entry of config.json that names another file of weights to transformers."""

WRITTEN_ANEW = ("config.json", INDEX, HISTORY)
"""The files that the new checkpoint has of its own."""

IGNORED = re.compile(r"(.*\.)?rotary_emb\.inv_freq")
"""The buffers that transformers leaves out without a word when it loads a model with rotary embeddings. No family that moeflow
works on ignores others, such as the causal mask that a GPT-NeoX has as `attention.bias`."""

WRAPPED = {
    r"(.*\.)?(lora_\w+|base_layer|modules_to_save)(\..*)?": "an adapter that is not merged: call merge_and_unload() and save again",
    r"base_model\.model\..*": "PEFT's wrapping: call merge_and_unload() and save again",
    r"(.*\.)?_orig_mod\..*": "the wrapping of torch.compile: save the model without it",
    r"(.*\.)?_fsdp_wrapped_module\..*": "the wrapping of FSDP: save the model's whole state",
    r"module\..*": "the wrapping of torch's or DeepSpeed's data parallelism: save the model without it",
}
"""Names that a training's wrapping leaves in a checkpoint which was saved with it, and the way out."""


def shards_of(source: "Source", config: Config, index: Mapping[str, str] | None) -> list[str]:
    """The files that hold the model's weights: those of the index, or model.safetensors, or else all that may be weights.

    `index`: the file of each tensor, if there is an index. Raises ValueError if there is none, or if it is open which.
    """
    held = [n for n in source.names() if n.endswith(".safetensors") and not named_like(n, ADAPTERS)]
    if name := config.get(KEY):
        raise ValueError(
            f"config.json at {source.uri} names {name!r:.60} as {KEY}; call that file {SINGLE}, or its index {INDEX}, and take the "
            "entry out"
        )
    if index is not None:
        files = {*index.values()}
        if SINGLE in held and SINGLE not in files:
            raise ValueError(
                f"{source.uri} holds its weights twice: in {SINGLE}, which transformers reads, and in the files of {INDEX}; delete "
                "one of them"
            )
        return sorted(files)
    if not held:
        raise ValueError(f"{source.uri} holds no safetensors file; give the folder of a checkpoint")
    return [SINGLE] if SINGLE in held else sorted(held)


def without_buffers(tensors: dict[str, TensorInfo], beside: tuple[str, ...]) -> tuple[dict[str, TensorInfo], str]:
    """The tensors without those of the text model that transformers ignores, and a note of these; "" if there are none.

    `beside`: how the names begin of what is no part of the text model, and is left alone.
    """
    buffers = sorted(n for n in tensors if IGNORED.fullmatch(n) and not n.startswith(beside))
    if not buffers:
        return tensors, ""
    note = f"left out, as transformers leaves them out: {some(buffers)}"
    return {n: t for n, t in tensors.items() if n not in {*buffers}}, note


def check_names(tensors: Iterable[str], uri: str) -> None:
    """Raise ValueError if the names of tensors tell that the checkpoint was saved in a training's wrapping."""
    for name in tensors:
        for pattern, what in WRAPPED.items():
            if re.fullmatch(pattern, name):
                raise ValueError(f"{uri} holds {name}, which is {what}")


def note_of_left(source: "Source", used: Iterable[str]) -> str:
    """A note of what lies at the source and does not get into the result; "" if there is nothing."""
    names = [n for n in source.names() if n not in {*used, *WRITTEN_ANEW} and not named_like(n, ADAPTERS)]
    left = sorted({*names} | {*source.left})
    return f"left where it is, as no part of the model: {some(left, 20)}" if left else ""
