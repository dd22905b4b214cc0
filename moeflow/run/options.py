"""How a run may use its machines. None of it is part of a key.

`retries` and `in_flight` change no byte. Other `gpus` or `cpus` may change the last bits of results, because sums are
rounded in another order; the keys stay the same, and the result that is stored first is used.
"""

import subprocess
import sys
from dataclasses import dataclass, replace

from moeflow.run.words import count
from moeflow.step import Resources, Step, placed


@dataclass(frozen=True)
class Options:
    """`retries`: how often a step is tried again after its worker was lost (a step that raises is not tried again).

    `in_flight`: the most steps that may run or queue in the cluster at once; 0 means what the cluster's CPUs allow.
    `gpus`, `cpus`: for each step that computes with a model, or each process of a gang that does; `gpus` None means one if
    the cluster has any now. `run`: the name of the run's mark in the store, "" for one that claims no steps.
    """

    retries: int = 3
    in_flight: int = 0
    gpus: float | None = None
    cpus: float | None = None
    run: str = ""

    def __post_init__(self) -> None:
        if self.retries < 0 or self.in_flight < 0:
            raise ValueError(f"retries={self.retries} and in_flight={self.in_flight} must not be negative")
        if (self.gpus or 0) < 0 or (self.cpus is not None and self.cpus < 1):
            raise ValueError(f"gpus={self.gpus} must not be negative, and cpus={self.cpus} must be at least 1")

    def check_here(self) -> None:
        """Raise ValueError if steps are to run in this process, with more GPUs than torch sees on this machine."""
        if not self.gpus:
            return
        words = [sys.executable, "-P", "-c", "import torch; print(torch.cuda.device_count())"]  # no runner loads torch itself
        there = int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
        if self.gpus > there:
            raise ValueError(
                f"--gpus {self.gpus:g}: torch sees {count(there, 'GPU') if there else 'no GPU'} on this machine; leave --gpus "
                "away, or start where GPUs are, as with --runner ray"
            )

    def place(self, target: Step) -> Step:
        """The same graph with these resources for the steps that compute with a model; its keys stay the same."""

        def there(asked: Resources) -> Resources:
            if not asked.gpus:
                return asked
            resources = replace(asked, gpus=asked.gpus if self.gpus is None else self.gpus)
            return resources if self.cpus is None else replace(resources, cpus=self.cpus)

        return placed(target, there)
