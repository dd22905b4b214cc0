"""What a fine-tuning computes and how it is run: `Recipe` is part of the key of its step, `Gang` never is. No torch."""

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, cast

from moeflow.methods.finetune.targets import TARGETS, Mode, Target
from moeflow.options import check_choices, only

Packed = Literal["beside", "scales", "codes", "auto"]

CODES = 2_000_000_000
"""Weights of packed experts up to which their codes are trained where nothing is said: some 32 bytes each, so 64 GB."""

TOKENS_AT_ONCE = 16_384
"""Tokens of a micro-batch if nothing else decides: plenty for a large model; more would only cost memory."""


@dataclass(frozen=True)
class Recipe:
    """What one fine-tuning computes. Raises ValueError for invalid options."""

    mode: Mode = "lora"
    """What is trained: low-rank additions to the targets, everything, experts, routers, or the vectors of Compressed Experts."""
    loss: Literal["lm", "kl", "both"] = "lm"
    """Predict the text, predict what a teacher predicts (KL divergence; with mode router this is Router-KD), or both."""
    mix: float = 0.5
    """The weight of the KL divergence in the loss, if the loss is both."""
    top: int = 64
    """How many likeliest tokens the teacher's predictions keep at each position; all others count as one. 0: the whole predictions,
    made while the student trains from the teacher's last hidden states, by its head, which is in memory then, too."""
    targets: tuple[Target, ...] = ("attention", "experts")
    """What LoRA is added to: any of attention, router, experts, shared, dense."""
    rank: int = 16
    """The rank of LoRA's additions."""
    alpha: float | None = None
    """Additions are scaled by alpha / rank; none: alpha is twice the rank."""
    epochs: float = 1.0
    """How often every row is used."""
    steps: int = 0
    """Optimizer steps, instead of epochs; 0: as many as the epochs need."""
    batch: int = 64
    """Sequences of one optimizer step, over all processes."""
    rate: float = 1e-4
    """The highest learning rate of AdamW."""
    warmup: float = 0.03
    """The fraction of the steps over which the rate rises from zero; then it falls along a cosine."""
    floor: float = 0.0
    """The final rate, as a fraction of the highest."""
    decay: float = 0.0
    """AdamW's weight decay, for matrices only."""
    clip: float = 1.0
    """The norm to which the gradient is clipped; 0: it is not clipped."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the two moments."""
    epsilon: float = 1e-8
    """AdamW's epsilon."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The precision of the training (bfloat16 trains a copy in fp32); auto: the checkpoint's own."""
    every: int = 0
    """Optimizer steps between two validations; 0: only before the first and after the last."""
    keep: Literal["best", "last"] = "best"
    """Which state is kept: the one with the lowest mean validation loss, or the last."""
    keep_zeros: bool | None = None
    """Keep experts' zero weights at zero; none: if the experts were made sparse."""
    packed: Packed = "beside"
    """What LoRA trains of packed experts: factors that are kept beside them, or their scales, or scales and codes; the latter take
    no bytes. auto: codes, too, of up to two billion weights, and scales alone of more."""
    seed: int = 0
    """The seed of the rows' order and LoRA's first factors."""
    adapter: bool = False
    """Also leave LoRA's additions as an adapter in PEFT's format, in the folder `adapter` of what finetune.train stores."""

    def __post_init__(self) -> None:
        check_choices(self)
        for target in self.targets:
            if target not in TARGETS:
                raise ValueError(f"target {target!r} is not known; choose of {', '.join(TARGETS)}")
        if self.adapter and self.mode != "lora":
            raise ValueError(
                f"adapter=true writes what LoRA adds, and mode={self.mode!r} trains the weights themselves; leave it away"
            )
        if self.steps < 0 or self.batch < 1 or (not self.steps and self.epochs <= 0):
            raise ValueError(f"steps={self.steps} or epochs={self.epochs:g} of batch={self.batch}: none may be 0 or less")
        if not 0 < self.rate < 1:
            raise ValueError(f"rate={self.rate} must lie between 0 and 1; 1e-5 to 1e-3 are usual")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup={self.warmup} is a part of the steps, from 0 to below 1")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor={self.floor} must lie between 0 and 1")
        if self.loss == "both" and not 0 < self.mix < 1:
            raise ValueError(f"mix={self.mix}: of both losses each has a part, so it lies between 0 and 1; or choose loss=lm or kl")
        if self.decay < 0 or self.clip < 0 or self.epsilon <= 0:
            raise ValueError(f"decay={self.decay}, clip={self.clip}: none may be negative, and epsilon={self.epsilon} not 0 either")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas={list(self.betas)} must be two numbers from 0 to below 1; (0.9, 0.999) are usual")
        if self.every < 0 or (self.steps and self.every > self.steps):
            raise ValueError(f"every={self.every} must lie between 1 and the {self.steps} steps; 0 validates at the end alone")
        if self.mode == "lora" and (self.rank < 1 or self.scale <= 0 or not self.targets):
            raise ValueError(f"rank={self.rank}, alpha={self.alpha}, targets={list(self.targets)}: LoRA needs all three")

    @property
    def whole(self) -> bool:
        """Whether the loss needs a teacher's whole predictions."""
        return bool(self.divergence) and not self.top

    @property
    def divergence(self) -> float:
        """The weight of the KL divergence in the loss; the loss on the text has the rest."""
        return {"lm": 0.0, "kl": 1.0, "both": self.mix}[self.loss]

    @property
    def beside(self) -> bool:
        """Whether factors are left beside packed experts."""
        return self.mode == "lora" and "experts" in self.targets and self.packed == "beside"

    @property
    def trains_codes(self) -> bool:
        """Whether the codes of packed experts are trained, of which each weight has one."""
        return self.mode == "lora" and "experts" in self.targets and self.packed == "codes"

    @property
    def operations(self) -> int:
        """Operations for each weight and token: 2 of a forward pass, 2 of gradients of activations, 2 of those of all weights."""
        return 6 if self.mode == "full" or self.trains_codes else 4

    @property
    def scale(self) -> float:
        """The factor that LoRA's additions are multiplied by."""
        return 2.0 if self.alpha is None else self.alpha / self.rank

    @property
    def warm_steps(self) -> int:
        """The optimizer steps over which the rate rises."""
        return round(self.warmup * self.steps)

    def steps_of(self, rows: int) -> int:
        """The optimizer steps for this many rows of data. Raises ValueError if there is none."""
        steps = self.steps or round(self.epochs * rows / self.batch)
        if not steps:
            raise ValueError(f"epochs={self.epochs:g} of {rows} rows in batches of {self.batch} make no step; say steps=1")
        return steps

    def settled(self, *, rows: int, dtype: str, sparse: bool, validated: bool, packed: int = 0) -> "Recipe":
        """The recipe with all choices made and fields without effect at their defaults: one training has one key.

        `rows` of data; `dtype` of the training; `sparse`: experts are sparse; `validated`: there is validation text; `packed`:
        how many weights packed experts have.
        """
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f"dtype={dtype!r}: a model is trained in one of float32, bfloat16, whatever its checkpoint has; give one, as in -p "
                "tune.dtype=float32, or -p recover.dtype=float32 of a fit"
            )
        steps = self.steps_of(rows)
        settled = replace(
            self,
            steps=steps,
            warmup=round(self.warmup * steps) / steps,
            dtype=cast(Any, dtype),
            every=self.every if validated and self.every != steps else 0,
            keep=self.keep if validated else "last",
            keep_zeros=sparse if self.keep_zeros is None else self.keep_zeros,
            packed=self.packed if self.packed != "auto" else "codes" if packed <= CODES else "scales",
            targets=tuple(t for t in TARGETS if t in self.targets),
        )
        unused = {"epochs"}
        unused |= {"mix"} if self.loss != "both" else set()
        unused |= {"top"} if self.loss == "lm" else set()
        unused |= set() if packed and self.mode == "lora" and "experts" in self.targets else {"packed"}
        unused |= {"targets", "rank", "alpha"} if self.mode != "lora" else {"alpha"} if self.scale == 2 else set()
        return only(settled, *({f.name for f in fields(self)} - unused))

    def rate_at(self, step: int) -> float:
        """The learning rate of the optimizer step with this number, from 0 on."""
        if step < self.warm_steps:
            return self.rate * (step + 1) / self.warm_steps
        part = (step - self.warm_steps) / (self.steps - self.warm_steps)
        return self.rate * (self.floor + (1 - self.floor) * (1 + math.cos(math.pi * part)) / 2)


