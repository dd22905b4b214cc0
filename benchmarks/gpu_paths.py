"""Every tensor path of the methods on a device, beside the same on the processor.

A path is a function that makes its inputs from a seed on the processor, moves them to a place and returns what it computes there.
The reference is the processor in fp64, or in fp32 where the path has products that torch has not in fp64, on the same inputs,
rounded to the precision that is tested. Compared is the relative distance (Frobenius); of what rounds to codes or chooses sets,
the error that it leaves, since at a tie the nearest code may be either. Shapes are suffixes: T tokens, D model width, F expert
width, E experts, k experts a token, S subsets, M rows and N columns of a matrix, L positions.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import MixtralConfig, Qwen3MoeConfig

from benchmarks.gpu_inputs import ARCHS, D, E, F, T, clear_tokens, clearly, drawn, layer
from benchmarks.gpu_model import random_layer, random_rest
from moeflow.methods.decompose.lowrank import components, energies, vanilla
from moeflow.methods.finetune.lora import Addition
from moeflow.methods.finetune.recipe import Recipe
from moeflow.methods.generate.drawing import drawn as tokens_drawn
from moeflow.methods.moments import layer_moments, second_moment
from moeflow.methods.prune import evaluated, genetic, swap
from moeflow.methods.prune.errors import mask_of, squared_errors
from moeflow.methods.prune.gram import Weighed
from moeflow.methods.prune.searches import Search
from moeflow.methods.prune.subsets import Subsets
from moeflow.methods.scores.functions import aimer
from moeflow.methods.slim.awq import awq
from moeflow.methods.slim.gptq import gptq
from moeflow.methods.slim.masks import magnitude, wanda
from moeflow.methods.slim.methods import Slimming
from moeflow.methods.slim.quantized import Quantized
from moeflow.methods.slim.rounding import round_to_nearest
from moeflow.methods.slim.sparsegpt import sparsegpt
from moeflow.model.alternatives import watched, with_block
from moeflow.model.checkpoint import read_moe
from moeflow.model.factors import PLAIN, Form, stacks
from moeflow.model.fewer_active import CompressedExperts, Skip
from moeflow.model.formats import Format
from moeflow.model.moe import MLP, MoELayer
from moeflow.model.moved import arriving
from moeflow.model.observe import OBSERVED, Recorder
from moeflow.model.passes import taken
from moeflow.model.routed_experts import RoutedExperts
from moeflow.model.spec import Recording
from moeflow.model.stream import HIDDEN, Stream
from tests.layers import squared_errors_direct


@dataclass(frozen=True)
class Place:
    """Where a path computes and how precisely. Its inputs are first rounded to the precision that is tested."""

    device: str
    dtype: torch.dtype
    rounded: torch.dtype

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.rounded).to(device=self.device, dtype=self.dtype)

    def layer(self, moe: MoELayer) -> MoELayer:
        return moe.to(dtype=self.rounded).to(device=self.device, dtype=self.dtype)


@dataclass(frozen=True)
class TensorPath:
    """One path, and how far from the reference it may be in fp32 and in bf16."""

    name: str
    work: Callable[[Place], Tensor]
    fp32: float = 1e-4
    bf16: float = 3e-2
    exact: torch.dtype = torch.float64
    """The precision of the reference."""

    def bound(self, dtype: torch.dtype) -> float:
        return self.fp32 if dtype == torch.float32 else self.bf16

    @torch.no_grad()
    def distance(self, device: str, dtype: torch.dtype) -> float:
        """How far the device in this precision is from the reference, relatively."""
        here = self.work(Place(device, dtype, dtype)).detach().cpu().double()
        with patch("torch.cuda.is_available", return_value=False):
            there = self.work(Place("cpu", self.exact, dtype)).detach().double()
        return float(torch.linalg.vector_norm(here - there) / torch.linalg.vector_norm(there).clamp(min=1e-30))


def paths() -> Iterator[TensorPath]:
    """All paths, those that many others stand on first."""
    for model_type in ARCHS:
        # a sparse mixer leaves out experts by a threshold, which rounding may cross
        yield TensorPath(
            f"MoE layer, {model_type}", partial(_layer_output, model_type), bf16=6e-2 if model_type == "phimoe" else 3e-2
        )
    yield TensorPath("MoE layer that weighs inputs", partial(_layer_output, "weighs_input"))
    for model_type in ("mixtral", "qwen2_moe", "deepseek_v2", "deepseek_v3", "phimoe"):
        yield TensorPath(f"errors of subsets, {model_type}", partial(_subset_errors, model_type), bf16=5e-2)
        yield TensorPath(f"errors of subsets from Gram matrices, {model_type}", partial(_weighed, model_type), bf16=5e-2)
    for name, search in SEARCHES.items():
        yield TensorPath(f"{name} search", partial(_search, search), bf16=5e-2)
    yield TensorPath("score of weights (AIMER)", lambda at: aimer(at.layer(layer()), {}, 0))
    yield TensorPath("second moments of a layer", _moments)
    yield TensorPath(
        "tokens drawn from predictions", lambda at: tokens_drawn(at(drawn(9, T, 512)), at(torch.arange(T) / T)).double()
    )
    for name, options in CUTS.items():
        yield TensorPath(f"decomposition, {name}", partial(_cut, **options), 1e-3, 3e-2)
    for name, how in SLIMMINGS.items():
        # the largest weight of a symmetric group lies between two codes, and AWQ scales weights before: the last bit decides
        yield TensorPath(name, partial(_slim, how), 5e-2 if name == "AWQ" else 1e-2, 5e-2)
    for name, make in EXPERTS.items():
        yield TensorPath(f"routed experts, {name}", partial(_routed, make))
    yield TensorPath("routed experts, gradients of ragged ranks", partial(_gradients, EXPERTS["ragged ranks"]), 1e-4, 5e-2)
    yield TensorPath("low-rank addition to a stack (LoRA)", _addition)
    for name, config in CONFIGS.items():
        yield TensorPath(f"embedding, layers and logits, {name}", partial(_stream, config), exact=torch.float32)
        yield TensorPath(f"layers moved from files, {name}", partial(_moved, config), exact=torch.float32)
        yield TensorPath(f"observe, {name}", partial(_observed, config), exact=torch.float32)
        yield TensorPath(f"a layer with another block, {name}", partial(_other_block, config), exact=torch.float32)


def _layer_output(model_type: str, at: Place) -> Tensor:
    moe = layer(model_type)
    return at.layer(moe)(at(clear_tokens(moe)))


def _keep(moe: MoELayer) -> int:
    return E // 2 if moe.router.groups == 1 else 3 * E // 4


def _masks(moe: MoELayer) -> Tensor:

    subsets, random = Subsets(E, _keep(moe), moe.router.groups), Random(0)
    return mask_of([subsets.draw(random) for _ in range(12)], E)


def _subset_errors(model_type: str, at: Place) -> Tensor:
    """By Gram matrices with and without a target of one's own, and by running the layer again."""
    moe = layer(model_type)
    x_TD, mask_SE, there = at(clear_tokens(moe)), _masks(moe).to(at.device), at.layer(moe)
    target_TD = at(drawn(8, T, D))
    plain_S, norm = squared_errors(there, x_TD, mask_SE)
    aimed_S, _ = squared_errors(there, x_TD, mask_SE, target_TD)
    direct_S, _ = squared_errors_direct(there, x_TD, mask_SE)
    return torch.cat([plain_S, aimed_S, direct_S, norm[None]])


