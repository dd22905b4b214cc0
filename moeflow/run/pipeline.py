"""A pipeline file as the command line sees it: `build`, its parameters, and the words that set them.

A parameter is a pinned source, a text, a plain value, or options (`moeflow.options`), whose fields are set one by one:
`-p slim.bits=3`. Knows no model and no method.
"""

import importlib.util
import inspect
import shutil
import sys
import textwrap
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from moeflow import options, sources
from moeflow.nearest import meant
from moeflow.run import at_fault
from moeflow.run.opening import shipped
from moeflow.run.outcome import describe
from moeflow.sources import How, LayoutWanted, Mtp, NamesFiles, Source, Texts
from moeflow.step import Step
from moeflow.store.errors import MissingSource, NoDefault, NoNetwork

Build = Callable[..., Step]

# the parameters that every pipeline with a source has
HOW, ADAPTER, LAYOUT, MTP = "source", "adapter", "layout", "mtp"
OF_EVERY: dict[str, tuple[Any, str]] = {
    HOW: (
        How,
        "Whether a model's weights are copied into the store, or read by range where they lie; by default they are copied from the "
        "hub, and read where they lie in S3, in a folder and in the hub's cache.",
    ),
    ADAPTER: (
        str,
        "merge: the LoRA adapter (PEFT) that lies beside the model's weights is merged into them; or the address of one that lies "
        "elsewhere.",
    ),
    LAYOUT: (
        LayoutWanted,
        "How the result has its experts on disk: in stacks where its source has them so, which is the default, or one tensor for "
        "each matrix, since engines differ in what they read.",
    ),
    MTP: (
        Mtp,
        "What becomes of a model's multi-token-prediction layers: they are dropped, which is the default, kept as they are, or "
        "pruned with the decoder layers, by what they themselves record.",
    ),
}
"""Their types and meanings, for the page of help."""
ENDS = "a pipeline raises ValueError with what is wrong"

MEANING = {
    Source: "a folder, org/name[@revision] on the hub, or s3://bucket/prefix",
    Texts: "URI[#column[+column]][*weight] or the name of a data set or mixture, several joined by commas; or traffic:FILE",
}
"""What to write for sources and texts, for the page of help."""


def load(path: Path) -> Build:
    """Import a pipeline file and return its `build`. Raises FileNotFoundError, and ValueError if it is no pipeline."""
    if not path.is_file():
        beside = path.parent.glob("*.py") if path.parent.is_dir() else ()
        known = [*shipped(), *(path.with_name(p.name) for p in beside)]
        otherwise = "name one that comes with moeflow, such as mixtral, or a file PIPELINE.py"
        raise FileNotFoundError(f"there is no pipeline {path}; {meant(str(path), known, otherwise)}")
    module = sys.modules["__main__"]
    if Path(getattr(module, "__file__", None) or "").resolve() != path.resolve():  # else it is running already
        module = _imported(path)
    build = getattr(module, "build", None)
    if not callable(build):
        raise ValueError(f"{path} defines no function `build`; a pipeline is build(model, *, keep=6, ...) -> Step")
    return build


def _imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"moeflow_pipeline_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # so that its functions can be looked up, and sent to workers, by their module
    sys.path.insert(0, str(path.resolve().parent))  # as `python PIPELINE.py` would
    try:
        spec.loader.exec_module(module)
    except SystemExit as error:
        raise ValueError(f"{path} does not load: it ends the program, SystemExit({error.code!r}); {ENDS}") from error
    except Exception as error:
        raise ValueError(f"{path} does not load: {describe(error)}") from error
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module


