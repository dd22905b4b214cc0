"""Run the hidden states of a model and its forks through decoder layers, and compare the ends: the tensor side of `curves`.

Shapes are suffixes: N sequences, L positions, T tokens, D model width, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import kl_div

from moeflow.arch import Config
from moeflow.methods.records import Curves
from moeflow.model.alternatives import Alternative, alternative_blocks, slices, watched
from moeflow.model.checkpoint import Tensors, save, tensor_of
from moeflow.model.header import TensorInfo, read_header
from moeflow.model.layout import Files, headers
from moeflow.model.passes import Head, Progress, stream_of

BASE = "hidden.safetensors"
"""The file with the states of the unchanged model; each fork has a file of its own."""


def first_rows(files: Sequence[Files], taken: Sequence[int], out: Path) -> None:
    """Write the hidden states of the first sequences of several files, `taken` of each, to one file."""
    parts = []
    for file, count in zip(files, taken, strict=True):
        info = headers(file)["hidden_NLD"]
        size = info.nbytes // info.shape[0]
        part = TensorInfo(info.file, info.dtype, (count, *info.shape[1:]), info.start, info.start + count * size)
        parts.append(tensor_of(file.read(part.file, part.start, part.stop), part))
    save({"hidden_NLD": torch.cat(parts)}, out)


@torch.inference_mode()
def through(
    config: Config, before: Mapping[str, Path], stages: Sequence[tuple[int, Path, Mapping[str, Alternative]]], out: Path,
    *, batch: int, dtype: str, progress: Progress,
) -> None:  # fmt: skip
    """Write the states behind consecutive layers: `stages` of (number, file, alternatives by the name of their fork).

    `before`: the files of the states before them, by the names under which they are written to the folder `out`. Only two forks'
    states are in memory at a time.
    """
    stream = stream_of(config, dtype)
    states = dict(before)
    for at, (layer, file, alternatives) in enumerate(stages):
        tensors = Tensors(file)
        module = stream.layer(tensors, layer)
        for done, name in enumerate([n for n in states if n != BASE]):
            states_NLD = load_file(states[name])["hidden_NLD"]
            for part_nLD in states_NLD.split(batch):
                h_nLD = part_nLD.to(stream.device)
                part_nLD.copy_(module(h_nLD, **stream.arguments(layer, h_nLD)))
            states[name] = _saved(states_NLD, out / name)
            progress(at * len(states) + done + 1, len(stages) * len(states), "forks")
        base_NLD = load_file(states[BASE])["hidden_NLD"]
        x_NLD, residual_NLD = torch.empty_like(base_NLD), torch.empty_like(base_NLD)
        for rows in slices(len(base_NLD), batch):
            h_nLD = base_NLD[rows].to(stream.device)
            with watched(module, stream.family) as block:
                base_NLD[rows] = module(h_nLD, **stream.arguments(layer, h_nLD)).cpu()
            if alternatives:
                x_NLD[rows], residual_NLD[rows] = block["x"].cpu(), block["residual"].cpu()
        states[BASE] = _saved(base_NLD, out / BASE)
        del module
        begun = alternative_blocks(tensors, config, layer, alternatives, device=stream.device, dtype=stream.dtype)
        for name, moe in begun:
            for rows in slices(len(base_NLD), batch):
                x_nLD = x_NLD[rows].to(stream.device)
                y_nLD = moe(x_nLD.flatten(0, -2)).view(x_nLD.shape)
                base_NLD[rows] = (residual_NLD[rows].to(stream.device) + y_nLD).cpu()
            states[name] = _saved(base_NLD, out / name)


def _saved(states_NLD: Tensor, path: Path) -> Path:
    save_file({"hidden_NLD": states_NLD}, path)
    return path


@torch.inference_mode()
def measured(rest: Files, ids: np.ndarray, end: Files, *, dtype: str, progress: Progress) -> Curves:
    """The mean divergence and loss of every fork, and the unchanged model's loss, over the positions that predict a token: nats."""
    head, ids_NL = Head(rest, dtype), torch.from_numpy(ids.astype(np.int64))
    names = [n for n in end.names() if n != BASE]
    base_NLD = _states_of(end, BASE)
    curves: dict[int, dict[str, float]] = {}
    losses: dict[int, dict[str, float]] = {}
    plain, tokens = 0.0, ids_NL[:, 1:].numel()
    for done, name in enumerate([BASE, *names]):
        fork_NLD = base_NLD if name == BASE else _states_of(end, name)
        sums = torch.zeros(2, dtype=torch.float64)
        for base_LD, fork_LD, ids_L in zip(base_NLD[:, :-1], fork_NLD[:, :-1], ids_NL, strict=True):
            for rows, logits in head.by_chunk(fork_LD):
                log_q = logits.log_softmax(-1)
                loss = -log_q.gather(-1, ids_L[1:][rows, None].to(head.device)).double().sum()
                apart = torch.zeros((), dtype=torch.float64)
                if name != BASE:
                    log_p = head.logits(base_LD[rows]).log_softmax(-1)
                    apart = kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).double().sum()
                sums += torch.stack([apart.cpu(), loss.cpu()])
        if name == BASE:
            plain = float(sums[1]) / tokens
        else:
            _, layer, alternative = name.removesuffix(".safetensors").split(".", 2)
            divergence, mean_loss = (sums / tokens).tolist()
            curves.setdefault(int(layer), {})[alternative] = divergence
            losses.setdefault(int(layer), {})[alternative] = mean_loss
        progress(done + 1, len(names) + 1, "forks")
    return Curves(tokens, plain, curves, losses)


def _states_of(end: Files, name: str) -> Tensor:
    info = read_header(name, end.size(name), end.read)["hidden_NLD"]
    return tensor_of(end.read(name, info.start, info.stop), info)