def _weighed(model_type: str, at: Place) -> Tensor:
    """Subsets, and all exchanges of one."""
    moe = layer(model_type)
    mask_SE = _masks(moe)
    weighed = Weighed.of(at.layer(moe), at(clear_tokens(moe)).split(T // 2), drop_at_most=E - _keep(moe))
    around_EN = weighed.neighbours(mask_SE[0], torch.ones(E, E + 1, dtype=torch.bool))
    return torch.cat([weighed(mask_SE), around_EN[around_EN.isfinite()]])


SEARCHES: dict[str, Callable[[Weighed], list[Any]]] = {
    "exhaustive": lambda w: evaluated.enumerate_all(w, Subsets(E, E - 2), Search("genetic"), layer=0),
    "genetic": lambda w: genetic.search(w, Subsets(E, E - 5), Search("genetic", population=20, generations=10)),
    "swap": lambda w: swap.search(w, Subsets(E, E - 5), Search("swap")),
}


def _search(search: Callable[[Weighed], list[Any]], at: Place) -> Tensor:
    """The loss of the best subset."""
    moe = layer()
    weighed = Weighed.of(at.layer(moe), [at(clear_tokens(moe))], drop_at_most=5)
    return torch.tensor([search(weighed)[0][1]])


def _moments(at: Place) -> Tensor:
    moe = layer()
    each = layer_moments(at.layer(moe), at(clear_tokens(moe)))
    return torch.cat([s.flatten() for moments in each for by_name in moments.values() for s in by_name.values()])


CUTS: dict[str, dict[str, Any]] = {
    "wide, by inputs": {"shape": (3, 48, 64), "by": "input_moment_NN"},
    "tall, by inputs": {"shape": (3, 64, 48), "by": "input_moment_NN"},
    "wide, by outputs": {"shape": (3, 48, 64), "by": "output_moment_MM"},
    "tall, by outputs, shrunk": {"shape": (3, 64, 48), "by": "output_moment_MM", "shrink": 0.1},
    "steep, which takes fp64": {"shape": (3, 48, 64), "by": "input_moment_NN", "steep": 6.0},
    "by weights alone": {"shape": (3, 64, 48), "by": ""},
}


def moment(columns: int, steep: float = 1.0) -> Tensor:
    """A second moment [N, N] whose directions differ in strength by 10 to the power of `steep`."""
    x_TN = drawn(5, 4 * columns, columns) * torch.logspace(0, -steep / 2, columns)
    return second_moment(x_TN)


def _cut(at: Place, shape: tuple[int, ...], by: str, shrink: float = 0.0, steep: float = 1.0) -> Tensor:
    """The matrix at a third of its rank, and the energies of its components."""
    w_MN, rank = at(drawn(6, *shape)), min(shape[-2:]) // 3
    if not by:
        cut = vanilla(w_MN, rank)
        return torch.cat([cut.whole().double().flatten(), energies(w_MN).flatten()])
    side = shape[-1] if by == "input_moment_NN" else shape[-2]
    moments: dict[str, Any] = {by: moment(side, steep).expand(shape[0], -1, -1).to(at.device)}
    parts = components(w_MN, rank=rank, shrink=shrink, **moments)
    cut, scale = parts.truncated(rank), parts.energy_K.amax()
    return torch.cat([cut.whole().double().flatten(), (parts.energy_K / scale).flatten(), parts.error(rank) / scale.sqrt()])


_how = partial(Slimming, columns=16, group=8)
SLIMMINGS: dict[str, Slimming] = {
    "round to nearest": _how("round_to_nearest"),
    "round to nearest, zero points": _how("round_to_nearest", symmetric=False, packed=False),
    "GPTQ": _how("gptq"),
    "GPTQ, zero points": _how("gptq", symmetric=False, packed=False),
    "GPTQ, activation order": _how("gptq", activation_order=True),
    "SparseGPT, 2:4": _how("sparsegpt", pattern="2:4"),
    "SparseGPT, half": _how("sparsegpt", pattern="0.5"),
    "Wanda, 2:4": _how("wanda", pattern="2:4"),
    "Wanda, half": _how("wanda", pattern="0.5"),
    "magnitude, half": _how("magnitude", pattern="0.5"),
    "AWQ": _how("awq"),
}
CODES: dict[str, Any] = {
    "round_to_nearest": round_to_nearest,
    "gptq": gptq,
    "sparsegpt": sparsegpt,
    "wanda": wanda,
    "magnitude": magnitude,
}


def _slim(how: Slimming, at: Place) -> Tensor:
    """The root of the squared error that each matrix of a batch and a single one leave in their outputs."""
    if how.method == "awq":
        return _awq(how, at)
    w_EMN, moment_NN = at(drawn(9, 3, F, D)), moment(D).to(at.device)
    moment_ENN = moment_NN.expand(3, -1, -1)
    both = [CODES[how.method](w_EMN, moment_ENN, how), CODES[how.method](w_EMN[0], moment_NN, how)]
    made = [m.dequantized() if isinstance(m, Quantized) else m for m in both]
    change_EMN = torch.cat([made[0], made[1][None]]).double() - torch.cat([w_EMN, w_EMN[:1]]).double()
    return ((change_EMN @ moment_NN) * change_EMN).sum((-2, -1)).sqrt()


def _awq(how: Slimming, at: Place) -> Tensor:
    """The root of the squared error that is left in the outputs of each expert, for scaled inputs."""
    moe = layer()
    there, x_TD = at.layer(moe), at(clear_tokens(moe))
    gate, up, down = (torch.stack([e.matrices[i] for e in there.experts]) for i in range(3))  # type: ignore[misc]
    made = awq(gate, up, down, how, inputs=x_TD, weights=there.weights(x_TD))
    kinds = [m.dequantized(torch.float64) for m in (made.gate_EFD, made.up_EFD, made.down_EDF)]
    scaled_TD, exact = x_TD.double() / made.scale_D, there.to(dtype=torch.float64)
    changes = (MLP(*(kind[e] for kind in kinds))(scaled_TD) - exact.experts[e](x_TD.double()) for e in range(E))  # type: ignore[arg-type]
    return torch.stack([torch.linalg.vector_norm(change_TD) for change_TD in changes])


RAGGED, ODD = tuple(32 + 8 * (5 * e % E) for e in range(E)), tuple(8 + 3 * e for e in range(E))
LOW, SOME = Format(E, *((24,) * E,) * 3), tuple(0 if e % 3 == 0 else r for e, r in enumerate(RAGGED))
silu = nn.functional.silu


def _experts(format: Format, form: Form = PLAIN, **more: Any) -> RoutedExperts:
    return RoutedExperts(format, D, F, silu, form=form, **more)


def _skip(rule: str, threshold: float) -> Skip:
    made = Skip(rule, renormalize=True)
    getattr(made, rule).fill_(threshold)
    return made


EXPERTS: dict[str, Callable[[], RoutedExperts]] = {
    "whole": lambda: _experts(Format(E)),
    "equal ranks": lambda: _experts(LOW),
    "ragged ranks": lambda: _experts(Format(E, RAGGED, RAGGED[::-1], RAGGED)),
    "ragged ranks, multiples of nothing": lambda: _experts(Format(E, ODD, ODD[::-1], ODD)),
    "some whole, others ragged": lambda: _experts(Format(E, SOME, SOME, RAGGED)),
    "no gate, biases": lambda: _experts(Format(E, up=SOME, down=SOME), Form(gated=False, biased=True)),
    "skipping": lambda: _experts(LOW, skip=_skip("tail", 0.3)),
    "Compressed Experts": lambda: _experts(
        LOW, compressed=CompressedExperts("three", E, D, F, main=2, ordered=False)
    ),
}  # fmt: skip


def _filled(make: Callable[[], RoutedExperts], at: Place) -> tuple[RoutedExperts, tuple[Tensor, Tensor, Tensor]]:
    """Random experts, and what they are called with: tokens, the experts of each, their weights."""
    experts = make()
    for n, parameter in enumerate(experts.parameters()):
        parameter.data = (drawn(30 + n, *parameter.shape) * 0.2).to(at.rounded)
    moe = layer()
    x_TD = clear_tokens(moe)
    weights_Tk, index_Tk = moe.router.choose(moe.logits(x_TD))
    return experts.to(at.device, at.dtype), (at(x_TD), index_Tk.to(at.device), weights_Tk.to(at.device))


@torch.no_grad()
def _routed(make: Callable[[], RoutedExperts], at: Place) -> Tensor:
    """The outputs, also with as many rows for each expert."""
    experts, inputs = _filled(make, at)
    each = () if experts.compressed or experts.skip else (experts(inputs[0]),)
    return torch.cat([experts(*inputs), *each])


@torch.enable_grad()
def _gradients(make: Callable[[], RoutedExperts], at: Place) -> Tensor:
    experts, inputs = _filled(make, at)
    experts(*inputs).float().square().mean().backward()
    return torch.cat([p.grad.flatten() for p in experts.parameters()])  # type: ignore[union-attr]


def _addition(at: Place) -> Tensor:
    format = Format(E, RAGGED, RAGGED[::-1], RAGGED)
    (stack,) = (s for s in stacks(format) if s.name == "gate_up_in")
    weight, shape = at(drawn(3, *stack.shape(format, D, F))), stack.apart(format, D)
    made = Addition(weight, "x", Recipe(rank=4), shape=shape, joined=partial(stack.joined, format=format))
    with torch.no_grad():
        made.b.copy_(at(drawn(5, *made.b.shape)))
        return made(weight)


KEPT = [0, 2, 3, 5, 6]
"""The experts of a block that is cut."""

_SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_experts_per_tok": 2, "max_position_embeddings": 64, "head_dim": 16,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": MixtralConfig(intermediate_size=F, num_local_experts=8, sliding_window=None, **_SIZES).to_dict(),
    "qwen3_moe": Qwen3MoeConfig(moe_intermediate_size=F, num_experts=8, norm_topk_prob=True, **_SIZES).to_dict(),
}


def _streaming(config: dict[str, Any], at: Place, **more: Any) -> tuple[Stream, dict[str, Tensor], nn.Module]:
    stream = Stream(config, device=at.device, dtype=str(at.dtype).removeprefix("torch."), **more)
    tensors = {n: at(t) for n, t in random_layer(config, scale=0.15).items()}
    return stream, tensors, stream.layer(tensors, 0)


def _states(at: Place) -> dict[str, Tensor]:
    return {HIDDEN: at(drawn(12, 2, 24, D))}


def _clear(config: dict[str, Any], states: Callable[[Place, Stream], dict[str, Tensor]], at: Place) -> Tensor:
    """The positions [N, L] where the layer chooses experts clearly, whole or cut; at others rounding may choose another."""
    here = Place("cpu", torch.float32, at.rounded)
    stream, tensors, module = _streaming(config, here)
    moe = read_moe(tensors, config, 0)
    x_NLD = watched(stream, module, 0, states(here, stream)).x_NLD
    x_TD = x_NLD.flatten(0, 1)
    return (clearly(moe, x_TD) & clearly(moe.keep(KEPT), x_TD)).view(x_NLD.shape[:2]).to(at.device)


def _stream(config: dict[str, Any], at: Place) -> Tensor:
    """The hidden states behind a model's only layer, and their logits."""

    def embedded(there: Place, stream: Stream) -> dict[str, Tensor]:
        rest = {n: there(t) for n, t in random_rest(config).items()}
        return {HIDDEN: stream.embed(rest, torch.arange(48).view(2, 24) % 96)}

    stream, _, module = _streaming(config, at)
    behind_TD = stream.run(module, 0, embedded(at, stream))[HIDDEN][_clear(config, embedded, at)]
    logits = stream.logits({n: at(t) for n, t in random_rest(config).items()})
    return torch.cat([behind_TD.flatten(), logits(behind_TD[None]).flatten()])


def _moved(config: dict[str, Any], at: Place) -> Tensor:
    """The hidden states behind a layer that was moved there while the same one, moved before, computed."""
    stream, tensors, _ = _streaming(config, at)
    behind_NLD, clear_NL = torch.zeros(0), _clear(config, lambda there, _: _states(there), at)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "layer.safetensors"
        save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, file)
        for _, arrived in arriving(((0, file) for _ in range(4)), stream.device):
            behind_NLD = stream.run(stream.layer(arrived, 0), 0, _states(at))[HIDDEN]
    return behind_NLD[clear_NL]


