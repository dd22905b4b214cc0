"""Take the hidden states of a model and its forks through decoder layers, and compare where they end: the tensor side of `sweep`.

Shapes are suffixes: N sequences, L positions, T tokens, D model width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from moeflow.arch import Config
from moeflow.model.checkpoint import Tensors, read_moe
from moeflow.model.layout import Files, read_config
from moeflow.model.passes import Progress, stream_of

Alternative = list[int] | int | Path
"""The experts that stay; or -1 - e, where expert e alone goes; or another file of the layer."""

TOKENS_AT_ONCE = 1024


@torch.inference_mode()
def through(
    config: Config, hidden: Path, stages: Sequence[tuple[int, Path, Mapping[str, Alternative]]], out: Path,
    *, batch: int, dtype: str, progress: Progress,
) -> None:  # fmt: skip
    """Write the states behind consecutive layers, given as (number, file, alternatives by the name of their fork)."""
    stream = stream_of(config, dtype)
    states: dict[str, Tensor] = load_file(hidden)
    for at, (layer, file, alternatives) in enumerate(stages):
        tensors = Tensors(file)
        module = stream.layer(tensors, layer)
        for done, name in enumerate(n for n in states if n != "hidden_NLD"):
            for part_nLD in states[name].split(batch):
                h_nLD = part_nLD.to(stream.device)
                part_nLD.copy_(module(h_nLD, **stream.arguments(layer, h_nLD)))
            progress(at * len(states) + done + 1, len(stages) * len(states), "forks")
        base_NLD = states["hidden_NLD"]
        x_NLD, residual_NLD = (torch.empty_like(base_NLD) if alternatives else None for _ in range(2))
        for rows in slices(len(base_NLD), batch):
            h_nLD = base_NLD[rows].to(stream.device)
            with watched(module, stream.arch.block) as seen:
                base_NLD[rows] = module(h_nLD, **stream.arguments(layer, h_nLD)).cpu()
            if x_NLD is not None and residual_NLD is not None:
                x_NLD[rows], residual_NLD[rows] = seen["x"].cpu(), seen["residual"].cpu()
        del module
        for name, moe in blocks(tensors, config, layer, alternatives, device=stream.device, dtype=stream.dtype):
            assert x_NLD is not None and residual_NLD is not None
            states[name] = torch.empty_like(base_NLD)
            for rows in slices(len(base_NLD), batch):
                x_nLD = x_NLD[rows].to(stream.device)
                y_nLD = moe(x_nLD.flatten(0, -2)).view(x_nLD.shape)
                states[name][rows] = (residual_NLD[rows].to(stream.device) + y_nLD).cpu()
    save_file(states, out)


@torch.inference_mode()
def measured(rest: Files, ids: np.ndarray, ends: Sequence[Path], *, dtype: str, progress: Progress) -> dict[str, Any]:
    """Mean divergence and loss of every fork, and the loss of the model as it is, over the positions that predict a token."""
    config, tensors = read_config(rest), Tensors(rest)
    stream = stream_of(config, dtype)
    norm, head = stream.final_norm(tensors), stream.head(tensors)
    ids_NL = torch.from_numpy(ids.astype(np.int64))
    sums: dict[str, Tensor] = {}
    plain, seen, first = 0.0, 0, 0
    for done, file in enumerate(ends):
        states = load_file(file)
        for h_LD, ids_L, *forks in zip(
            states["hidden_NLD"], ids_NL[first:], *(states[n] for n in states if n != "hidden_NLD"), strict=False
        ):
            target_T = ids_L[1:].to(stream.device)
            for rows in slices(len(target_T), TOKENS_AT_ONCE):
                goal_TV = head(norm(h_LD[None, :-1][:, rows].to(stream.device)))[0].float()
                log_p = goal_TV.log_softmax(-1)
                plain += float(cross_entropy(goal_TV, target_T[rows], reduction="sum"))
                for name, fork_LD in zip((n for n in states if n != "hidden_NLD"), forks, strict=True):
                    log_q = head(norm(fork_LD[None, :-1][:, rows].to(stream.device)))[0].float().log_softmax(-1)
                    apart = kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
                    loss = -log_q.gather(-1, target_T[rows, None]).squeeze(-1)
                    both = torch.stack([apart.double().sum(), loss.double().sum()]).cpu()
                    sums[name] = sums.get(name, torch.zeros(2, dtype=torch.float64)) + both
            seen += len(target_T)
        first += len(states["hidden_NLD"])
        progress(done + 1, len(ends), "shards")
    curves: dict[str, dict[str, float]] = {}
    losses: dict[str, dict[str, float]] = {}
    for name, both in sums.items():
        _, layer, alternative = name.split(".", 2)
        curves.setdefault(layer, {})[alternative], losses.setdefault(layer, {})[alternative] = (both / seen).tolist()
    return {"tokens": seen, "loss": plain / seen, "curves": curves, "losses": losses}


def blocks(
    tensors: Tensors, config: Config, layer: int, alternatives: Mapping[str, Alternative],
    *, device: torch.device, dtype: torch.dtype,
) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:  # fmt: skip
    """One layer's MoE block as each alternative has it, one after the other; those with fewer experts share their tensors.

    An expert that the layer does not have, or cannot do without, is not left out: its alternative is missing from the answer.
    """
    if not alternatives:
        return
    whole = read_moe(tensors, config, layer).to(device=device, dtype=dtype)
    for name, given in alternatives.items():
        if isinstance(given, Path):
            yield name, read_moe(Tensors(given), config, layer).to(device=device, dtype=dtype)
        elif isinstance(given, int):
            if -1 - given >= whole.num_experts or not whole.router.can_spare(whole.num_experts):
                continue
            # forbidden, not cut out: what is left need not be as many in every group of the router
            allowed_E = torch.ones(whole.num_experts, dtype=torch.bool, device=device)
            allowed_E[-1 - given] = False
            yield name, partial(whole, allowed_E=allowed_E)
        else:
            yield name, whole.keep(given)


@contextmanager
def watched(layer: nn.Module, block: str) -> Iterator[dict[str, Tensor]]:
    """What goes into a decoder layer's MoE block, and the residual stream that its output is added to."""
    seen: dict[str, Tensor] = {}
    norm: nn.Module = layer.post_attention_layernorm  # type: ignore[assignment]
    hooks = [
        norm.register_forward_pre_hook(lambda _, args: seen.__setitem__("residual", args[0])),
        layer.get_submodule(block).register_forward_pre_hook(lambda _, args: seen.__setitem__("x", args[0])),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def slices(rows: int, size: int) -> Iterator[slice]:
    for at in range(0, rows, size):
        yield slice(at, min(at + size, rows))
