"""Run hidden states through decoder layers, one layer's weights at a time, record statistics on the way, and compute logits.

Shapes are suffixes: N sequences, L positions, T tokens, t some of them, D model width, V vocabulary. This file reads and writes
files, and knows nothing of steps.
"""

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext, suppress
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moeflow.arch import Config
from moeflow.model.alternatives import slices
from moeflow.model.checkpoint import Tensors, read_moe
from moeflow.model.factors import Form, form_of
from moeflow.model.layout import Files, file_before, file_beside, file_of, read_config
from moeflow.model.memory import CONTEXT, MARGIN, run_per_token, together
from moeflow.model.moved import PART, arriving, memory_of
from moeflow.model.observe import OBSERVED, Recorder, first_of
from moeflow.model.packed import unpacked_shapes
from moeflow.model.spec import Recording
from moeflow.model.stream import EXPERTS, HIDDEN, States, Stream

TOKENS_AT_ONCE = 1024
"""Tokens whose logits are in memory together."""
ON_PROCESSOR = 64 << 20
"""Bytes of the activations of the sequences that run together on a processor, where more leave the caches..."""
OF_WEIGHTS = 0.5
"""... or this part of the bytes of the layer's weights if it is more: those are read again for each batch, and wide experts do not
stay in a cache either."""

Progress = Callable[[int, int, str], None]


@torch.inference_mode()
def embed(config: Config, rest: Files, ids_NL: Tensor, out: Path, *, dtype: str) -> None:
    """Write the hidden states of these token ids before the first layer. Raises ValueError for an id outside the vocabulary."""
    vocabulary = int(config["vocab_size"])
    if len(ids_NL) and not 0 <= int(ids_NL.min()) <= int(ids_NL.max()) < vocabulary:
        raise ValueError(
            f"token ids reach from {ids_NL.min()} to {ids_NL.max()}, but the model's vocabulary has {vocabulary}: the tokenizer in "
            "its folder belongs to another model, or got tokens that the embedding did not; put the model's own there"
        )
    save_file({HIDDEN: stream_of(config, dtype).embed(Tensors(rest), ids_NL).cpu().contiguous()}, out)


@torch.inference_mode()
def through(
    config: Config, hidden: Path, layers: Iterable[tuple[int, Path | Files]], out: Path,
    *, count: int, batch: int, dtype: str, progress: Progress, recording: Recording | None = None,
) -> None:  # fmt: skip
    """Run hidden states through `count` consecutive layers (number, file), and write those behind the last.

    As many sequences run together as there is room for, and at most `batch`, if that is not 0. The next layer is read, and moved to
    the GPU, while one computes.

    With `recording` there is a file beside `out` for the statistics of each MoE layer (`file_of`), and where they are kept one for
    the hidden states before each layer (`file_before`) and one for what each MoE block is added to (`file_beside`).
    """
    stream = stream_of(config, dtype, OBSERVED if recording else EXPERTS)
    states = load_file(hidden)
    n, length = states[HIDDEN].shape[:2]
    home = home_of(stream.device, 2 * sum(t.nbytes for t in states.values()))
    states = {name: t.to(home) for name, t in states.items()}
    for at, (layer, tensors) in enumerate(arriving(layers, stream.device)):
        module = stream.layer(tensors, layer)
        recorder = recorder_of(stream, tensors, layer, recording) if recording else None
        if recording and recording.between:
            kept_RD = states[HIDDEN].flatten(0, 1)[: recording.between].clone().cpu()
            save_file({"hidden_RD": kept_RD}, out.with_name(file_before(layer)))
        behind: States = {HIDDEN: states[HIDDEN]}
        tensors.drop()
        size = at_once(stream, module, tensors, length, batch, recorded=recorder is not None)
        for rows in slices(n, size):
            with recorder.on(module) if recorder else nullcontext():
                put(behind, stream.run(module, layer, taken(states, rows, stream.device)), rows, n, home)
            progress((at * n + rows.stop) * length, count * n * length, "token layers")
        if recording and layer in stream.family.moe_layers:
            gone = {"tokens": torch.tensor(n * length)}  # its experts are
            save_file(recorder.result() if recorder else gone, out.with_name(file_of(layer)))
            if recording.beside[0]:
                of_block = recorder.beside() if recorder else states[HIDDEN].new_zeros(0, states[HIDDEN].shape[-1], device="cpu")
                save_file({"beside_RD": of_block}, out.with_name(file_beside(layer)))
        states = behind
        del module
    save_file({name: t.cpu() for name, t in states.items()}, out)


class _Reached(Exception):
    """The block is about to run, and nothing behind it is asked for."""


