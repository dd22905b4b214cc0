"""Run the hidden states of a model and its forks through decoder layers, and compare the ends: the tensor side of a sweep.

Shapes are suffixes: N sequences, L positions, T tokens, D model width, V vocabulary.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from moeflow.arch import Config
from moeflow.methods.calibrate.chains import Forks
from moeflow.methods.records import Candidates, Curves, left_out
from moeflow.model.alternatives import Alternative, Kept, Without, alternative_blocks, slices, watched, with_block
from moeflow.model.checkpoint import Tensors, save, tensor_of
from moeflow.model.header import TensorInfo
from moeflow.model.layout import LAYER, Files, headers
from moeflow.model.moved import arriving
from moeflow.model.passes import Head, at_once, home_of, put, stream_of, taken
from moeflow.model.stream import HIDDEN, States, Stream
from moeflow.step import Artifact

Fork = tuple[int, str]
"""The layer at which a fork begins, and the name of the alternative there."""


def first_rows(files: Sequence[Files], rows: Sequence[int]) -> States:
    """The hidden states of the first sequences of several files, `rows` of each; nothing else of the files is read."""
    parts: dict[str, list[Tensor]] = {}
    for file, count in zip(files, rows, strict=True):
        for name, info in headers(file).items():
            size = info.nbytes // info.shape[0]
            part = TensorInfo(info.file, info.dtype, (count, *info.shape[1:]), info.start, info.start + count * size)
            parts.setdefault(name, []).append(tensor_of(file.read(part.file, part.start, part.stop), part))
    return {name: torch.cat(each) for name, each in parts.items()}


def write_rows(files: Sequence[Files], rows: Sequence[int], out: Path) -> None:
    """Write these hidden states to one file."""
    save(first_rows(files, rows), out)


class Stage(NamedTuple):
    """One layer that the states run through."""

    layer: int
    file: Path | Files
    alternatives: Mapping[str, Alternative]
    whole: Path | Files | None = None
    """The layer as it was, if `file` is one of its alternatives already, which may lack the block that the others replace."""


def begun(which: Forks | None, sources: Sequence[Artifact], only: Collection[str] | None) -> dict[str, Alternative]:
    """The alternatives of a layer, by name; of files `only` those that are named, if not all."""
    if which is None:
        return {}
    if which.kind == "sets":
        counts = Candidates.read(sources[0]).counts
        return {name: Kept(counts[int(name)].best[0].keep) for name in which.names}
    if which.kind == "files":
        from moeflow.sources.elsewhere import weights

        files = zip(which.names, sources, strict=False)
        return {name: weights(artifact, LAYER) for name, artifact in files if only is None or name in only}
    return {name: Without(left_out(name)) for name in which.names}


@torch.inference_mode()
def through(
    config: Config, base: States, stages: Iterable[Stage],
    *, forks: int, batch: int, dtype: str, progress: Callable[[int], None] = lambda _: None,
) -> tuple[Tensor, dict[Fork, Tensor]]:  # fmt: skip
    """The hidden states [N, L, D] behind the last of these consecutive layers, of the unchanged model and of every fork.

    `base`: the unchanged model's states before the first. `forks`: how many will begin; their states stay on the device where they
    fit. One layer's weights are in memory at a time, and those of one alternative; the next stage is asked for meanwhile. At most
    `batch` sequences run together, and as many as there is room for if that is 0. `progress` is told how many layers are done.
    """
    stream = stream_of(config, dtype)
    home = home_of(stream.device, forks * base[HIDDEN].nbytes)
    begun: dict[Fork, States] = {}
    count, length = base[HIDDEN].shape[:2]
    arrived = arriving(((stage, stage.file) for stage in stages), stream.device)
    for done, ((layer, file, alternatives, whole), tensors) in enumerate(arrived, 1):
        module = stream.layer(tensors, layer)
        size = at_once(stream, module, Tensors(whole or file), length, batch, copies=2)
        for fork, before in begun.items():
            behind: States = {HIDDEN: before[HIDDEN]}
            for rows in slices(count, size):
                put(behind, stream.run(module, layer, taken(before, rows, stream.device)), rows, count, home)
            begun[fork] = behind
        if alternatives:
            if whole is not None:
                tensors = Tensors(whole)
            own = module if whole is None else stream.layer(tensors, layer)
            fork_of = _Forking(stream, own, layer, base, size)
            base = fork_of.behind if whole is None else _run(stream, module, layer, base, size)
            del module
            blocks = alternative_blocks(tensors, config, layer, alternatives, device=stream.device, dtype=stream.dtype)
            for name, moe in blocks:
                begun[layer, name] = base | {HIDDEN: fork_of(moe).to(home)}
            del own, fork_of
        else:
            base = _run(stream, module, layer, base, size)
        progress(done)
    return base[HIDDEN], {fork: states[HIDDEN] for fork, states in begun.items()}


class _Forking:
    """What a layer does to the base's states, seen once, so that only another MoE block has to run for each fork."""

    def __init__(self, stream: Stream, module: nn.Module, layer: int, base: States, size: int) -> None:
        self.stream, self.module, self.layer, self.base, self.size = stream, module, layer, base, size
        self.count = len(base[HIDDEN])
        self.x_NLD, self.residual_NLD = torch.empty_like(base[HIDDEN]), torch.empty_like(base[HIDDEN])
        self.behind: States = {}
        self.adds = self.pair = False
        for rows in slices(self.count, size):
            seen = watched(stream, module, layer, taken(base, rows, stream.device))
            if rows.start == 0:
                self.adds, self.pair = seen.adds, seen.pair
            self.x_NLD[rows] = seen.x_NLD.view(seen.residual_NLD.shape).cpu()
            if self.adds:
                self.residual_NLD[rows] = seen.residual_NLD.cpu()
            put(self.behind, seen.behind, rows, self.count)

    def __call__(self, moe: Callable[[Tensor], Tensor]) -> Tensor:
        """The hidden states behind the layer with this MoE block."""
        fork_NLD, device = torch.empty_like(self.x_NLD), self.stream.device
        for rows in slices(self.count, self.size):
            if self.adds:
                residual_nLD = self.residual_NLD[rows].to(device)
                y_nLD = moe(self.x_NLD[rows].to(device).flatten(0, -2)).view(residual_nLD.shape)
                fork_NLD[rows] = (residual_nLD + y_nLD).cpu()
            else:  # run the layer again, since it does more with its block's output than add it
                of_rows = taken(self.base, rows, device)
                fork_NLD[rows] = with_block(self.stream, self.module, self.layer, of_rows, moe, pair=self.pair).cpu()
        return fork_NLD


