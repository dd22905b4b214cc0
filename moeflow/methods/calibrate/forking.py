"""Run the hidden states of a model and its forks through decoder layers, and compare the ends: the tensor side of `curves`.

Shapes are suffixes: N sequences, L positions, T tokens, D model width, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import kl_div

from moeflow.arch import Config
from moeflow.methods.records import Curves
from moeflow.model.alternatives import Alternative, alternative_blocks, slices, watched, with_block
from moeflow.model.checkpoint import Tensors, save, tensor_of
from moeflow.model.header import TensorInfo, read_header
from moeflow.model.layout import Files, headers
from moeflow.model.passes import Head, Progress, put, stream_of, taken
from moeflow.model.stream import HIDDEN, States

BASE = "hidden.safetensors"
"""The file with the states of the unchanged model; each fork has a file of its own."""


def first_rows(files: Sequence[Files], rows: Sequence[int], out: Path) -> None:
    """Write the hidden states of the first sequences of several files, `rows` of each, to one file."""
    parts: dict[str, list[Tensor]] = {}
    for file, count in zip(files, rows, strict=True):
        for name, info in headers(file).items():
            size = info.nbytes // info.shape[0]
            part = TensorInfo(info.file, info.dtype, (count, *info.shape[1:]), info.start, info.start + count * size)
            parts.setdefault(name, []).append(tensor_of(file.read(part.file, part.start, part.stop), part))
    save({name: torch.cat(each) for name, each in parts.items()}, out)


class Stage(NamedTuple):
    """One layer that the states run through."""

    layer: int
    file: Path
    alternatives: Mapping[str, Alternative]
    """By the name of their fork."""
    whole: Path | None = None
    """The layer as it was, if `file` is one of its alternatives already, which may lack the block that the others replace."""


@torch.inference_mode()
def through(
    config: Config, before: Mapping[str, Path], stages: Sequence[Stage], out: Path,
    *, batch: int, dtype: str, progress: Progress,
) -> None:  # fmt: skip
    """Write the states behind consecutive layers.

    `before`: the files of the states before them, by the names under which they are written to the folder `out`. Only two forks'
    states are in memory at a time.
    """
    stream = stream_of(config, dtype)
    states = dict(before)
    for at, (layer, file, alternatives, whole) in enumerate(stages):
        tensors = Tensors(file)
        module = stream.layer(tensors, layer)
        for done, name in enumerate([n for n in states if n != BASE]):
            before_fork = load_file(states[name])
            behind: States = {HIDDEN: before_fork[HIDDEN]}
            for rows in slices(count := len(before_fork[HIDDEN]), batch):
                put(behind, stream.run(module, layer, taken(before_fork, rows, stream.device)), rows, count)
            states[name] = _saved(behind, out / name)
            progress(at * len(states) + done + 1, len(stages) * len(states), "forks")
        base = load_file(states[BASE])
        count, behind = len(base[HIDDEN]), {HIDDEN: base[HIDDEN]}
        x_NLD, kept_NLD = torch.empty_like(base[HIDDEN]), torch.empty_like(base[HIDDEN])
        adds = pair = False
        if alternatives and whole is not None:
            tensors = Tensors(whole)
        own = stream.layer(tensors, layer) if alternatives and whole is not None else module
        for rows in slices(count, batch):
            of_rows = taken(base, rows, stream.device)
            if not alternatives:
                put(behind, stream.run(module, layer, of_rows), rows, count)
                continue
            seen = watched(stream, own, layer, of_rows)
            if rows.start == 0:
                adds, pair = seen.adds, seen.pair
            x_NLD[rows] = seen.x_NLD.view(seen.residual_NLD.shape).cpu()
            kept_NLD[rows] = (seen.residual_NLD if adds else of_rows[HIDDEN]).cpu()
            put(behind, seen.behind if own is module else stream.run(module, layer, of_rows), rows, count)
        states[BASE] = _saved(behind, out / BASE)
        del module
        if adds:
            del own
        begun = alternative_blocks(tensors, config, layer, alternatives, device=stream.device, dtype=stream.dtype)
        for name, moe in begun:
            fork_NLD = behind[HIDDEN]  # it is written already
            for rows in slices(count, batch):
                kept_nLD = kept_NLD[rows].to(stream.device)
                if adds:
                    y_nLD = moe(x_NLD[rows].to(stream.device).flatten(0, -2)).view(kept_nLD.shape)
                    fork_NLD[rows] = (kept_nLD + y_nLD).cpu()
                else:  # run the layer again, since it does more with its block's output than add it
                    of_rows = taken(base | {HIDDEN: kept_NLD}, rows, stream.device)
                    fork_NLD[rows] = with_block(stream, own, layer, of_rows, moe, pair=pair).cpu()
            states[name] = _saved(behind, out / name)


def _saved(states: States, path: Path) -> Path:
    save_file(states, path)
    return path


@torch.inference_mode()
def measured(rest: Files, ids: np.ndarray, end: Files, against: Files | None, *, dtype: str, progress: Progress) -> Curves:
    """The mean divergence and loss of every fork, and the unchanged model's loss, over the positions that predict a token: nats.

    `against`: the states of the model from which they diverge, if that is not the unchanged one.
    """
    head, ids_NL = Head(rest, dtype), torch.from_numpy(ids.astype(np.int64))
    names = [n for n in end.names() if n != BASE]
    base_NLD = _states_of(end if against is None else against, BASE)
    curves: dict[int, dict[str, float]] = {}
    losses: dict[int, dict[str, float]] = {}
    plain = own = 0.0
    tokens = ids_NL[:, 1:].numel()
    for done, name in enumerate([BASE, *names]):
        fork_NLD = base_NLD if name == BASE and against is None else _states_of(end, name)
        sums = torch.zeros(2, dtype=torch.float64)
        for base_LD, fork_LD, ids_L in zip(base_NLD[:, :-1], fork_NLD[:, :-1], ids_NL, strict=True):
            for rows, logits in head.by_chunk(fork_LD):
                log_q = logits.log_softmax(-1)
                loss = -log_q.gather(-1, ids_L[1:][rows, None].to(head.device)).double().sum()
                apart = torch.zeros((), dtype=torch.float64)
                if name != BASE or against is not None:
                    log_p = head.logits(base_LD[rows]).log_softmax(-1)
                    apart = kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).double().sum()
                sums += torch.stack([apart.cpu(), loss.cpu()])
        if name == BASE:
            own, plain = (sums / tokens).tolist()
        else:
            _, layer, alternative = name.removesuffix(".safetensors").split(".", 2)
            divergence, mean_loss = (sums / tokens).tolist()
            curves.setdefault(int(layer), {})[alternative] = divergence
            losses.setdefault(int(layer), {})[alternative] = mean_loss
        progress(done + 1, len(names) + 1, "forks")
    return Curves(tokens, plain, curves, losses, own)


def _states_of(end: Files, name: str) -> Tensor:
    info = read_header(name, end.size(name), end.read)["hidden_NLD"]
    return tensor_of(end.read(name, info.start, info.stop), info)