def call(build: Build, assignments: Iterable[str]) -> Step:
    """Call `build` with parameters from words `name=value` and `name.field=value`. Raises ValueError if they do not fit."""
    kinds, given = kinds_of(build), values(build, assignments)
    words: dict[str, str] = {name: given.pop(name) for name in _of_every(kinds) if name in given}
    read: dict[str, Any] = {name: options.read(f"-p {name}", word, OF_EVERY[name][0] | None) for name, word in words.items()}
    layout: LayoutWanted = read.get(LAYOUT) or "source"
    model = partial(sources.pin, kind="model", how=read.get(HOW), adapter=read.get(ADAPTER), layout=layout, mtp=read.get(MTP))
    models = {n: v for n, v in given.items() if isinstance(v, str) and Source in options.members(kinds[n])}
    _check_files(given.values())
    for name in sorted(models, key=lambda name: "://" in sources.address(models[name], "model")):  # those on this machine first
        given[name] = model(models[name])
    try:
        made = build(**given)
    except MissingSource as error:
        if why := at_fault.defaulted(build, given, str(error)):
            raise (NoDefault if isinstance(error, NoNetwork) else type(error))(f"{why}: {error}") from error
        raise
    except ValueError as error:
        if type(error) is ValueError and (which := at_fault.named(flat(build, given), str(error))):
            raise ValueError(f"{which}: {error}") from error
        raise
    except SystemExit as error:
        raise ValueError(f"build ends the program, SystemExit({error.code!r}); {ENDS}") from error
    except (ArithmeticError, AssertionError, AttributeError, NameError, RuntimeError) as error:
        raise ValueError(f"build raised {describe(error)}; --debug shows where") from error
    if not isinstance(made, Step):
        raise ValueError(f"build returned {type(made).__name__}, and a pipeline returns the Step to publish")
    return made


def values(build: Build, assignments: Iterable[str]) -> dict[str, Any]:
    """Every parameter of a pipeline with the value that these words and its defaults give it, and as words those of `OF_EVERY` that
    are given.

    Nothing is pinned: a model is the word for it. Raises ValueError if the words do not fit.
    """
    parameters, kinds = inspect.signature(build).parameters, kinds_of(build)
    words = _words(assignments, [*parameters, *_of_every(kinds)], kinds)
    given = {name: words.pop(name) for name in _of_every(kinds) if name in words}
    named_words = {name.partition(".")[0] for name in words}
    if missing := [p.name for p in parameters.values() if p.default is p.empty and p.name not in named_words]:
        raise ValueError(f"the pipeline needs {' '.join(f'-p {name}=...' for name in missing)}")
    return {name: _value(name, p.default, kinds[name], words) for name, p in parameters.items()} | given


def _check_files(values: Iterable[Any]) -> None:
    """Raise MissingSource for a file on this machine that is not there, before anybody else is asked for a source."""
    for value in values:
        if isinstance(value, Texts):
            value.check_local()
        elif isinstance(value, NamesFiles):
            value.check_files()


