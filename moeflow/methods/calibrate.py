"""Run a model over text once, stage by stage, and record what every later decision needs.

The unit of work is (token shard x stage of consecutive layers): `advance` brings hidden states through a stage, `observe` does so
and records on the way. One decoder layer's weights are resident at a time.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moeflow.arch import Config, arch_of
from moeflow.methods.fetch import Model
from moeflow.model.checkpoint import Tensors
from moeflow.model.observe import OBSERVED, Recorder
from moeflow.model.router import Router
from moeflow.model.spec import HiddenSpec, LayerSpec, ObservedSpec, RestSpec, TokensSpec, file_bytes, precision
from moeflow.model.stream import EXPERTS, Stream
from moeflow.step import Artifact, Context, Part, Spec, Step, step

HIDDEN = "hidden.safetensors"


@dataclass(frozen=True)
class Calibration:
    """One pass of a model over a token matrix: what was recorded in each MoE layer, shard by shard, and the last hidden states."""

    model: Model
    tokens: Step
    batch: int  # sequences that ran together
    dtype: str
    starts: tuple[Step, ...]  # per shard: hidden states before the first layer
    ends: tuple[Step, ...]  # per shard: hidden states behind the last layer
    observed: dict[int, tuple[Part, ...]]  # per MoE layer: one part for each shard
    recorded: int  # tokens of each shard whose MoE inputs are kept, at most


def run(
    model: Model,
    tokens: Step,
    *,
    batch: int = 8,
    shard: int = 32,
    stage: int = 8,
    record: int | None = None,
    per_expert: int = 0,
    residual: bool = False,
    dtype: str = "auto",
) -> Calibration:
    """Calibrate `model` on `tokens`, in shards of `shard` sequences and stages of `stage` layers.

    `batch` sequences run together; `record`: tokens whose MoE inputs are kept (all, where it is None), and beyond them up to
    `per_expert` tokens for each expert and shard; `residual` keeps the residual stream of the same tokens too; `dtype`: the
    precision of the run ("auto": the checkpoint's own).
    """
    spec: TokensSpec = tokens.spec.output
    starts = _embed_shards(model, tokens, batch=batch, shard=shard, dtype=dtype)
    each = shard * spec.length if record is None else -(-record // len(starts))
    observed: dict[int, tuple[Part, ...]] = {i: () for i in model.moe_layers}
    ends = []
    for hidden in starts:
        for first in range(0, len(model.layers), stage):
            indices = list(range(first, min(first + stage, len(model.layers))))
            hidden = observe(
                model.rest.part("config.json"), hidden, *(model.layers[i] for i in indices),
                layers=indices, batch=batch, record=each, per_expert=per_expert, residual=residual, dtype=dtype,
            )  # fmt: skip
            for i in set(indices) & set(observed):
                observed[i] += (hidden.part(file_of(i)),)
        ends.append(hidden)
    return Calibration(model, tokens, batch, dtype, tuple(starts), tuple(ends), observed, each)


def hidden_states(
    model: Model, tokens: Step, *, batch: int = 8, shard: int = 32, stage: int = 8, dtype: str = "auto"
) -> tuple[Step, ...]:
    """The hidden states of `tokens` behind the last layer of `model`, shard by shard, recording nothing."""
    ends = []
    for hidden in _embed_shards(model, tokens, batch=batch, shard=shard, dtype=dtype):
        for first in range(0, len(model.layers), stage):
            indices = list(range(first, min(first + stage, len(model.layers))))
            hidden = advance(
                model.rest.part("config.json"),
                hidden,
                *(model.layers[i] for i in indices),
                layers=indices,
                batch=batch,
                dtype=dtype,
            )
        ends.append(hidden)
    return tuple(ends)


def file_of(layer: int) -> str:
    return f"layer-{layer:03d}.safetensors"


def _embed_shards(model: Model, tokens: Step, *, batch: int, shard: int, dtype: str) -> list[Step]:
    count = tokens.spec.output.sequences
    if batch < 1 or shard % batch:
        raise ValueError(f"shard={shard} sequences must be a multiple of batch={batch}, so that a shard holds whole batches")
    return [
        embed(model.rest, tokens, first=first, count=min(shard, count - first), dtype=dtype) for first in range(0, count, shard)
    ]


def _embed_spec(rest: RestSpec, tokens: TokensSpec, *, first: int, count: int, dtype: str) -> Spec:
    config = rest.config
    positions = config.get("max_position_embeddings")
    if positions and tokens.length > positions:
        raise ValueError(
            f"sequences of {tokens.length} tokens are longer than the model's {positions} positions; make them shorter"
        )
    out = HiddenSpec(config, count, tokens.length, precision(config, dtype))
    table = file_bytes({"e": rest.tensors["model.embed_tokens.weight"]})
    return Spec(out, reads=table + tokens.sequences * tokens.length * 4, writes=out.nbytes, memory=3 * table + 2 * out.nbytes)


@step("calibrate.embed", version=1, spec=_embed_spec)
@torch.inference_mode()
def embed(context: Context, rest: Artifact, tokens: Artifact, *, first: int, count: int, dtype: str) -> None:
    """The hidden states [N, L, D] of `count` sequences from the `first` on, before the first layer."""
    stream = _stream(Tensors.config(rest), dtype)
    ids_NL = torch.from_numpy(np.load(tokens.file("tokens.npy"))[first : first + count].astype(np.int64))
    vocabulary = int(stream.config["vocab_size"])
    if len(ids_NL) and not 0 <= int(ids_NL.min()) <= int(ids_NL.max()) < vocabulary:
        raise ValueError(f"token ids reach from {ids_NL.min()} to {ids_NL.max()}, but the model's vocabulary has {vocabulary}")
    save_file({"hidden_NLD": stream.embed(Tensors(rest), ids_NL).cpu().contiguous()}, context.out / HIDDEN)


def _pass_spec(hidden: HiddenSpec | ObservedSpec, layers: tuple[LayerSpec, ...]) -> tuple[HiddenSpec, int, int]:
    states = hidden.hidden if isinstance(hidden, ObservedSpec) else hidden
    reads = states.nbytes + sum(layer.nbytes for layer in layers)
    # the largest layer twice (file and fused experts), the hidden states, and a batch's activations
    memory = 2 * max(layer.nbytes for layer in layers) + 4 * states.nbytes
    return states, reads, memory


def _advance_spec(config: RestSpec, hidden: Any, *layer_specs: LayerSpec, layers: list[int], batch: int, dtype: str) -> Spec:
    states, reads, memory = _pass_spec(hidden, layer_specs)
    return Spec(states, reads=reads, writes=states.nbytes, memory=memory)


@step("calibrate.advance", version=1, spec=_advance_spec)
@torch.inference_mode()
def advance(
    context: Context, config: Artifact, hidden: Artifact, *files: Artifact, layers: list[int], batch: int, dtype: str
) -> None:
    """The hidden states behind consecutive `layers`, whose files follow each other in the inputs."""
    stream = _stream(Tensors.config(config), dtype)
    states_NLD = load_file(hidden.file(HIDDEN))["hidden_NLD"]
    for at, (layer, file) in enumerate(zip(layers, files, strict=True)):
        module = stream.layer(Tensors(file.file("layer.safetensors")), layer)
        for done, part_nLD in _batches(states_NLD, batch):
            part_nLD.copy_(_forward(stream, module, layer, part_nLD))
            _progress(context, at, len(layers), done, states_NLD)
    save_file({"hidden_NLD": states_NLD}, context.out / HIDDEN)


def _observe_spec(
    config: RestSpec,
    hidden: Any,
    *layer_specs: LayerSpec,
    layers: list[int],
    batch: int,
    record: int,
    per_expert: int,
    residual: bool,
    dtype: str,
) -> Spec:
    states, reads, memory = _pass_spec(hidden, layer_specs)
    tokens = states.sequences * states.length
    kept = min(tokens, record)
    width, size = int(states.config["hidden_size"]), 4 if states.dtype == "float32" else 2
    writes = states.nbytes
    for layer in layer_specs:
        if layer.experts:
            rows = min(tokens, kept + per_expert * layer.experts)
            writes += rows * (width * size * (2 if residual else 1) + 8) + tokens * layer.experts * 4 + 8 * 7 * layer.experts + 1400
    moe = tuple(spec.layer for spec in layer_specs if spec.experts)
    return Spec(ObservedSpec(states, kept, moe), reads=reads, writes=writes, memory=memory + writes)


@step("calibrate.observe", version=1, spec=_observe_spec)
@torch.inference_mode()
def observe(
    context: Context, config: Artifact, hidden: Artifact, *files: Artifact,
    layers: list[int], batch: int, record: int, per_expert: int, residual: bool, dtype: str,
) -> None:  # fmt: skip
    """`advance`, and beside the hidden states one file per MoE layer with what a `Recorder` saw in it."""
    stream = _stream(Tensors.config(config), dtype, OBSERVED)
    states_NLD = load_file(hidden.file(HIDDEN))["hidden_NLD"]
    moe_layers = set(arch_of(stream.config).moe_layers(stream.config))
    for at, (layer, file) in enumerate(zip(layers, files, strict=True)):
        tensors = Tensors(file.file("layer.safetensors"))
        module = stream.layer(tensors, layer)
        recorder = None
        if layer in moe_layers:
            bias = stream.arch.router_bias
            bias_E = None if bias is None else tensors[bias.format(layer=layer)].float()
            router = Router.of(stream.arch, stream.config, bias_E)
            experts = tensors.info[stream.arch.router.format(layer=layer)].shape[0]
            recorder = Recorder(stream.arch, router, experts, budget=record, per_expert=per_expert, residual=residual)
        for done, part_nLD in _batches(states_NLD, batch):
            part_nLD.copy_(_forward(stream, module, layer, part_nLD, recorder))
            _progress(context, at, len(layers), done, states_NLD)
        if recorder is not None:
            save_file(recorder.result(), context.out / file_of(layer))
        del module
    save_file({"hidden_NLD": states_NLD}, context.out / HIDDEN)


def _stream(config: Config, dtype: str, experts: str = EXPERTS) -> Stream:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Stream(config, device=device, dtype=getattr(torch, precision(config, dtype)), experts=experts)


def _batches(states_NLD: Tensor, batch: int):  # type: ignore[no-untyped-def]
    done = 0
    for part_nLD in states_NLD.split(batch):
        done += len(part_nLD)
        yield done, part_nLD


def _forward(stream: Stream, module: nn.Module, layer: int, part_nLD: Tensor, recorder: Recorder | None = None) -> Tensor:
    h_nLD = part_nLD.to(stream.device)
    arguments = stream.arguments(layer, h_nLD)
    if recorder is None:
        return module(h_nLD, **arguments)
    with recorder.on(module):
        return module(h_nLD, **arguments)


def _progress(context: Context, at: int, layers: int, sequences: int, states_NLD: Tensor) -> None:
    n, length = states_NLD.shape[:2]
    context.progress((at * n + sequences) * length, layers * n * length, "token layers")
