"""One step as it is sent to a worker: its function, parameters and its inputs' keys, without the graph behind them."""

import copy
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moeflow.step import Resources, Slots, Step, arguments

PACKAGE = __name__.partition(".")[0]


@dataclass(frozen=True)
class Input:
    """A stored artifact, or one part of it, with the digest of its contents."""

    name: str  # as in recipes: the key, and for a part a slash and its prefix
    digest: str

    @property
    def key(self) -> str:
        return self.name.partition("/")[0]

    @property
    def prefix(self) -> str:
        return self.name.partition("/")[2]


@dataclass(frozen=True)
class Call:
    """Everything that a worker needs to run one step, apart from the store."""

    code: str | Callable[..., None]  # "module:name" if every worker has the module, else the function itself
    name: str
    version: int
    params: dict[str, Any]
    key: str
    content: str
    inputs: tuple[Input, ...]
    slots: Slots
    resources: Resources
    source: str
    parts: tuple[str, ...] = ()  # prefixes of the output whose digests other steps need

    @staticmethod
    def of(step: Step, digests: Sequence[str], *, source: str, parts: Sequence[str] = ()) -> "Call":
        """`digests`: those of the inputs' contents, in the order of the inputs."""
        inputs = tuple(Input(i.key, digest) for i, digest in zip(step.inputs, digests, strict=True))
        return Call(
            _code(step.fn),
            step.name,
            step.version,
            step.params,
            step.key,
            step.content(digests),
            inputs,
            step.slots,
            step.resources,
            source,
            tuple(parts),
        )

    @property
    def function(self) -> Callable[..., None]:
        if not isinstance(self.code, str):
            return self.code
        module, _, name = self.code.partition(":")
        function: Callable[..., None] = getattr(importlib.import_module(module), name).__wrapped__
        return function

    def arguments(self, inputs: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
        """The function's arguments after its context; `inputs`: its input artifacts in order."""
        return arguments(self.function, self.slots, inputs, copy.deepcopy(self.params))

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
