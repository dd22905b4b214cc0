"""Measure a compressed model beside its original: what it costs, what it lost, how fast it runs. Each leaves a `report.json`.

Both models are streamed layer by layer; only the speed is measured on whole models, and left out where they do not fit.
Shapes are suffixes: T tokens, D model width, V vocabulary.
"""

from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from moeflow.arch import arch_of
from moeflow.methods import drop, tokens
from moeflow.methods.calibrate import HIDDEN, Calibration, hidden_states
from moeflow.methods.fetch import Model
from moeflow.methods.reports import row, write_report
from moeflow.methods.speed import machine, speed
from moeflow.model.checkpoint import Tensors
from moeflow.model.spec import CheckpointSpec, HiddenSpec, ObservedSpec, RestSpec, TokensSpec, file_bytes, precision
from moeflow.model.stream import Stream
from moeflow.step import Artifact, Context, Spec, Step, step

TOKENS_AT_ONCE = 1024


def compare(
    calibration: Calibration, compressed: Model, *, heldout: tokens.Texts, sequences: int, length: int, seed: int = 0
) -> tuple[Step, ...]:
    """Reports on `compressed` beside the model that was calibrated: size, quality on each held-out text, speed.

    A model without a tokenizer cannot read text: its quality is measured on the calibration tokens instead, and the report says so.
    """
    original = calibration.model
    both = drop.checkpoint_of(original), drop.checkpoint_of(compressed)
    plan: list[tuple[str, Step, tuple[Step, ...], str]] = []
    if original.has_tokenizer:
        for entry in heldout.entries():
            matrix = tokens.of(_One(entry), original, sequences=sequences, length=length, seed=seed, bos=False)
            plan.append((_name(entry.source.uri), matrix, _hidden(original, matrix, calibration), ""))
    else:
        note = "the model has no tokenizer: held-out text is left out, the loss on the token matrix stands for it"
        plan.append(("token matrix", calibration.tokens, calibration.ends, note))
    reports = [size(*both)]
    for name, matrix, ends, note in plan:
        theirs = _hidden(compressed, matrix, calibration)
        reports.append(
            quality(original.rest, compressed.rest, matrix, *ends, *theirs, name=name, note=note, dtype=calibration.dtype)
        )
    return (*reports, speed(*both, machine=machine(), length=length))


def _hidden(model: Model, matrix: Step, calibration: Calibration) -> tuple[Step, ...]:
    return hidden_states(
        model, matrix, batch=calibration.batch, shard=8 * calibration.batch, stage=len(model.layers), dtype=calibration.dtype
    )


class _One:
    """One text of several, as texts of its own."""

    is_tokens = False

    def __init__(self, entry: Any) -> None:
        self.entry = entry

    def entries(self) -> Any:
        return (self.entry,)


def _name(uri: str) -> str:
    return uri.rstrip("/").rsplit("/", 1)[-1].split("?")[0].split(".")[0]


def _size_spec(original: CheckpointSpec, compressed: CheckpointSpec) -> Spec:
    return Spec(reads=4096, writes=600, memory=1 << 24)


@step("evaluate.size", version=1, spec=_size_spec)
def size(context: Context, original: Artifact, compressed: Artifact) -> None:
    """Parameters and bytes at rest, counted from the files' headers, and the experts of each MoE layer."""
    counts = []
    for artifact in (original, compressed):
        tensors, config = Tensors(artifact), Tensors.config(artifact)
        counts.append(
            {
                "parameters": sum(t.numel for t in tensors.info.values()),
                "bytes": sum(artifact.size(n) for n in artifact.names() if n.endswith(".safetensors")),
                "experts per layer": arch_of(config).num_experts(config),
            }
        )
    units = {"parameters": "", "bytes": "B", "experts per layer": ""}
    write_report(context, "size", [row(n, counts[0][n], counts[1][n], u) for n, u in units.items()])


def _quality_spec(rest: RestSpec, other: RestSpec, matrix: TokensSpec, *ends: Any, name: str, note: str, dtype: str) -> Spec:
    states: list[HiddenSpec] = [e.hidden if isinstance(e, ObservedSpec) else e for e in ends]
    head = file_bytes(rest.tensors)
    reads = 2 * head + sum(s.nbytes for s in states) + matrix.tokens * 4
    width = int(rest.config["vocab_size"]) * TOKENS_AT_ONCE * 4 * 6
    return Spec(reads=reads, writes=1200, memory=4 * head + 2 * max(s.nbytes for s in states) + width)


@step("evaluate.quality", version=1, spec=_quality_spec)
@torch.inference_mode()
def quality(
    context: Context, original: Artifact, compressed: Artifact, matrix: Artifact, *ends: Artifact, name: str, note: str, dtype: str
) -> None:
    """Perplexity of both models on a token matrix, and the KL divergence and top-1 agreement of the second with the first.

    `ends`: the hidden states behind the last layer, shard by shard, of the first model and then of the second. The KL divergence is
    that of the compressed model from the original, in nats per token, over the positions that predict a token.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    heads = []
    for rest in (original, compressed):
        config, tensors = Tensors.config(rest), Tensors(rest)
        stream = Stream(config, device=device, dtype=getattr(torch, precision(config, dtype)))
        heads.append((stream.final_norm(tensors), stream.head(tensors)))
    ids_NL = torch.from_numpy(np.load(matrix.file("tokens.npy")).astype(np.int64))
    half, at, total = len(ends) // 2, 0, ids_NL[:, 1:].numel()
    sums = torch.zeros(4, dtype=torch.float64)
    seen = 0
    for first, second in zip(ends[:half], ends[half:], strict=True):
        both = [load_file(e.file(HIDDEN))["hidden_NLD"] for e in (first, second)]
        for n in range(len(both[0])):
            target_T = ids_NL[at, 1:].to(device)
            for part in range(0, len(target_T), TOKENS_AT_ONCE):
                rows = slice(part, min(part + TOKENS_AT_ONCE, len(target_T)))
                logits = [head(norm(h[n : n + 1, rows].to(device)))[0].float() for h, (norm, head) in zip(both, heads, strict=True)]
                sums += _compared(logits[0], logits[1], target_T[rows])
                seen += rows.stop - rows.start
            at += 1
            context.progress(seen, total, "tokens")
    nll_first, nll_second, divergence, agreement = (sums / seen).tolist()
    rows_ = [
        row(f"perplexity ({name})", float(np.exp(nll_first)), float(np.exp(nll_second)), ""),
        row(f"loss ({name})", nll_first, nll_second, "nats/token"),
        row(f"KL to the original ({name})", 0.0, divergence, "nats/token"),
        row(f"top-1 agreement ({name})", 1.0, agreement, ""),
    ]
    write_report(context, "quality", rows_, notes=[n for n in (note,) if n], tokens=seen, text=name)


def _compared(first_TV: Tensor, second_TV: Tensor, target_T: Tensor) -> Tensor:
    log_p, log_q = first_TV.log_softmax(-1), second_TV.log_softmax(-1)
    return torch.stack(
        [
            cross_entropy(first_TV, target_T, reduction="none").double().sum(),
            cross_entropy(second_TV, target_T, reduction="none").double().sum(),
            kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).double().sum(),
            (first_TV.argmax(-1) == second_TV.argmax(-1)).double().sum(),
        ]
    ).cpu()
