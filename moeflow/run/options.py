"""How a run may use the machines it is given. None of it is part of a key.

Retries and how much is in flight change no byte. Other `gpus` or `cpus` may change the last bits of what is computed, because
sums are rounded in another order there; the keys stay, and what is stored first is what is used.
"""

from dataclasses import dataclass, replace

from moeflow.step import Resources, Step, placed


@dataclass(frozen=True)
class Options:
    """`retries`: how often a step is tried again after its worker was lost (a step that raises is not tried again).

    `in_flight`: the most steps that may run or queue in the cluster at once; 0 is what the cluster's CPUs allow.
    `gpus`, `cpus`: what each step that computes with a model may hold, or each process of a gang that does; where `gpus` is
    None it is one if the cluster has any now.
    """

    retries: int = 3
    in_flight: int = 0
    gpus: float | None = None
    cpus: float | None = None

    def __post_init__(self) -> None:
        if self.retries < 0 or self.in_flight < 0:
            raise ValueError(f"retries={self.retries} and in_flight={self.in_flight} must not be negative")
        if (self.gpus or 0) < 0 or (self.cpus is not None and self.cpus < 1):
            raise ValueError(f"gpus={self.gpus} must not be negative, and cpus={self.cpus} must be at least 1")

    def place(self, target: Step) -> Step:
        """The graph with these resources for the steps that compute with a model; its keys stay."""

        def there(asked: Resources) -> Resources:
            if not asked.gpus:
                return asked
            given = replace(asked, gpus=asked.gpus if self.gpus is None else self.gpus)
            return given if self.cpus is None else replace(given, cpus=self.cpus)

        return placed(target, there)
