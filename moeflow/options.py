"""Options that travel as one value: frozen dataclasses that a step takes whole and that a person sets field by field.

Choices are `Literal`s, or the names of a table (`Annotated[str, TABLE]`), an absent stage is None, and the string below a field
says what it means. A key holds only the fields that differ from their defaults. Standard library only.
"""

import ast
import dataclasses
import inspect
import json
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any, TypeVar

from moeflow.nearest import nearest as nearest_of

TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
NOTHING = ("none", "null")
T = TypeVar("T")


@dataclass(frozen=True)
class Described:
    """One field as the page of help shows it."""

    name: str
    type: str
    default: str
    choices: tuple[str, ...]
    help: str


def check_choices(value: Any) -> None:
    """Raise ValueError if a field of an options value is none of the choices of its `Literal`."""
    for name, kind in hints_of(value.__class__).items():
        choices, choice = choices_of(kind), getattr(value, name)
        if choices and choice is not None and choice not in choices:
            raise ValueError(f"{name}={choice!r} is not known; choose one of {', '.join(map(str, choices))}")


def check_at_least(value: Any, **bounds: float) -> None:
    """Raise ValueError if a field of an options value is below its bound."""
    for name, bound in bounds.items():
        if getattr(value, name) < bound:
            raise ValueError(f"{name}={getattr(value, name)} must be at least {bound}")


def plain(value: Any, kind: Any = None) -> Any:
    """An options value as plain JSON values, without the fields that have their default; any other value as it is.

    `kind`: the annotation of the value. If it says float, 1 and 1.0 are the same.
    """
    if is_dataclass(value) and not isinstance(value, type):
        kinds = hints_of(type(value))
        return {
            f.name: plain(getattr(value, f.name), kinds[f.name]) for f in fields(value) if getattr(value, f.name) != default_of(f)
        }
    if isinstance(value, int) and not isinstance(value, bool) and float in members(kind) and int not in members(kind):
        return float(value)
    if isinstance(value, list | tuple):
        inside = typing.get_args(kind)
        return [plain(v, inside[0] if inside else None) for v in value]
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return value


def only(value: T, *names: str) -> T:
    """The same options with all fields except `names` at their defaults, so that a step's key has only what it reads.

    A field without a default stays as it is.
    """
    defaults = {f.name: default_of(f) for f in fields(typing.cast(Any, value)) if f.name not in names}
    changes = {name: default for name, default in defaults.items() if default is not dataclasses.MISSING}
    return typing.cast(T, dataclasses.replace(typing.cast(Any, value), **changes))


def restored(value: Any, kind: Any) -> Any:
    """The inverse of `plain`: a value of the annotated `kind`. Raises what its type raises."""
    for one in members(kind):
        if is_dataclass(one) and isinstance(value, Mapping):
            kinds = hints_of(typing.cast(type, one))
            return typing.cast(Any, one)(**{name: restored(v, kinds[name]) for name, v in value.items()})
        if typing.get_origin(one) in (tuple, list) and isinstance(value, list):
            inside = typing.get_args(one)
            made = [restored(v, inside[0] if inside else None) for v in value]
            return tuple(made) if typing.get_origin(one) is tuple else made
        if typing.get_origin(one) is Mapping and isinstance(value, Mapping):
            names, inside = typing.get_args(one)
            return {int(name) if names is int else name: restored(v, inside) for name, v in value.items()}
    return value


def described(kind: type) -> list[Described]:
    """The fields of an options type."""
    kinds, docs, rows = hints_of(kind), docs_of(kind), []
    for f in fields(kind):
        choices = tuple(map(str, choices_of(kinds[f.name])))
        rows.append(Described(f.name, shown(kinds[f.name]), word_of(default_of(f)), choices, docs.get(f.name, "")))
    return rows


def changed(name: str, kind: type, value: Any, words: Mapping[str, str]) -> Any:
    """`value`, or one made of defaults if it is None, with the fields in `words`, each word read as its field's type.

    A field that is options itself has words of its own ("tasks.shots"). `name`: what messages call the value. Raises ValueError for
    a missing or unknown field, with the nearest name.
    """
    kinds = hints_of(kind)
    if strange := [n for n in words if n.partition(".")[0] not in kinds]:
        raise ValueError(f"{name} has no {strange[0]!r}; {nearest(strange[0], kinds)}")
    heads = dict.fromkeys(n.partition(".")[0] for n in words)
    changes = {n: _of_field(f"{name}.{n}", kinds[n], getattr(value, n, None), _inside(n, words)) for n in heads}
    if value is not None:
        return _made(name, partial(dataclasses.replace, value), changes)
    lacking = [f.name for f in fields(kind) if default_of(f) is dataclasses.MISSING and f.name not in changes]
    if lacking:
        raise ValueError(f"{name} is absent; say {name}.{lacking[0]}=... to have it")
    return _made(name, kind, changes)


def _made(name: str, make: Callable[..., Any], changes: Mapping[str, Any]) -> Any:
    """What `make` makes of these fields. Raises ValueError with the name of the options before what they say of their fields."""
    try:
        return make(**changes)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _inside(field: str, words: Mapping[str, str]) -> dict[str, str]:
    """The words of a field: its own under "", and those of its fields."""
    return {n.partition(".")[2]: word for n, word in words.items() if n.partition(".")[0] == field}


