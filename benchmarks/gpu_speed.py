"""What takes time on a GPU, at the sizes of real layers: ours, a naive version, and the floor. All numbers are random, in bf16.

The floor is the longer of two times: the bytes that must be read, over the bandwidth that a copy reaches on this device, and the
operations that cannot be left out, over the peak that a matrix product reaches in that precision. Where the naive version takes
long, a part of it is timed and scaled, as its row says. Shapes are suffixes: T tokens, D model width, F expert width, E experts, M
rows and N columns of a matrix, V the experts that a token can reach, S subsets.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DeepseekV2Config, MixtralConfig, Qwen3MoeConfig

from benchmarks.decompose import moment, reference
from benchmarks.gpu_model import random_layer
from benchmarks.slimming import GRID, reference_gptq
from moeflow.arch import Family
from moeflow.methods.decompose.lowrank import components
from moeflow.methods.decompose.ranks import break_even
from moeflow.methods.prune import genetic
from moeflow.methods.prune.errors import mask_of
from moeflow.methods.prune.gram import Weighed
from moeflow.methods.prune.searches import Search
from moeflow.methods.prune.subsets import Subsets
from moeflow.methods.slim.gptq import gptq
from moeflow.methods.slim.methods import Slimming
from moeflow.model import passes
from moeflow.model.checkpoint import Tensors, read_moe
from moeflow.model.formats import Format
from moeflow.model.moe import MoELayer
from moeflow.model.observe import OBSERVED, Recorder
from moeflow.model.routed_experts import RoutedExperts
from moeflow.model.spec import Recording
from moeflow.model.stream import HIDDEN, Stream
from tests.layers import squared_errors_direct

BF16 = torch.bfloat16
LAYERS_READ = 4
"""Layers of the pass over files: the same one again and again."""


@dataclass(frozen=True)
class Size:
    """One layer of a model, and how much of each work is done on it."""

    name: str
    config: dict[str, Any]
    keep: int
    matrices: int  # how many are decomposed and rounded together
    subsets: int = 1024
    tokens: int = 4096
    generations: int = 20
    passed: int = 65_536  # tokens that go through layers read from files, in sequences of at most 2,048

    @property
    def family(self) -> Family:
        return Family.of(self.config)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """D, F, E and the experts of a token."""
        family = self.family
        return int(self.config["hidden_size"]), int(family.expert_size or 0), family.num_experts, family.top_k


def real_sizes() -> list[Size]:
    """The published sizes of one layer of three models."""
    qwen = Qwen3MoeConfig(
        hidden_size=2048, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, num_attention_heads=32,
        num_key_value_heads=4, num_hidden_layers=1, vocab_size=96, norm_topk_prob=True,
    )  # fmt: skip
    mixtral = MixtralConfig(
        hidden_size=4096, intermediate_size=14336, num_local_experts=8, num_experts_per_tok=2, num_attention_heads=32,
        num_key_value_heads=8, num_hidden_layers=1, vocab_size=96, sliding_window=None,
    )  # fmt: skip
    deepseek = DeepseekV2Config(
        hidden_size=2048, moe_intermediate_size=1408, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6,
        num_attention_heads=16, num_key_value_heads=16, kv_lora_rank=512, q_lora_rank=None, qk_rope_head_dim=64,
        qk_nope_head_dim=128, v_head_dim=128, first_k_dense_replace=0, num_hidden_layers=1, vocab_size=96, n_group=1, topk_group=1,
        topk_method="greedy", norm_topk_prob=False,
    )  # fmt: skip
    return [
        Size("Qwen3-30B-A3B", qwen.to_dict() | {"head_dim": 128}, keep=96, matrices=32),
        Size("DeepSeek-V2-Lite", deepseek.to_dict(), keep=48, matrices=16),
        Size("Mixtral-8x7B", mixtral.to_dict(), keep=4, matrices=2, subsets=70),
    ]


def small_sizes() -> list[Size]:
    """A layer that a processor runs in moments."""
    config = Qwen3MoeConfig(
        hidden_size=64, moe_intermediate_size=48, num_experts=16, num_experts_per_tok=2, num_attention_heads=4,
        num_key_value_heads=2, num_hidden_layers=1, vocab_size=96, norm_topk_prob=True,
    )  # fmt: skip
    few: dict[str, int] = {"subsets": 16, "tokens": 64, "generations": 2, "passed": 256}
    return [Size("small", config.to_dict() | {"head_dim": 16}, keep=12, matrices=2, **few)]


@dataclass(frozen=True)
class Peaks:
    """What this device reaches: bytes a second of a copy, operations a second of a product in each precision."""

    bandwidth: float
    operations: dict[torch.dtype, float]

    @staticmethod
    def of(clock: "Clock", *, small: bool) -> "Peaks":
        source = torch.ones(1 << (22 if small else 30), dtype=torch.uint8, device=clock.device)
        target = torch.empty_like(source)
        bandwidth = 2 * source.nbytes / clock.best(lambda: target.copy_(source))
        side, operations = 128 if small else 8192, {}
        for dtype in (BF16, torch.float32):
            a_NN = torch.ones(side, side, dtype=dtype, device=clock.device)
            operations[dtype] = 2 * side**3 / clock.best(lambda a_NN=a_NN: a_NN @ a_NN)  # type: ignore[misc]
        return Peaks(bandwidth, operations)

    def floor(self, *, nbytes: float = 0, operations: float = 0, dtype: torch.dtype = BF16) -> float:
        """The seconds that this many bytes and operations take at least."""
        return max(nbytes / self.bandwidth, operations / self.operations[dtype])


@dataclass(frozen=True)
class Clock:
    """Times work on a device, whose work is waited for."""

    device: str
    most: float = 3.0
    """Seconds after which no further round begins."""

    def wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    def once(self, work: Callable[[], object]) -> float:
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def rounds(self, work: Callable[[], object], rounds: int = 7) -> list[float]:
        """The seconds of each round after one that does not count; fewer rounds if they take long."""
        self.once(work)
        taken, start = [self.once(work)], time.perf_counter()
        while len(taken) < rounds and time.perf_counter() - start < self.most:
            taken.append(self.once(work))
        return taken

    def best(self, work: Callable[[], object]) -> float:
        return min(self.rounds(work))

    def median(self, work: Callable[[], object]) -> float:
        return statistics.median(self.rounds(work))


@dataclass(frozen=True)
class Timed:
    """One row: seconds of ours, of the naive version, and of the floor."""

    what: str
    ours: float
    naive: float
    floor: float
    against: str

    def line(self, name: str) -> str:
        cells = (name, self.what, seconds(self.ours), seconds(self.naive), f"{self.naive / self.ours:.3g}", seconds(self.floor))
        return f"| {' | '.join(cells)} | {self.ours / self.floor:.3g} | {self.against} |"


def seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} µs"


Work = Callable[[Size, "Clock", Peaks], Iterator[Timed]]


def low_rank_forward(size: Size, clock: Clock, peaks: Peaks) -> Iterator[Timed]:
    """RoutedExperts at half the break-even rank, or unevenly around it, beside transformers' fused experts."""
    d, f, e, k = size.shape
    rank = max(1, int(break_even(f, d) / 2))
    uneven = tuple(max(1, rank * (50 + 100 * i // max(1, e - 1)) // 100) for i in range(e))
    dense, act = _dense_experts(size, clock), nn.functional.silu
    formats = {
        "equal ranks": Format(e, *((rank,) * e,) * 3),
        "uneven ranks": Format(e, *(uneven,) * 3),
    }
    low = {name: _filled(RoutedExperts(format, d, f, act), clock) for name, format in formats.items()}
    for tokens in (size.tokens, 16, 1):
        x_TD = _random(clock, 1, tokens, d)
        weights_Tk, index_Tk = torch.rand(tokens, e, device=clock.device).softmax(-1).topk(k)
        naive = clock.median(partial(dense, x_TD, index_Tk, weights_Tk))
        chosen_E = index_Tk.unique().tolist()
        for name, experts in low.items():
            ranks = formats[name].ranks("up")
            nbytes = sum(2 * 3 * ranks[i] * (d + f) for i in chosen_E)
            operations = sum(2 * 3 * ranks[i] * (d + f) for i in index_Tk.flatten().tolist())
            ours = clock.median(partial(experts, x_TD, index_Tk, weights_Tk))
            floor = peaks.floor(nbytes=nbytes, operations=operations)
            yield Timed(f"low-rank forward, {tokens:,} tokens, {name}", ours, naive, floor, "transformers' whole experts")


def observe(size: Size, clock: Clock, peaks: Peaks) -> Iterator[Timed]:
    """A layer with everything recorded, beside the layer and every expert on every token."""
    d, f, _, k = size.shape
    tensors = random_layer(size.config, device=clock.device, dtype=BF16)
    stream = Stream(size.config, device=clock.device, dtype="bfloat16", experts=OBSERVED)
    module, moe = stream.layer(tensors, 0), read_moe(tensors, size.config, 0)
    plain = Stream(size.config, device=clock.device, dtype="bfloat16")
    bare, head = plain.layer(tensors, 0), read_moe(tensors, size.config, 0, experts=False)
    states = {HIDDEN: _random(clock, 2, size.tokens, d).view(4, -1, d)}

    def ours() -> None:
        recorder = Recorder(stream.family, head, Recording(size.tokens // 4))
        with recorder.on(module):
            stream.run(module, 0, states)

    def naive() -> None:
        out_TD = plain.run(bare, 0, states)[HIDDEN].flatten(0, 1)
        for expert in moe.experts:
            torch.linalg.vector_norm(expert(out_TD), dim=-1)

    operations = 2 * size.tokens * (3 * d * f * k + sum(t.numel() for n, t in tensors.items() if ".experts." not in n))
    floor = peaks.floor(nbytes=sum(t.nbytes for t in tensors.values()), operations=operations)
    against = "the layer, then every expert on every token"
    yield Timed(f"observe, {size.tokens:,} tokens", clock.median(ours), clock.median(naive), floor, against)


def pass_over_files(size: Size, clock: Clock, peaks: Peaks) -> Iterator[Timed]:
    """A shard through layers that are read from files, beside four sequences at a time whose states go through main memory.

    The files lie in the page cache after the first round. The floor counts weights and states as read once from the device's own
    memory, so that what moving the weights there takes is above it.
    """
    d, f, _, k = size.shape
    count, length = LAYERS_READ, min(2048, size.passed // 8)
    tensors = {n: t.cpu() for n, t in random_layer(size.config, device=clock.device, dtype=BF16).items()}
    states_NLD = _random(clock, 6, size.passed // length, length, d).cpu()

    with tempfile.TemporaryDirectory() as name:
        file, start, end = (Path(name) / n for n in ("layer.safetensors", "start", "end"))
        save_file(tensors, file)
        save_file({HIDDEN: states_NLD}, start)
        stream = Stream(size.config, device=clock.device, dtype="bfloat16")

        def ours() -> None:
            files = ((0, file) for _ in range(count))
            how: dict[str, Any] = {"count": count, "batch": 0, "dtype": "bfloat16"}
            passes.through(size.config, start, files, end, progress=lambda *_: None, **how)

        def naive() -> None:
            behind_NLD = states_NLD
            for _ in range(count):
                module = stream.layer(Tensors(file), 0)
                parts = [stream.run(module, 0, {HIDDEN: part.to(clock.device)})[HIDDEN].cpu() for part in behind_NLD.split(4)]
                behind_NLD = torch.cat(parts)

        operations = 2 * size.passed * (3 * d * f * k + sum(t.numel() for n, t in tensors.items() if ".experts." not in n))
        nbytes = sum(t.nbytes for t in tensors.values()) + 2 * states_NLD.nbytes
        floor = peaks.floor(nbytes=count * nbytes, operations=count * operations)
        what = f"{size.passed:,} tokens through {count} layers read from files"
        yield Timed(what, clock.median(ours), clock.median(naive), floor, "4 sequences at a time, states through main memory")


def search(size: Size, clock: Clock, peaks: Peaks) -> Iterator[Timed]:
    """Many subsets of a layer's experts, then a genetic search, beside running the layer again for each."""
    d, f, e, k = size.shape
    moe = read_moe(random_layer(size.config, device=clock.device, dtype=BF16), size.config, 0)
    tokens, drop = size.tokens // 2, e - size.keep
    x_TD, subsets = _random(clock, 3, tokens, d), Subsets(e, size.keep, moe.router.groups)
    random = Random(0)
    mask_SE = mask_of([subsets.draw(random) for _ in range(size.subsets)], e, clock.device)
    one = clock.median(lambda: squared_errors_direct(moe, x_TD, mask_SE[:1])) / 2  # it also runs the whole layer
    vectors = min(e, k + drop)
    prepared = 2 * tokens * vectors * (3 * d * f)
    gram = 4 * tokens * vectors**2
    name = f"{size.subsets:,} subsets of {size.keep} experts, {tokens:,} tokens"
    ours = clock.median(lambda: _weighed(moe, x_TD, drop)(mask_SE))
    yield Timed(
        f"search, {name}",
        ours,
        one * size.subsets,
        peaks.floor(operations=prepared),
        "the layer again for each (one timed, scaled)",
    )
    weighed, how = _weighed(moe, x_TD, drop), Search("genetic", population=min(50, size.subsets // 2), generations=size.generations)
    ours = clock.median(lambda: genetic.search(weighed, subsets, how))
    runs = how.population + (how.generations - 1) * (how.population - how.survivors)
    floor = peaks.floor(nbytes=gram * how.generations)
    against = f"the layer again for each of {runs:,} individuals (one timed, scaled)"
    yield Timed(f"genetic search, {how.generations} generations of {how.population}", ours, one * runs, floor, against)


def svd(size: Size, clock: Clock, peaks: Peaks) -> Iterator[Timed]:
    """Whitened decomposition of several experts' matrices beside a Cholesky factor and a full SVD of each."""
    d, f, *_ = size.shape
    count, rank = size.matrices, max(1, int(break_even(f, d) / 2))
    w_EMN, moment_NN = _random(clock, 4, count, f, d).float() * 0.02, moment(d).to(clock.device)
    moment_ENN = moment_NN.expand(count, -1, -1)
    ours = clock.median(lambda: components(w_EMN, rank=rank, input_moment_NN=moment_ENN).truncated(rank))
    naive = clock.once(lambda: reference(w_EMN[0], moment_NN)) * count
    side = min(f, d)
    operations = count * (side * d * d + side * side * d + 10 / 3 * side**3 + (2 * f * side * side if f > d else 0))
    floor = peaks.floor(operations=operations, dtype=torch.float32)
    what = f"SVD of {count} of {f:,} by {d:,} at rank {rank}"
    yield Timed(what, ours, naive, floor, "Cholesky and full SVD (one timed, scaled)")


def rounding(size: Size, clock: Clock, peaks: Peaks) -> Iterator[Timed]:
    """GPTQ on several experts' matrices beside the papers' loop over columns."""
    d, f, *_ = size.shape
    count, group = size.matrices, min(GRID.group, d)
    how = Slimming("gptq", bits=GRID.bits, group=group)
    w_EMN, moment_NN = _random(clock, 5, count, f, d).float() * 0.02, moment(d).to(clock.device)
    moment_ENN = moment_NN.expand(count, -1, -1).contiguous()
    ours = clock.median(lambda: gptq(w_EMN, moment_ENN, how))
    naive = clock.once(lambda: reference_gptq(w_EMN[0], moment_NN)) * count
    floor = peaks.floor(nbytes=count * 9 * f * d, operations=count * (d**3 / 3 + f * d * d), dtype=torch.float32)
    yield Timed(f"GPTQ of {count} of {f:,} by {d:,}", ours, naive, floor, "the papers' loop (one timed, scaled)")


WORKS: dict[str, tuple[Work, float]] = {
    "low-rank forward": (low_rank_forward, 20),
    "observe": (observe, 20),
    "pass over files": (pass_over_files, 60),
    "search": (search, 40),
    "GPTQ": (rounding, 40),
    "SVD": (svd, 60),
}
"""Each kind of work, and the seconds that it may take at real sizes: with less left it is not begun."""


def _weighed(moe: MoELayer, x_TD: Tensor, drop: int) -> Weighed:
    return Weighed.of(moe, [x_TD], drop_at_most=drop)


def _random(clock: Clock, seed: int, *shape: int) -> Tensor:
    draw = torch.Generator(clock.device).manual_seed(seed)
    return torch.randn(*shape, generator=draw, device=clock.device, dtype=BF16)


def _filled(experts: RoutedExperts, clock: Clock) -> RoutedExperts:
    experts = experts.to(clock.device, BF16)
    for parameter in experts.parameters():
        parameter.data.normal_(std=0.02)
    return experts.eval()


def _dense_experts(size: Size, clock: Clock) -> nn.Module:
    """Transformers' fused experts of the layer."""
    stream = Stream(size.config, device=clock.device, dtype="bfloat16")
    module = stream.layer(random_layer(size.config, device=clock.device, dtype=BF16), 0)
    return module.get_submodule(f"{size.family.arch.block}.experts")
