"""One step as it is sent to a worker: its function, parameters and its inputs' keys, without the graph behind them."""

import copy
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moeflow.step import Resources, Slots, Step, arguments
from moeflow.store import Input, Record

PACKAGE = __name__.partition(".")[0]


@dataclass(frozen=True)
class Call:
    """Everything that a worker needs to run one step, apart from the store."""

    code: str | Callable[..., None]  # "module:name" if every worker has the module, else the function itself
    key: str
    record: Record  # what is known before it runs
    slots: Slots
    resources: Resources
    parts: tuple[str, ...] = ()  # prefixes of the output whose digests other steps need

    @staticmethod
    def of(step: Step, digests: Sequence[str], parts: Sequence[str] = ()) -> "Call":
        """`digests`: those of the inputs' contents, in the order of the inputs."""
        inputs = tuple(Input(i.key, digest) for i, digest in zip(step.inputs, digests, strict=True))
        record = Record(
            step=step.name,
            version=step.version,
            params=step.params,
            inputs=inputs,
            content=step.content(digests),
            source=step.source,
            operations={str(kind): n for kind, n in step.operations.items()},
        )
        return Call(_code(step.fn), step.key, record, step.slots, step.resources, tuple(parts))

    @property
    def function(self) -> Callable[..., None]:
        if not isinstance(self.code, str):
            return self.code
        module, _, name = self.code.partition(":")
        function: Callable[..., None] = getattr(importlib.import_module(module), name).__wrapped__
        return function

    def arguments(self, inputs: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
        """The function's arguments after its context; `inputs`: its input artifacts in order."""
        return arguments(self.function, self.slots, inputs, copy.deepcopy(self.record.params))

    @property
    def threads(self) -> int:
        """The number of threads of its numerical libraries: one per CPU, so that every runner computes the same bytes."""
        return max(1, int(self.resources.cpus))


def _code(fn: Callable[..., None]) -> str | Callable[..., None]:
    """`@step` puts its builder under the function's name, so workers get the function from the builder."""
    if fn.__module__.partition(".")[0] != PACKAGE:
        return fn
    builder = getattr(importlib.import_module(fn.__module__), fn.__qualname__, None)
    return f"{fn.__module__}:{fn.__qualname__}" if getattr(builder, "__wrapped__", None) is fn else fn
