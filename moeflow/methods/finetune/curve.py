"""The course of a training: losses, rates, speeds, validations, and the best state. No torch."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

WINDOW = 10
RISE, FACTOR = 1.0, 2.0
"""A training diverges if the mean loss of WINDOW steps is RISE nats above its lowest value so far, and FACTOR times that value."""


@dataclass
class Curve:
    """The course of one training, as in `training.json`; the numbers of step i are at index i - 1."""

    trained: int
    """The number of trained parameters."""
    losses: list[float] = field(default_factory=list)
    """The mean loss of each step's batch before the step, in nats per token, over all tokens to predict."""
    rates: list[float] = field(default_factory=list)
    """The learning rate of each step."""
    speeds: list[float] = field(default_factory=list)
    """Tokens per second."""
    validations: list[dict[str, Any]] = field(default_factory=list)
    """For each validation: the steps before it, the loss on each held-out text, and their mean."""
    best: int = 0
    """The step after which the kept parameters were taken."""
    seconds: float = 0.0
    """The time of the training, over all attempts."""

    @property
    def steps(self) -> int:
        return len(self.losses)

    @property
    def best_validation(self) -> dict[str, Any]:
        """The validation of the kept parameters."""
        return next(v for v in self.validations if v["steps"] == self.best)

    def add(self, loss: float, rate: float, speed: float, *, kept: int) -> None:
        """Add an optimizer step; `kept` is the step of the newest snapshot.

        Raises ValueError if the loss is not finite, or the training diverges: the mean of the last `WINDOW` losses is twice its
        lowest value, or the first loss, and one nat more.
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

    def told(self) -> Iterator[tuple[int, dict[str, float]]]:
        """The course so far, as trackers get it: the numbers behind each optimizer step, and those of the validations."""
        for at, numbers in enumerate(zip(self.losses, self.rates, self.speeds, strict=True), 1):
            yield at, of_step(*numbers)
        for validation in self.validations:
            yield validation["steps"], of_validation(validation["losses"])

    def validated(self, steps: int, losses: Mapping[str, float], *, kept: int) -> bool:
        """Add a validation; returns whether it is the best so far. Raises ValueError if a loss is not finite."""
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
        course = f"{self.trained:,} parameters trained in {self.steps} steps: loss {self.losses[0]:.3f} to {self.losses[-1]:.3f}"
        if self.validations:
            course += f", on held-out text {self.validations[0]['mean']:.3f} to {self.best_validation['mean']:.3f}"
        return course if self.best == self.steps else f"{course}; the state behind step {self.best} is kept"


def of_step(loss: float, rate: float, speed: float) -> dict[str, float]:
    """The numbers of an optimizer step, under the names that trackers get."""
    return {"loss": loss, "rate": rate, "tokens_per_second": round(speed, 1)}


def of_validation(losses: Mapping[str, float]) -> dict[str, float]:
    """The losses on held-out texts, under the names that trackers get."""
    return {f"heldout/{name}": loss for name, loss in losses.items()}


def state_of(step: int) -> str:
    """The end of an error message: which earlier step was kept, and what to change."""
    state = f"the state of step {step} is kept, and running again goes on from it" if step else "no state was saved before"
    return f"{state}; lower the rate, lengthen the warm-up, or clip the gradient"
