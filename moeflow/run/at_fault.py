"""Which parameter of a pipeline an error of its `build` is about, in the words by which it is given."""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Any

from moeflow import options
from moeflow.sources import NamesFiles, Texts

SAID = re.compile(r"(?P<field>\w+)=(?P<value>[^\s,:;]+)")
"""How an error of options begins, which knows the name of its field alone."""


def named(values: Mapping[str, Any], said: str) -> str:
    """The options whose field an error begins with, as in "-p calibration.length, -p heldout.length"; "" if there are none.

    `values`: of every parameter and field, by the names that set them.
    """
    if not (match := SAID.match(said)) or match["field"] in values:
        return ""
    known = {name: value for name, value in values.items() if name.rpartition(".")[2] == match["field"]}
    return ", ".join(f"-p {n}" for n, v in known.items() if match["value"] in (str(v), repr(v), options.word_of(v)))


def defaulted(build: Callable[..., Any], given: Mapping[str, Any], said: str) -> str:
    """Which parameters were left at their defaults on the hub, if an error is about one of them; "" if not."""
    on_hub = {}
    for name, parameter in inspect.signature(build).parameters.items():
        now, default = (_text_of(value) for value in (given.get(name), parameter.default))
        if now and now == default and "://" in now:
            on_hub[name] = now
    if not any(word.partition("#")[0] in said for word in on_hub.values()):
        return ""
    names = " and ".join(f"-p {name}=" for name in on_hub)
    return f"{names} {'was' if len(on_hub) == 1 else 'were'} not given, and by default that is text on the hub"


def _text_of(value: Any) -> str:
    """The words of texts, or of options whose first field is texts; "" for anything else."""
    if isinstance(value, NamesFiles) and is_dataclass(value):
        value = getattr(value, options.described(type(value))[0].name)
    return value.spec if isinstance(value, Texts) else value if isinstance(value, str) else ""
