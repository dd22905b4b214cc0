"""One step as it travels to a worker: its function, parameters and its inputs' keys, not the graph behind them."""

import copy
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moeflow.step import Resources, Slots, Step, arguments

PACKAGE = __name__.partition(".")[0]


@dataclass(frozen=True)
class Input:
    """A stored artifact, or one part of it; `digest` is that of its contents."""

    name: str  # as recipes spell it: the key, and after a slash the part's prefix
    digest: str

    @property
    def key(self) -> str:
        return self.name.partition("/")[0]

    @property
    def prefix(self) -> str:
        return self.name.partition("/")[2]


@dataclass(frozen=True)
class Call:
    """Everything that one worker needs to make one step, apart from the store."""

    code: str | Callable[..., None]  # "module:name" where every worker has the module, else the function itself
    name: str
    version: int
    params: dict[str, Any]
    key: str
    content: str
    inputs: tuple[Input, ...]
    slots: Slots
    resources: Resources
    source: str
    parts: tuple[str, ...] = ()  # prefixes of the output whose digests are wanted

    @staticmethod
    def of(step: Step, digests: Sequence[str], *, source: str, parts: Sequence[str] = ()) -> "Call":
        """`digests` are those of the inputs' contents, in their order."""
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
        """What the function is called with behind its context, given its input artifacts one after the other."""
        return arguments(self.function, self.slots, inputs, copy.deepcopy(self.params))

    @property
    def threads(self) -> int:
        """How many threads its numerical libraries use: one for each CPU, in every runner, so that bytes agree."""
        return max(1, int(self.resources.cpus))


def _code(fn: Callable[..., None]) -> str | Callable[..., None]:
    """`@step` leaves its builder under the function's name, so the function itself is found behind it."""
    if fn.__module__.partition(".")[0] != PACKAGE:
        return fn
    found = getattr(importlib.import_module(fn.__module__), fn.__qualname__, None)
    return f"{fn.__module__}:{fn.__qualname__}" if getattr(found, "__wrapped__", None) is fn else fn