def flat(build: Build, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a pipeline's parameters with the fields of options one by one, by the names that set them."""
    inner = inner_of(kinds_of(build))
    made: dict[str, Any] = {}

    def say(name: str, value: Any) -> None:
        if not is_dataclass(value) or isinstance(value, type | Texts | Source):
            made[name] = value
            return
        for f in fields(value):
            own = inner.get(f.name, ("", None))[0] == name  # options among options are named like parameters
            if f.init:
                say(f.name if own else f"{name}.{f.name}", getattr(value, f.name))

    for name, value in values.items():
        say(name, value)
    return made


def page(build: Build, about: str = "") -> str:
    """The page of help: `about`, then all parameters and fields of options with type, default, choices and meaning."""
    kinds = kinds_of(build)
    inner = inner_of(kinds)
    lines = [about, "", "-p name=value, or -p name.field=value:", ""]
    for name, parameter in inspect.signature(build).parameters.items():
        kind, default = kinds[name], parameter.default
        options_type = _options(kind)
        if options_type is None:
            meaning = next((text for one, text in MEANING.items() if one in options.members(kind)), "")
            lines += _entry(
                name, "" if meaning else options.shown(kind), _short(default), meaning or _choice(options.choices_of(kind))
            )
            continue
        lines += _entry(name, "", "absent" if default is None else "", _first(options_type))
        for field in options.described(options_type):
            now = field.default if default in (None, parameter.empty) else _short(getattr(default, field.name))
            if field.name in inner:
                continue
            lines += _entry(f"  {name}.{field.name}", field.type, now, f"{field.help} {_choice(field.choices)}".strip())
    for name, (_, inside) in inner.items():
        lines += _entry(name, "", "absent", _first(inside))
        for field in options.described(inside):
            lines += _entry(f"  {name}.{field.name}", field.type, field.default, f"{field.help} {_choice(field.choices)}".strip())
    for name in _of_every(kinds):
        kind, meaning = OF_EVERY[name]
        lines += _entry(name, options.shown(kind), "", f"{meaning} {_choice(options.choices_of(kind))}".strip())
    return "\n".join(lines)


def _entry(name: str, kind: str, default: str, meaning: str) -> list[str]:
    head = f"  {name:<30} {kind:<15} {default}".rstrip()
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    return [head, *textwrap.wrap(meaning, width, initial_indent=" " * 8, subsequent_indent=" " * 8)]


def _first(kind: type) -> str:
    """The first sentence of an options type's documentation."""
    return " ".join((inspect.getdoc(kind) or "").partition("\n\n")[0].split()).partition(". ")[0].rstrip(".")


def _choice(choices: Iterable[Any]) -> str:
    names = ", ".join(map(str, choices))
    return f"One of {names}." if names else ""


def _short(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "required"
    text = value.spec if isinstance(value, Texts) else options.word_of(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def kinds_of(build: Build) -> dict[str, Any]:
    """The annotation of every parameter, or the type of its default if there is none."""
    kinds = typing.get_type_hints(build.func if isinstance(build, partial) else build)
    parameters = inspect.signature(build).parameters.items()
    return {name: kinds.get(name, str if p.default in (p.empty, None) else type(p.default)) for name, p in parameters}


def _words(assignments: Iterable[str], known: Iterable[str], kinds: dict[str, Any]) -> dict[str, str]:
    words: dict[str, str] = {}
    inner = inner_of(kinds)
    for word in assignments:
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"-p {word}: write -p name=value")
        head, dot, rest = name.partition(".")
        if head in inner:  # as a parameter of its own
            outer, _ = inner[head]
            name, head, dot = f"{outer}.{head}{dot}{rest}", outer, "."
        if head not in known:
            every = {n: t for n, kind in kinds.items() if (t := _options(kind))} | {n: t for n, (_, t) in inner.items()}
            fields = [f"{n}.{f.name}" for n, t in every.items() for f in options.described(t)]
            own = [n for n in fields if n.partition(".")[2] == name]
            advice = f"did you mean {' or '.join(own)}?" if own else options.nearest(name, known)
            raise ValueError(f"-p {word}: the pipeline has no parameter {name!r}; {advice}")
        if dot and _options(kinds.get(head)) is None:
            raise ValueError(f"-p {word}: {head} has no fields; write -p {head}=value")
        if name in words:
            raise ValueError(f"-p {name} is given twice: {words[name]!r} and {value!r}")
        words[name] = value
    return words


def inner_of(kinds: dict[str, Any]) -> dict[str, tuple[str, type]]:
    """The fields of options that are options themselves, which are named like parameters: the parameter of each, and its type."""
    fields = [
        (n, f.name, options.options_type(options.hints_of(t)[f.name]))
        for n, kind in kinds.items()
        if (t := _options(kind))
        for f in options.described(t)
    ]
    return {field: (n, inside) for n, field, inside in fields if inside is not None and field not in kinds}


def _options(kind: Any) -> type | None:
    """The options type of a parameter whose fields can be set, if there is one."""
    options_type = options.options_type(kind)
    return None if options_type in (Source, Texts) else options_type


def _of_every(kinds: dict[str, Any]) -> tuple[str, ...]:
    """The parameters that every pipeline with a source has, beside its own."""
    if not any(Source in options.members(kind) for kind in kinds.values()):
        return ()
    return tuple(name for name in OF_EVERY if name not in kinds)


def _value(name: str, default: Any, kind: Any, words: dict[str, str]) -> Any:
    """The value of a parameter: texts are made from words, sources stay words, and fields of options are set one by one."""
    word, options_type = words.get(name), _options(kind)
    if options_type is not None:
        inside = {n.partition(".")[2]: w for n, w in words.items() if n == name or n.startswith(f"{name}.")}
        return options.given(f"-p {name}", kind, options_type, None if default is inspect.Parameter.empty else default, inside)
    text = word if word is not None else default
    if isinstance(text, str) and Source in options.members(kind):
        return text
    if isinstance(text, str) and Texts in options.members(kind):
        return Texts(text)
    return default if word is None else options.read(f"-p {name}", word, kind)