@torch.inference_mode()
def inputs(
    config: Config, hidden: Path, layer: int, file: Path | Files, out: Path,
    *, recorded: int, beside: bool = False, batch: int, dtype: str, progress: Progress,
) -> None:  # fmt: skip
    """Write what the MoE block of a layer takes in for the first `recorded` tokens, as a `Recorder` does: `x_RD` and `sample`.

    With `beside` also what the norm before the block takes in, to which the block's output is added: `beside_RD`.

    The layer is run up to the block, on as many sequences as have these tokens, together as in `through`; no expert is read. If its
    experts are gone, there is only the token count, `tokens`.
    """
    stream, tensors, states = stream_of(config, dtype), Tensors(file), load_file(hidden)
    n, length, width = states[HIDDEN].shape
    if stream.family.router(layer) not in tensors:
        save_file({"tokens": torch.tensor(n * length)}, out)
        return
    module = stream.layer(tensors, layer, experts=False)
    kept = {name: [torch.zeros(0, width, dtype=stream.dtype)] for name in ("x_RD", "beside_RD")[: 1 + beside]}

    def keep(name: str, args: Any, named: Mapping[str, Any]) -> None:
        kept[name].append(first_of(args, named).flatten(0, -2).cpu())

    def reach(_: Any, args: Any, named: Mapping[str, Any]) -> None:
        keep("x_RD", args, named)
        raise _Reached

    norm, block = (module.get_submodule(name) for name in (stream.family.arch.norm, stream.family.arch.block))
    block.register_forward_pre_hook(reach, with_kwargs=True)
    if beside:
        norm.register_forward_pre_hook(lambda _, args, named: keep("beside_RD", args, named), with_kwargs=True)
    size = at_once(stream, module, tensors, length, batch, recorded=True)  # as a whole pass runs them, to the last bit
    for rows in slices(min(n, -(-recorded // length)), size):
        with suppress(_Reached):
            stream.run(module, layer, taken(states, slice(rows.start, min(rows.start + size, n)), stream.device))
        progress(min(rows.stop * length, recorded), recorded, "tokens")
    made = {name: torch.cat(batches)[:recorded].clone() for name, batches in kept.items()}
    save_file(made | {"sample": torch.tensor(len(made["x_RD"]))}, out)


def at_once(
    stream: Stream, module: torch.nn.Module, tensors: Mapping[str, Tensor], length: int, batch: int,
    *, copies: int = 1, recorded: bool = False,
) -> int:  # fmt: skip
    """How many sequences of this length run together through a layer: as many as there is room for, and at most `batch`, if not 0.

    On a GPU activations take half of what `copies` of the layer's weights leave, and of what is moved ahead or it was made of; on a
    processor `ON_PROCESSOR` or `OF_WEIGHTS`. Nothing is asked but sizes, so that on two machines of a kind it is the same.
    """
    info = tensors.info if isinstance(tensors, Tensors) else tensors
    shapes = {name: tuple(info[name].shape) for name in info}
    config = stream.family.config
    of_token = run_per_token(config, shapes, stream.dtype.itemsize, recorded=recorded) + 8 * stream.family.handed_on(length)
    if stream.device.type != "cuda":
        weights = stream.dtype.itemsize * sum(prod(shape) for shape in unpacked_shapes(shapes, config).values())
        return together(max(ON_PROCESSOR, int(OF_WEIGHTS * weights)), length * of_token, batch)
    whole = memory_of(stream.device)
    weights = sum(t.nbytes for t in module.state_dict().values())
    moved = min(weights, int(PART * whole))
    return together((int((whole - CONTEXT) / MARGIN) - copies * (weights + moved)) // 2, length * of_token, batch)


def home_of(device: torch.device, nbytes: int) -> torch.device:
    """Where so many bytes of states stay between layers: on the device if they take less than a quarter of what is free there."""
    fits = device.type == "cuda" and 4 * nbytes < torch.cuda.mem_get_info(device)[0]
    return device if fits else torch.device("cpu")


def taken(states: States, rows: slice, device: torch.device) -> States:
    """The states of some sequences, on the device."""
    return {name: t[rows].to(device) for name, t in states.items()}


def put(states: States, of_rows: States, rows: slice, count: int, home: torch.device | str = "cpu") -> None:
    """Write the states of some sequences into those of all `count`, which lie in memory or on the device `home`."""
    for name, t in of_rows.items():
        if name not in states:
            states[name] = t.new_empty(count, *t.shape[1:], device=home)
        states[name][rows] = t.to(home)


def stream_of(config: Config, dtype: str, experts: str = EXPERTS) -> Stream:
    """A model to run layer by layer, on a GPU if there is one. With `dtype` "auto" it has the checkpoint's own precision."""
    return _stream(json.dumps(config), dtype, experts)


def expert_form(config: Config, layer: int) -> Form:
    """How transformers holds a layer's experts in memory."""
    stream = stream_of(config, "float32")
    return form_of(stream.skeleton.layers[layer].get_submodule(stream.family.arch.block).get_submodule("experts"))


def norm_offset(config: Config, layer: int) -> float:
    """What the norm before a layer's MoE block adds to its weight: 0, or 1 where the weight's difference from one is stored."""
    stream = stream_of(config, "float32")
    norm: Any = copy.deepcopy(stream.skeleton.layers[layer].get_submodule(stream.family.arch.norm)).to_empty(device="cpu")
    torch.nn.init.zeros_(norm.weight)
    return float(norm(torch.ones(1, len(norm.weight))).mean().round())


class Head:
    """The final norm and the head of a model: from hidden states behind the last layer to logits.

    `rest` holds config.json and their tensors.
    """

    def __init__(self, rest: Files, dtype: str) -> None:
        stream = stream_of(read_config(rest), dtype)
        self.device, self._logits = stream.device, stream.logits(Tensors(rest))

    def logits(self, states_TD: Tensor) -> Tensor:
        """The logits [T, V] of hidden states [T, D], in fp32."""
        return self._logits(states_TD[None].to(self.device))[0].float()

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
    if stream.family.router(layer) not in tensors:
        return None
    moe = read_moe(tensors, stream.family.config, layer, experts=False).to(device=stream.device, dtype=stream.dtype)
    return Recorder(stream.family, moe, recording)