def _run(stream: Stream, module: nn.Module, layer: int, states: States, size: int) -> States:
    """The states behind a layer, of `size` sequences at a time."""
    behind: States = {}
    count = len(states[HIDDEN])
    for rows in slices(count, size):
        put(behind, stream.run(module, layer, taken(states, rows, stream.device)), rows, count)
    return behind


@torch.inference_mode()
def measured(
    rest: Files, ids: np.ndarray, own_NLD: Tensor, forks: Mapping[Fork, Tensor], against_NLD: Tensor | None, *, dtype: str
) -> Curves:
    """The mean divergence and loss of every fork, and the unchanged model's loss, over the positions that predict a token: nats.

    `own_NLD`: the unchanged model's states behind its last layer; `against_NLD`: those of the model from which the divergence is
    measured, if that is not the unchanged one.
    """
    head, ids_NL = Head(rest, dtype), torch.from_numpy(ids.astype(np.int64))
    goal_NLD, others = own_NLD, dict[Fork | None, Tensor](forks.items())
    if against_NLD is not None:
        goal_NLD, others[None] = against_NLD, own_NLD
    count = len(ids_NL)
    sums = {fork: torch.zeros(count, 2, dtype=torch.float64, device=head.device) for fork in (None, *forks)}
    tokens = ids_NL[:, 1:].numel()
    for n, ids_L in enumerate(ids_NL):
        for rows, goal in head.by_chunk(goal_NLD[n, :-1]):
            log_p, wanted_T1 = goal.log_softmax(-1), ids_L[1:][rows, None].to(head.device)
            if against_NLD is None:
                sums[None][n, 1] -= log_p.gather(-1, wanted_T1).double().sum()
            for fork, fork_NLD in others.items():
                log_q = head.logits(fork_NLD[n, :-1][rows]).log_softmax(-1)
                apart = kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).double().sum()
                sums[fork][n] += torch.stack([apart, -log_q.gather(-1, wanted_T1).double().sum()])
    means = {fork: (each.sum(0) / tokens).tolist() for fork, each in sums.items()}
    each = {fork: tuple(float(f"{x:.6g}") for x in (s[:, 0] * count / tokens).tolist()) for fork, s in sums.items()}
    curves: dict[int, dict[str, float]] = {}
    losses: dict[int, dict[str, float]] = {}
    sequences: dict[int, dict[str, tuple[float, ...]]] = {}
    for layer, name in forks:
        curves.setdefault(layer, {})[name], losses.setdefault(layer, {})[name] = means[layer, name]
        sequences.setdefault(layer, {})[name] = each[layer, name]
    own, plain = means[None]
    return Curves(tokens, plain, curves, losses, own, sequences, each[None])