def _of_field(name: str, kind: Any, value: Any, words: Mapping[str, str]) -> Any:
    if (inside := options_type(kind)) is not None:
        return given(name, kind, inside, value, words)
    if beyond := [n for n in words if n]:
        raise ValueError(f"{name} has no fields, so {name}.{beyond[0]} says nothing; write {name}=value")
    return read(name, words[""], kind)


def given(name: str, kind: Any, inside: type, value: Any, words: Mapping[str, str]) -> Any:
    """`value` with the fields in `words`; a word for itself, under "", takes it away or sets its first field.

    `kind`: its annotation, of which `inside` is the options type. Raises ValueError for words that do not fit.
    """
    own = {n: word for n, word in words.items() if n}
    word = words.get("")
    if word is not None and word.lower() in NOTHING:
        if type(None) not in members(kind) or own:
            raise ValueError(f"{name}={word}: {name.rpartition(' ')[2]} cannot be absent{' and have fields' if own else ''}")
        return None
    if word is not None:
        own = {described(inside)[0].name: word} | own
    return changed(name, inside, value, own) if own else value


def read(name: str, word: str, kind: Any) -> Any:
    """Read a word as a value of this kind. Raises ValueError, in one line, if it is not one."""
    kinds = members(kind)
    if type(None) in kinds and word.lower() in NOTHING:
        return None
    choices = {str(c): c for c in choices_of(kind)}
    if word in choices:
        return choices[word]
    one = next((k for k in kinds if k is not type(None)), str)
    origin = typing.get_origin(one) or one
    if choices and origin is typing.Literal:
        raise ValueError(f"{name}={word}: choose one of {', '.join(choices)}")
    if origin is bool:
        if word.lower() not in TRUTH:
            raise ValueError(f"{name}={word}: say true or false")
        return TRUTH[word.lower()]
    if origin in (int, float):
        return _number(name, word, int if origin is int else float, choices)
    if origin in (list, tuple, dict):
        try:
            items = json.loads(word)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}={word}: write it as JSON, as in [1, 2, 3] ({error})") from None
        return tuple(items) if origin is tuple else items
    return word


def _number(name: str, word: str, kind: type, choices: Iterable[str]) -> Any:
    try:
        return kind(word)
    except ValueError:
        said = "a whole number" if kind is int else "a number"
        others = f", or one of {', '.join(choices)}" if choices else ""
        raise ValueError(f"{name}={word}: it must be {said}{others}") from None


def nearest(name: str, known: Iterable[str]) -> str:
    """Advice for a misspelt name: the nearest known name, or all."""
    names = list(known)
    near = nearest_of(name, names, 0.5)
    return f"did you mean {near!r}?" if near else f"it has {', '.join(names) or 'none'}"


def members(kind: Any) -> tuple[Any, ...]:
    """The members of a union; any other annotation by itself."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def choices_of(kind: Any) -> tuple[Any, ...]:
    """The choices of the `Literal`s in an annotation."""
    return tuple(c for one in members(kind) if typing.get_origin(one) is typing.Literal for c in typing.get_args(one))


def options_type(kind: Any) -> type | None:
    """The options type among the members of an annotation, if there is one."""
    return next((one for one in members(kind) if isinstance(one, type) and is_dataclass(one)), None)


def default_of(f: "dataclasses.Field[Any]") -> Any:
    """A field's default; MISSING if it has none."""
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


@cache
def hints_of(kind: Any) -> dict[str, Any]:
    """The resolved annotations of an options type's fields; one of the names of a table is a `Literal` of them."""
    kinds = typing.get_type_hints(kind, include_extras=True)
    named = {n: typing.Literal[*k.__metadata__[0]] for n, k in kinds.items() if typing.get_origin(k) is typing.Annotated}
    return {f.name: (kinds | named)[f.name] for f in fields(kind)}


@cache
def docs_of(kind: Any) -> dict[str, str]:
    """The string below each field of a dataclass and of its bases, by field, in one line."""
    docs: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        if not is_dataclass(one):
            continue
        source = textwrap.dedent(inspect.getsource(typing.cast(type, one)))
        (body,) = (n.body for n in ast.parse(source).body if isinstance(n, ast.ClassDef))
        for at, below in pairwise(body):
            if not (isinstance(at, ast.AnnAssign) and isinstance(at.target, ast.Name) and isinstance(below, ast.Expr)):
                continue
            if isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
                docs[at.target.id] = " ".join(below.value.value.split())
    return docs


def shown(kind: Any) -> str:
    """An annotation in words: "int", "number or none", "list of int"."""
    words = []
    for one in members(kind):
        origin, inside = typing.get_origin(one), typing.get_args(one)
        if one is type(None):
            words.append("none")
        elif origin is typing.Literal:
            words.append("choice")
        elif origin in (list, tuple):
            words.append(f"list of {shown(inside[0])}" if inside else "list")
        else:
            words.append({float: "number", str: "text", bool: "true/false"}.get(one, getattr(one, "__name__", str(one)).lower()))
    return " or ".join(dict.fromkeys(words))


def word_of(value: Any) -> str:
    """A default as the page of help shows it; empty if there is none."""
    if value is dataclasses.MISSING:
        return ""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return json.dumps(list(value))
    return f"{value:g}" if isinstance(value, float) else str(value)
