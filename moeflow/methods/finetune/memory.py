"""How much memory a fine-tuning needs per device, and what its processes send, from configurations alone. No torch.

Memory is an estimate of the peak of an optimizer step; 10 % are added for fragmentation, and on a GPU what its driver takes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from moeflow.arch import Config, Family
from moeflow.methods.finetune.recipe import Gang, Recipe, divisors
from moeflow.methods.finetune.targets import Shapes
from moeflow.model.memory import CONTEXT, MARGIN, bytes_per_token

BUCKET = 500_000_000
"""The default number of elements that DeepSpeed's ZeRO 1 and 2 collect before sending."""


@dataclass(frozen=True)
class Work:
    """What decides a fine-tuning's memory: the shapes of all tensors, layer by layer, and of those that are `trained`."""

    config: Config
    layers: Mapping[int, Shapes]
    rest: Shapes
    trained: Mapping[int | None, Shapes]
    recipe: Recipe
    length: int
    packed: Mapping[int, int] = field(default_factory=dict)
    """The layers whose experts are packed, and how many weights of a row share a scale (0: all)."""

    @property
    def size(self) -> int:
        """Bytes of a weight in the training."""
        return 2 if self.recipe.dtype == "bfloat16" else 4

    @property
    def whole(self) -> int:
        """The weights of the model."""
        return sum(map(_numel, self.layers.values())) + _numel(self.rest)

    @property
    def count(self) -> int:
        """The numbers that are trained: LoRA's factors of a matrix [M, N] have R (M + N), packed experts scales and codes."""
        if self.recipe.mode != "lora":
            return sum(map(_numel, self.trained.values()))
        added = [s for i, each in self.trained.items() for n, s in each.items() if n not in self.itself(i)]
        own = [(s, group or s[-1]) for i, group in self.packed.items() for s in self.itself(i).values()]
        scales = sum(prod(s[:-1]) * -(-s[-1] // group) for s, group in own)
        return sum(min(self.recipe.rank, *s[-2:]) * sum(s[-2:]) for s in added) + scales + self.codes

    @property
    def codes(self) -> int:
        """The codes that are trained: one for each weight of a packed expert."""
        return sum(_numel(self.itself(i)) for i in self.packed) if self.recipe.trains_codes else 0

    def itself(self, layer: int | None) -> Shapes:
        """The packed experts of a layer that are trained themselves, by their scales or codes, not by what is added to them."""
        if layer not in self.packed or self.recipe.mode != "lora" or self.recipe.packed == "beside":
            return {}
        kind = Family.of(self.config).kind
        return {n: s for n, s in self.trained.get(layer, {}).items() if kind(n) == "experts"}

    def made(self, layer: int | None) -> int:
        """Bytes that LoRA's forward pass makes of a layer's trained matrices and keeps for the backward pass: the sums; with codes
        also where they are and their steps, in fp32, how scales change, and the sums before that."""
        if self.recipe.mode != "lora":
            return 0
        of_code = (2 * self.size + 4 + (4 if self.size == 2 else 0)) * self.recipe.trains_codes
        return self.size * _numel(self.trained.get(layer, {})) + of_code * _numel(self.itself(layer))


@dataclass(frozen=True)
class Need:
    """Bytes of one process, on its device and in main memory; `parts` are those of the device."""

    device: int
    host: int
    parts: Mapping[str, int]


def need_of(work: Work, gang: Gang) -> Need:
    """The memory of each process of this gang.

    In mixed precision a trained parameter takes 16 bytes (weight 2, gradient 2, fp32 copy and Adam's moments 12), in fp32 as many
    (4, 4, 8; with ZeRO 1 and 2, which copy the weights, 4 more); a code has its first value and the distance to the next beside
    it. ZeRO divides them (Rajbhandari et al., SC 2020, arXiv 1910.02054, section 5); bf16 is trained with ZeRO 1 at least. Added to
    this are two whole layers if weights are divided, the activations of all layers (of one, with checkpointing), what LoRA makes of
    weights in a forward pass, and the logits; a teacher whose predictions are whole has its head in
    memory, too, in fp32 at most.
    """
    recipe, n = work.recipe, gang.processes
    size, lora = work.size, recipe.mode == "lora"
    layers, touched = ([_numel(s) for s in shapes.values()] for shapes in (work.layers, work.trained))
    largest, whole, trained = max(layers), work.whole, work.count
    zero = max(gang.zero, 1) if size == 2 else gang.zero
    state = (12 if size == 2 or zero in (1, 2) else 8) * trained // (n if zero else 1)
    gradients = size * trained // (n if zero > 1 else 1)
    tokens = gang.micro_of(recipe.batch, work.length) * work.length
    each = [tokens * bytes_per_token(work.config, shapes, size) for shapes in work.layers.values()]
    made = [work.made(layer) for layer in work.trained]
    width, vocabulary = int(work.config["hidden_size"]), int(work.config["vocab_size"])
    parts = {
        "weights": size * (whole + lora * trained + 2 * work.codes) // (n if zero == 3 else 1),
        "gradients": 0 if gang.offload and zero > 1 else gradients,
        "optimizer": 0 if gang.offload else state,
        "buckets": size * min(trained, BUCKET) if zero in (1, 2) else 0,
        "gathered": size * (2 * largest + (0 if lora else max(touched))) if zero == 3 else 0,
        "activations": len(each) * tokens * width * size + max(each) if gang.checkpointing else sum(each),
        "LoRA": 2 * max(made) + (max(made) if gang.checkpointing else sum(made)),
        "logits": tokens * vocabulary * (2 * size + 12 + (16 if recipe.divergence else 0) + (12 if recipe.whole else 0)),
        "the teacher's head": 4 * width * vocabulary if recipe.whole else 0,
    }
    device = int(MARGIN * sum(parts.values())) + (CONTEXT if gang.gpus else 0)
    host = 2 * 4 * largest + (state + 4 * trained // n if gang.offload else 0) + (0 if gang.gpus else device)
    return Need(device, host, parts)


def exchanged(work: Work, gang: Gang) -> int:
    """The bytes that each process of this gang sends the others in the whole training.

    With ZeRO 3 the weights are gathered in each forward and each backward pass, and the gradients of what is trained are divided
    (Rajbhandari et al., section 7); with less of it gradients are added up, and the weights that they change are gathered, once for
    each optimizer step.
    """
    n, recipe = gang.processes, work.recipe
    micro_steps = recipe.batch // (n * gang.micro_of(recipe.batch, work.length))
    passes = 2 + gang.checkpointing
    a_step = micro_steps * (passes * work.whole + work.count) if gang.zero == 3 else 2 * work.count
    return work.size * a_step * recipe.steps * (n - 1) // n


def fitted(work: Work, gang: Gang) -> tuple[Gang, Need]:
    """The gang with the largest micro-batch that fits its devices, and the memory that it needs.

    Raises ValueError if the devices' memory is known and too small; the message says what would fit.
    """
    if not gang.device_memory:
        return gang, need_of(work, gang)
    micros = [gang.micro] if gang.micro else divisors(work.recipe.batch // gang.processes)
    for micro in reversed(micros):
        fitting = replace(gang, micro=micro)
        if (need := need_of(work, fitting)).device <= gang.device_memory:
            return fitting, need
    parts = ", ".join(f"{what} {_gb(size)}" for what, size in need.parts.items() if size >= 0.05e9) or "in parts below 0.1 GB"
    raise ValueError(
        f"training needs {_gb(need.device)} on each of {gang.processes} devices, which have {_gb(gang.device_memory)} ({parts}); "
        + _ways(work, gang)
    )


def _ways(work: Work, gang: Gang) -> str:
    """Words for what would fit, of codes for their scales alone, too."""
    ways = [way] if (way := _way(work, gang)) else []
    if work.codes:
        least, scales = replace(gang, micro=gang.micro or 1), replace(work, recipe=replace(work.recipe, packed="scales"))
        need, what = need_of(scales, least).device, "packed=scales, which trains no codes"
        if need <= gang.device_memory:
            ways.append(f"{what}, needs {_gb(need)}")
        elif way := _way(scales, gang):
            ways.append(f"{what}: {way}")
    less = "fewer targets, a lower rank" if work.recipe.mode == "lora" else "mode='lora' or 'router'"
    return "; ".join(ways) or f"train less of it ({less}), or on larger devices"


def _way(work: Work, gang: Gang) -> str:
    """Words for the smallest change that would make it fit; "" if there is none."""
    least = replace(gang, micro=gang.micro or 1)
    changes: dict[str, Any] = {}
    for name, value in {"zero": 3, "checkpointing": True, "micro": 1, "offload": True}.items():
        if getattr(least, name) != value:
            changes[name] = value
            if (need := need_of(work, replace(least, **changes)).device) <= gang.device_memory:
                return f"{', '.join(f'{n}={v}' for n, v in changes.items())} needs {_gb(need)}"
    for processes in (d for d in divisors(work.recipe.batch) if d > gang.processes):
        if need_of(work, replace(least, **changes, processes=processes)).device <= gang.device_memory:
            return f"{processes} processes with zero=3, checkpointing, micro=1 and offload would fit"
    return ""


def _numel(shapes: Shapes) -> int:
    return sum(prod(shape) for shape in shapes.values())


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"
