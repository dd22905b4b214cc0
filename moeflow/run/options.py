"""How a run may use the machines it is given. None of it is part of a key, so none of it changes a byte."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """`retries`: how often a step is tried again after its worker was lost (a step that raises is not tried again).

    `in_flight`: the most steps that may run or queue in the cluster at once; 0 is what the cluster's CPUs allow.
    """

    retries: int = 3
    in_flight: int = 0

    def __post_init__(self) -> None:
        if self.retries < 0 or self.in_flight < 0:
            raise ValueError(f"retries={self.retries} and in_flight={self.in_flight} must not be negative")
