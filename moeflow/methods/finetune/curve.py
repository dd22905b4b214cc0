"""What a training has seen so far: losses, rates, speeds, validations, the best. No torch."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

WINDOW = 10
"""Steps whose losses are averaged to see whether a training diverges."""

RISE, FACTOR = 1.0, 2.0
"""It does where that average is so many nats above its least so far, and so many times that."""


@dataclass
class Curve:
    """The course of one training, as `training.json` holds it; the numbers of step i at place i - 1.

    `losses`: of each optimizer step's batch before its step, in nats a token, the mean over all tokens to be predicted.
    `validations`: of each, the steps that were made, the loss on each held-out text, and their mean. `best`: the steps behind which
    the parameters were that are kept.
    """

    trained: int  # parameters
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)  # tokens per second
    validations: list[dict[str, Any]] = field(default_factory=list)
    best: int = 0
    seconds: float = 0.0

    @property
    def steps(self) -> int:
        return len(self.losses)

    def add(self, loss: float, rate: float, speed: float, *, kept: int) -> None:
        """One optimizer step more. Raises ValueError where its loss is not finite, or the training diverges.

        That is so where the mean loss of the last `WINDOW` steps is twice, and one nat more than, what it was at its least, or that
        of the first step. `kept`: the step of the newest snapshot.
        """
        self.losses.append(loss)
        self.rates.append(rate)
        self.speeds.append(round(speed, 1))
        if not math.isfinite(loss):
            raise ValueError(f"the loss of step {self.steps} is {loss}; {state_of(kept)}")
        means = [sum(self.losses[i : i + WINDOW]) / WINDOW for i in range(self.steps - WINDOW + 1)]
        least = min([self.losses[0], *means])
        if means and means[-1] > max(FACTOR * least, least + RISE):
            raise ValueError(
                f"the training diverges: the loss of the {WINDOW} steps up to step {self.steps} is {means[-1]:.3f}, "
                f"it was {least:.3f}; {state_of(kept)}"
            )

    def validated(self, steps: int, losses: Mapping[str, float], *, kept: int) -> bool:
        """One validation more; whether it is the best so far. Raises ValueError where a loss is not finite."""
        for name, loss in losses.items():
            if not math.isfinite(loss):
                raise ValueError(f"the loss on {name} behind step {steps} is {loss}; {state_of(kept)}")
        mean = sum(losses.values()) / len(losses)
        best = all(mean < v["mean"] for v in self.validations)
        self.validations.append({"steps": steps, "losses": dict(losses), "mean": mean})
        if best:
            self.best = steps
        return best

    def summary(self) -> str:
        """The course in one line."""
        kept = "" if self.best == self.steps else f"; the state behind step {self.best} is kept"
        told = f"{self.trained:,} parameters trained in {self.steps} steps"
        told += f": loss {self.losses[0]:.3f} to {self.losses[-1]:.3f}"
        if self.validations:
            last = next(v["mean"] for v in self.validations if v["steps"] == self.best)
            told += f", on held-out text {self.validations[0]['mean']:.3f} to {last:.3f}"
        return told + kept

    def json(self) -> dict[str, Any]:
        return asdict(self)


def state_of(step: int) -> str:
    """What there is of an earlier step, as the end of a message."""
    state = f"the state of step {step} is kept, and running again goes on from it" if step else "no state was saved before"
    return f"{state}; lower the rate, lengthen the warm-up, or clip the gradient"
