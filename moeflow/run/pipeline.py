"""A pipeline file as the command line sees it: `build`, its parameters, and the words that people give for them.

Knows what a pinned source and a text specification are, but no model and no method.
"""

import importlib.util
import inspect
import json
import sys
import types
import typing
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from moeflow import sources
from moeflow.run.outcome import describe
from moeflow.sources import Source, Texts
from moeflow.step import Step

WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}

Build = Callable[..., Step]


def load(path: Path) -> Build:
    """The `build` function of a pipeline file. Raises FileNotFoundError, ValueError where the file cannot be one."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no pipeline {path}; name a file like pipelines/mixtral.py")
    spec = importlib.util.spec_from_file_location(f"moeflow_pipeline_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # so that functions defined there can be found, and shipped, by their module
    sys.path.insert(0, str(path.resolve().parent))  # as `python PIPELINE.py` would
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path} does not load: {describe(error)}") from error
    finally:
        sys.path.remove(str(path.resolve().parent))
    build = getattr(module, "build", None)
    if not callable(build):
        raise ValueError(f"{path} defines no function `build`; a pipeline is build(model, *, keep=6, ...) -> Step")
    return build


def call(build: Build, given: Iterable[str]) -> Step:
    """`build` with the parameters that `name=value` words give. Raises ValueError where they do not fit."""
    parameters = inspect.signature(build).parameters
    kinds = typing.get_type_hints(build.func if isinstance(build, partial) else build)
    words = _words(given, list(parameters))
    if missing := [p.name for p in parameters.values() if p.default is p.empty and p.name not in words]:
        raise ValueError(f"the pipeline needs {' '.join(f'-p {name}=...' for name in missing)}")
    positional, named = [], {}
    for name, parameter in parameters.items():
        value: Any = words.get(name, parameter.default)
        if isinstance(value, str):
            value = _parse(name, value, kinds.get(name, _kind(parameter.default)), default=name not in words)
        if parameter.kind is parameter.KEYWORD_ONLY:
            named[name] = value
        else:
            positional.append(value)
    made = build(*positional, **named)
    if not isinstance(made, Step):
        raise ValueError(f"build returned {type(made).__name__}, and a pipeline returns the Step to publish")
    return made


def _words(given: Iterable[str], known: list[str]) -> dict[str, str]:
    words: dict[str, str] = {}
    for word in given:
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"-p {word}: write -p name=value")
        if name not in known:
            raise ValueError(f"-p {word}: the pipeline has no parameter {name!r}; it has {', '.join(known) or 'none'}")
        if name in words:
            raise ValueError(f"-p {name} is given twice: {words[name]!r} and {value!r}")
        words[name] = value
    return words


def _kind(default: Any) -> Any:
    return type(default) if default not in (inspect.Parameter.empty, None) else str


def _parse(name: str, word: str, kind: Any, *, default: bool) -> Any:
    """`word` as the parameter's annotation wants it; `default` words are only made sources and texts, or left alone."""
    kinds = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    if Source in kinds:
        return sources.pin(word, kind="model")
    if Texts in kinds:
        return Texts(word)
    if default:
        return word
    if type(None) in kinds and word.lower() in ("none", "null"):
        return None
    for one in kinds:
        if one is not type(None):
            return _convert(name, word, one)
    return word


def _convert(name: str, word: str, kind: Any) -> Any:
    origin = typing.get_origin(kind) or kind
    if origin is typing.Literal:
        choices = {str(choice): choice for choice in typing.get_args(kind)}
        if word not in choices:
            raise ValueError(f"-p {name}={word}: choose one of {', '.join(choices)}")
        return choices[word]
    if origin is bool:
        if word.lower() not in WORDS:
            raise ValueError(f"-p {name}={word}: say true or false")
        return WORDS[word.lower()]
    if origin in (int, float):
        try:
            return origin(word)
        except ValueError:
            said = "a whole number" if origin is int else "a number"
            raise ValueError(f"-p {name}={word}: it must be {said}") from None
    if origin in (list, tuple, dict):
        try:
            value = json.loads(word)
        except json.JSONDecodeError as error:
            raise ValueError(f"-p {name}={word}: write it as JSON, as in [1, 2, 3] ({error})") from None
        return tuple(value) if origin is tuple else value
    return word
