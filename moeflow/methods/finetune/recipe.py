"""What a fine-tuning computes and how it is run: `Recipe` is part of the key of its step, `Gang` never is. No torch."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from moeflow.methods.finetune.targets import MODES, TARGETS

LOSSES = ("lm", "kl", "both")
KEEPS = ("best", "last")
DTYPES = ("float32", "bfloat16")
TOKENS_AT_ONCE = 16_384
"""Tokens of a micro-batch where nothing says how many: rather many for a large model, and more only costs memory."""


@dataclass(frozen=True)
class Recipe:
    """What one fine-tuning computes. Each field is a parameter of the step `finetune.train`; raises ValueError for what cannot be.

    `mix`: the part of the KL divergence from the teacher in the loss, the language-modelling loss is the rest. `rate` rises over
    `warmup` optimizer steps from zero and then falls along half a cosine to `floor` of itself. `clip`: the most that the norm of
    the gradient may be, 0: any. `decay` is AdamW's, of matrices only. `every`: optimizer steps between two validations. `sparse`:
    what is zero in an expert stays zero.
    """

    mode: str
    mix: float
    targets: tuple[str, ...]
    rank: int
    alpha: float
    steps: int
    batch: int
    rate: float
    warmup: int
    floor: float
    decay: float
    clip: float
    betas: tuple[float, float]
    epsilon: float
    dtype: str
    every: int
    keep: str
    seed: int
    sparse: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        try:  # so that 0 and 0.0, and "2e-5" as JSON may spell it, are one recipe
            object.__setattr__(self, "betas", tuple(map(float, self.betas)))
            for name in ("mix", "alpha", "rate", "floor", "decay", "clip", "epsilon"):
                object.__setattr__(self, name, float(getattr(self, name)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"a number of the recipe is none: {error}") from None
        _one_of("mode", self.mode, MODES)
        _one_of("keep", self.keep, KEEPS)
        for target in self.targets:
            _one_of("target", target, TARGETS)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}: a model is trained in one of {', '.join(DTYPES)}, whatever its checkpoint has")
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"steps={self.steps} of batch={self.batch} sequences: there must be at least one of each")
        if not 0 < self.rate < 1:
            raise ValueError(f"rate={self.rate} must lie between 0 and 1; 1e-5 to 1e-3 are usual")
        if not 0 <= self.warmup < self.steps:
            raise ValueError(f"a warm-up of {self.warmup} steps must be shorter than the {self.steps} steps of the training")
        if not 0 <= self.mix <= 1 or not 0 <= self.floor <= 1:
            raise ValueError(f"mix={self.mix} and floor={self.floor} must lie between 0 and 1")
        if self.decay < 0 or self.clip < 0 or self.epsilon <= 0:
            raise ValueError(
                f"decay={self.decay} and clip={self.clip} must not be negative, and epsilon={self.epsilon} not 0 either"
            )
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas={list(self.betas)} must be two numbers from 0 to below 1; (0.9, 0.999) are usual")
        if not 0 < self.every <= self.steps:
            raise ValueError(f"every={self.every} must lie between 1 and the {self.steps} steps; 0 validates at the end alone")
        if self.mode == "lora" and (self.rank < 1 or self.alpha <= 0 or not self.targets):
            raise ValueError(f"rank={self.rank}, alpha={self.alpha}, targets={list(self.targets)}: LoRA needs all three")

    def params(self) -> dict[str, Any]:
        """The parameters of the step."""
        return asdict(self) | {"targets": list(self.targets), "betas": list(self.betas)}

    def rate_at(self, step: int) -> float:
        """The learning rate of the optimizer step with this number, from 0 on."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        part = (step - self.warmup) / (self.steps - self.warmup)
        return self.rate * (self.floor + (1 - self.floor) * (1 + math.cos(math.pi * part)) / 2)


@dataclass(frozen=True)
class Gang:
    """How and where a fine-tuning runs: what changes no more than the order in which numbers are added. Never part of a key.

    In bf16 DeepSpeed adds a process's gradients of several micro-batches in bf16, so that there their number rounds, too.

    `processes`, each with `gpus` and `cpus` (on a cluster without GPUs, with CPUs alone). `zero`: what DeepSpeed's ZeRO divides
    between them: nothing (0), the optimizer's state (1), gradients too (2), weights too (3). `micro`: sequences that a process
    takes at once; 0: as many as `device_memory` holds, or as make 16,384 tokens. `offload`: the optimizer's state in main memory.
    `checkpointing`: a layer's activations are computed again in the backward pass. `save_every`: optimizer steps between two
    snapshots, from which an interrupted run goes on. `device_memory`: bytes of each process's device, 0: not known, nothing is
    refused. `deepspeed`: further settings of a DeepSpeed configuration, as DeepSpeed spells them.
    """

    processes: int = 1
    gpus: float = 1.0
    cpus: float = 1.0
    zero: int = 2
    micro: int = 0
    offload: bool = False
    checkpointing: bool = False
    save_every: int = 50
    device_memory: int = 0
    deepspeed: Mapping[str, Any] = field(default_factory=dict)

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
        """Raise ValueError where this gang cannot take `batch` sequences in one optimizer step."""
        if batch % self.processes:
            low = batch - batch % self.processes
            near = f"{low} or {low + self.processes}" if low else f"{self.processes}"
            raise ValueError(f"batch={batch} cannot be divided between {self.processes} processes; nearest: {near}")
        if self.micro and (batch // self.processes) % self.micro:
            each = batch // self.processes
            raise ValueError(
                f"micro={self.micro} does not divide the {each} sequences of each process (batch={batch} over {self.processes}); "
                f"nearest: {min(divisors(each), key=lambda d: (abs(d - self.micro), d))}"
            )

    def micro_of(self, batch: int, length: int) -> int:
        """Sequences that a process takes at once."""
        fitting = [d for d in divisors(batch // self.processes) if d * length <= TOKENS_AT_ONCE]
        return self.micro or max(fitting, default=1)

    def settings(self) -> dict[str, Any]:
        """What the step has to know, as `Resources.settings`."""
        return {
            "zero": self.zero, "micro": self.micro, "offload": self.offload, "checkpointing": self.checkpointing,
            "save_every": self.save_every, "gpus": self.gpus, "deepspeed": dict(self.deepspeed),
        }  # fmt: skip

    @staticmethod
    def of(settings: Mapping[str, Any], processes: int) -> "Gang":
        """The gang that a running step is part of; where nothing was set, as by default."""
        return replace(Gang(processes=processes), **settings)


def divisors(n: int) -> list[int]:
    """The divisors of a number, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def mix_of(loss: str, mix: float) -> float:
    """The part that the KL divergence has in the loss of this name."""
    _one_of("loss", loss, LOSSES)
    if loss == "both" and not 0 < mix < 1:
        raise ValueError(f"mix={mix}: of both losses each has a part, so it lies between 0 and 1; or choose loss='lm' or 'kl'")
    return {"lm": 0.0, "kl": 1.0, "both": float(mix)}[loss]


def _one_of(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{what}={value!r} is not known; choose one of {', '.join(known)}")
