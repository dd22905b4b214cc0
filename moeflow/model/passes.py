"""Run hidden states through decoder layers, one layer's weights at a time, record statistics on the way, and compute logits.

Shapes are suffixes: N sequences, L positions, T tokens, t some of them, D model width, V vocabulary. This file reads and writes
files, and knows nothing of steps.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moeflow.arch import Config
from moeflow.model.alternatives import slices
from moeflow.model.checkpoint import Tensors
from moeflow.model.layout import Files, file_before, file_of, read_config
from moeflow.model.observe import OBSERVED, Recorder
from moeflow.model.router import Router
from moeflow.model.spec import Recording
from moeflow.model.stream import EXPERTS, Stream

TOKENS_AT_ONCE = 1024
"""Tokens whose logits are in memory together."""

Progress = Callable[[int, int, str], None]


@torch.inference_mode()
def embed(config: Config, rest: Files, ids_NL: Tensor, out: Path, *, dtype: str) -> None:
    """Write the hidden states of these token ids before the first layer. Raises ValueError for an id outside the vocabulary."""
    vocabulary = int(config["vocab_size"])
    if len(ids_NL) and not 0 <= int(ids_NL.min()) <= int(ids_NL.max()) < vocabulary:
        raise ValueError(f"token ids reach from {ids_NL.min()} to {ids_NL.max()}, but the model's vocabulary has {vocabulary}")
    save_file({"hidden_NLD": stream_of(config, dtype).embed(Tensors(rest), ids_NL).cpu().contiguous()}, out)


@torch.inference_mode()
def through(
    config: Config, hidden: Path, layers: Sequence[tuple[int, Path]], out: Path,
    *, batch: int, dtype: str, progress: Progress, recording: Recording | None = None,
) -> None:  # fmt: skip
    """Run hidden states through consecutive layers (number, file), `batch` sequences together, and write those behind the last.

    With `recording` there is a file beside `out` for the statistics of each MoE layer (`file_of`), and one for the hidden states
    before each layer if some are kept (`file_before`).
    """
    stream = stream_of(config, dtype, OBSERVED if recording else EXPERTS)
    states_NLD = load_file(hidden)["hidden_NLD"]
    n, length = states_NLD.shape[:2]
    for at, (layer, file) in enumerate(layers):
        tensors = Tensors(file)
        module = stream.layer(tensors, layer)
        recorder = recorder_of(stream, tensors, layer, recording) if recording else None
        if recording and recording.between:
            save_file({"hidden_RD": states_NLD.flatten(0, 1)[: recording.between].clone()}, out.with_name(file_before(layer)))
        for rows in slices(n, batch):
            h_nLD = states_NLD[rows].to(stream.device)
            with recorder.on(module) if recorder else nullcontext():
                states_NLD[rows] = module(h_nLD, **stream.arguments(layer, h_nLD)).cpu()
            progress((at * n + rows.stop) * length, len(layers) * n * length, "token layers")
        if recording and layer in stream.family.moe_layers:
            gone = {"tokens": torch.tensor(n * length)}  # its experts are
            save_file(recorder.result() if recorder else gone, out.with_name(file_of(layer)))
        del module
    save_file({"hidden_NLD": states_NLD}, out)


def stream_of(config: Config, dtype: str, experts: str = EXPERTS) -> Stream:
    """A model to run layer by layer, on a GPU if there is one. With `dtype` "auto" it has the checkpoint's own precision."""
    return _stream(json.dumps(config), dtype, experts)


class Head:
    """The final norm and the head of a model: from hidden states behind the last layer to logits.

    `rest` holds config.json and their tensors.
    """

    def __init__(self, rest: Files, dtype: str) -> None:
        stream, tensors = stream_of(read_config(rest), dtype), Tensors(rest)
        self.device, self._norm, self._head = stream.device, stream.final_norm(tensors), stream.head(tensors)

    def logits(self, states_TD: Tensor) -> Tensor:
        """The logits [T, V] of hidden states [T, D], in fp32."""
        return self._head(self._norm(states_TD[None].to(self.device)))[0].float()

    def by_chunk(self, states_TD: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The logits [t, V] of at most `TOKENS_AT_ONCE` tokens at a time, in fp32, each with the rows of these tokens."""
        for rows in slices(len(states_TD), TOKENS_AT_ONCE):
            yield rows, self.logits(states_TD[rows])


@lru_cache(2)  # a stream has no weights, and every step of a run needs the same one
def _stream(config: str, dtype: str, experts: str) -> Stream:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Stream(json.loads(config), device=device, dtype=dtype, experts=experts)


def recorder_of(stream: Stream, tensors: Mapping[str, Tensor], layer: int, recording: Recording) -> Recorder | None:
    """What records in a layer with these tensors; None if it has no router."""
    family = stream.family
    if family.router(layer) not in tensors:
        return None
    bias = family.router_bias(layer)
    bias_E = None if bias is None else tensors[bias].to(stream.device).float()
    experts = len(tensors[family.router(layer)])
    return Recorder(family, Router.of(family, experts, bias_E), experts, recording)