@dataclass(frozen=True)
class Gang:
    """How and where a fine-tuning runs. Never part of a key, since it changes only the order in which numbers are added.

    In bf16 the number of micro-batches matters too: DeepSpeed adds their gradients in bf16.
    """

    processes: int = 1
    """Processes that divide the work."""
    gpus: float = 1.0
    """GPUs of each process; on a cluster without GPUs it uses only CPUs."""
    cpus: float = 1.0
    """CPUs of each process."""
    zero: Literal[0, 1, 2, 3] = 2
    """What ZeRO divides between the processes: nothing, the optimizer's state, gradients too, weights too."""
    micro: int = 0
    """Sequences that a process takes at once; 0: as many as fit into device_memory, or as make 16,384 tokens."""
    offload: bool = False
    """Keep the optimizer's state in main memory."""
    checkpointing: bool = False
    """Compute a layer's activations again in the backward pass, to save memory."""
    save_every: int = 50
    """Optimizer steps between two snapshots, from which an interrupted run continues."""
    device_memory: float = 0
    """Memory of each process's device, in bytes; 0: unknown, and nothing is refused."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Further settings of a DeepSpeed configuration, as DeepSpeed spells them."""

    def __post_init__(self) -> None:
        if self.processes < 1 or self.save_every < 1:
            raise ValueError(f"processes={self.processes} and save_every={self.save_every} must be at least 1")
        if self.zero not in range(4):
            raise ValueError(f"zero={self.zero} is no stage of ZeRO; choose 0, 1, 2 or 3")
        if self.offload and not self.zero:
            raise ValueError("offload=True needs ZeRO, and zero=0; choose zero=1, 2 or 3")
        if self.micro < 0 or self.device_memory < 0:
            raise ValueError(f"micro={self.micro} and device_memory={self.device_memory} must not be negative")

    def check(self, batch: int) -> None:
        """Raise ValueError if this gang cannot take `batch` sequences in one optimizer step."""
        each, left = divmod(batch, self.processes)
        if left:
            near = f"{batch - left} or {batch - left + self.processes}" if each else f"{self.processes}"
            raise ValueError(f"batch={batch} cannot be divided between {self.processes} processes; nearest: {near}")
        if self.micro and each % self.micro:
            raise ValueError(
                f"micro={self.micro} does not divide the {each} sequences of each process (batch={batch} over {self.processes}); "
                f"nearest: {min(divisors(each), key=lambda d: (abs(d - self.micro), d))}"
            )

    def micro_of(self, batch: int, length: int) -> int:
        """Sequences that a process takes at once, of `batch` sequences of `length` tokens over all processes."""
        fitting = [d for d in divisors(batch // self.processes) if d * length <= TOKENS_AT_ONCE]
        return self.micro or max(fitting, default=1)

    def settings(self) -> dict[str, Any]:
        """The settings that the running step needs, as `Resources.settings`; it makes its `Gang` of them again."""
        return {name: value for name, value in vars(self).items() if name not in ("processes", "cpus", "device_memory")}


def divisors(n: int) -> list[int]:
    """The divisors of a number, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]
