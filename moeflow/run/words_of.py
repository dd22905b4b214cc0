"""Parameters of a pipeline as Python has them, turned into the words of the command line.

A notebook and a shell thereby ask for the same: one reading of words, one set of checks, and one record of what was given.
"""

import dataclasses
import inspect
import typing
from collections.abc import Mapping
from contextlib import suppress
from os import PathLike, fspath
from typing import Any

from moeflow import options
from moeflow.run.pipeline import Build, kinds_of
from moeflow.run.recipe import word_of
from moeflow.sources import Texts


def words_of(build: Build, given: Mapping[str, Any]) -> list[str]:
    """The words `name=value` and `name.field=value` for these values of a pipeline's parameters.

    A value may be plain, a `Texts`, an options value, or a mapping of its fields: `search={"seed": 1}`. Of an options value only
    the fields that differ from the pipeline's own are written. Raises TypeError for what no word says.
    """
    kinds, parameters = kinds_of(build), inspect.signature(build).parameters
    words: list[str] = []
    for name, value in given.items():
        wanted = options.options_type(kinds.get(name))
        if isinstance(value, Mapping):
            inside = options.hints_of(wanted) if wanted else {}
            words += [_said(f"{name}.{field}", one, inside.get(field)) for field, one in value.items()]
        elif dataclasses.is_dataclass(value) and not isinstance(value, type | Texts):
            if wanted is None or type(value) is not wanted:
                asked = wanted.__name__ if wanted else options.shown(kinds.get(name, str))
                raise TypeError(f"{name}={value!r:.80} is not what the pipeline takes there: {asked}")
            words += _changed(name, value, parameters[name].default)
        else:
            words.append(_said(name, value, kinds.get(name)))
    return words


def _changed(name: str, value: Any, default: Any) -> list[str]:
    """The fields in which an options value differs from the pipeline's own, or from its type's where that has none."""
    fields = dataclasses.fields(value)
    start = default if type(default) is type(value) else None
    usual = {f.name: options.default_of(f) if start is None else getattr(start, f.name) for f in fields}
    kinds = options.hints_of(typing.cast(Any, type(value)))
    changed = [f.name for f in fields if getattr(value, f.name) != usual[f.name]]
    if start is None and not changed:
        changed = [fields[0].name]  # a word at least, or the options would be absent
    return [_said(f"{name}.{n}", getattr(value, n), kinds[n]) for n in changed]


def _said(name: str, value: Any, kind: Any) -> str:
    return f"{name}={_word(name, value, kind)}"


def _word(name: str, value: Any, kind: Any) -> str:
    """One value as the word that is read as it again."""
    if value is None or isinstance(value, bool | int | float | Texts):
        return word_of(value)
    if isinstance(value, str | PathLike):
        return fspath(value)
    if isinstance(value, tuple | list):
        listed = any(typing.get_origin(one) in (tuple, list) for one in options.members(kind))
        if not listed and value and all(isinstance(one, str | PathLike) for one in value):
            return ",".join(map(fspath, value))  # several texts
        with suppress(TypeError):
            return word_of(value)
    raise TypeError(f"{name}={value!r:.80}: give a number, a text, true or false, a list of them, or options")
