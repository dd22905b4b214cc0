"""Run hidden states through decoder layers, one layer's weights at a time, record statistics on the way, and compute logits.

Shapes are suffixes: N sequences, L positions, T tokens, t some of them, D model width, V vocabulary. This file reads and writes
files, and knows nothing of steps.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moeflow.arch import Config, Family
from moeflow.model.alternatives import slices
from moeflow.model.checkpoint import Tensors
from moeflow.model.layout import Files, read_config
from moeflow.model.observe import OBSERVED, Recorder
from moeflow.model.router import Router
from moeflow.model.spec import precision
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
    config: Config, hidden: Path, layers: Sequence[tuple[int, Path]], out: Path, *, batch: int, dtype: str, progress: Progress,
    recorded: Callable[[int], Path] | None = None, before: Callable[[int], Path] | None = None, between: int = 0,
    budget: int = 0, **recording: Any,
) -> None:  # fmt: skip
    """Run hidden states through consecutive layers (number, file), `batch` sequences together, and write those behind the last.

    `recorded(layer)` is the file for the statistics of an MoE layer; `budget` and `recording` are options of its `Recorder`.
    `before(layer)` is the file for the hidden states of the first `between` tokens before a layer.
    """
    stream = stream_of(config, dtype, OBSERVED if recorded else EXPERTS)
    states_NLD = load_file(hidden)["hidden_NLD"]
    n, length = states_NLD.shape[:2]
    for at, (layer, file) in enumerate(layers):
        tensors = Tensors(file)
        module = stream.layer(tensors, layer)
        recorder = _recorder(stream, tensors, layer, budget=budget, **recording) if recorded else None
        if before:
            save_file({"hidden_RD": states_NLD.flatten(0, 1)[:between].clone()}, before(layer))
        for done, part_nLD in _batches(states_NLD, batch):
            part_nLD.copy_(_forward(stream, module, layer, part_nLD, recorder))
            progress((at * n + done) * length, len(layers) * n * length, "token layers")
        if recorded and recorder is not None:
            save_file(recorder.result(), recorded(layer))
        elif recorded and layer in stream.family.moe_layers:
            save_file({"tokens": torch.tensor(n * length)}, recorded(layer))  # its experts are gone
        del module
    save_file({"hidden_NLD": states_NLD}, out)


def stream_of(config: Config, dtype: str, experts: str = EXPERTS) -> Stream:
    """A model to run layer by layer, on a GPU if there is one. With `dtype` "auto" it has the checkpoint's own precision."""
    return _stream(json.dumps(config), precision(config, dtype), experts)


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
    return Stream(json.loads(config), device=device, dtype=getattr(torch, dtype), experts=experts)


def _recorder(stream: Stream, tensors: Tensors, layer: int, **recording: Any) -> Recorder | None:
    family = Family.of(stream.config)
    router = tensors.info.get(family.router(layer))
    if router is None:
        return None
    bias = family.router_bias(layer)
    bias_E = None if bias is None else tensors[bias].to(stream.device).float()
    experts = router.shape[0]
    return Recorder(family, Router.of(family, experts, bias_E), experts, **recording)


def _batches(states_NLD: Tensor, batch: int) -> Iterator[tuple[int, Tensor]]:
    done = 0
    for part_nLD in states_NLD.split(batch):
        done += len(part_nLD)
        yield done, part_nLD


def _forward(stream: Stream, module: nn.Module, layer: int, part_nLD: Tensor, recorder: Recorder | None) -> Tensor:
    h_nLD = part_nLD.to(stream.device)
    arguments = stream.arguments(layer, h_nLD)
    if recorder is None:
        return module(h_nLD, **arguments)
    with recorder.on(module):
        return module(h_nLD, **arguments)