def _observed(config: dict[str, Any], at: Place) -> Tensor:
    """The sums of a recorded layer that no tie of a router changes much, and what it keeps of its inputs."""
    stream, tensors, module = _streaming(config, at, experts=OBSERVED)
    moe = read_moe(tensors, config, 0, experts=False)
    recorder = Recorder(stream.family, moe, Recording(16, per_expert=1))
    with recorder.on(module):
        for rows in (slice(0, 1), slice(1, 2)):
            stream.run(module, 0, taken(_states(at), rows, stream.device))
    kept = recorder.result()
    names = ("score_E", "norm_E", "reap_E", "max_E", "weight_E", "output_sq", "cos_block", "cos_layer")
    return torch.cat([*(kept[n].double().flatten() for n in names), kept["x_RD"][:16].double().flatten()])


def _other_block(config: dict[str, Any], at: Place) -> Tensor:
    stream, tensors, module = _streaming(config, at)
    moe, clear_NL = read_moe(tensors, config, 0).keep(KEPT), _clear(config, lambda there, _: _states(there), at)
    seen = watched(stream, module, 0, _states(at))
    by_hand_NLD = seen.residual_NLD + moe(seen.x_NLD.flatten(0, -2)).view(seen.residual_NLD.shape)
    return torch.cat([by_hand_NLD[clear_NL], with_block(stream, module, 0, _states(at), moe, pair=seen.pair)[clear_NL]])
