"""JSON files of a checkpoint, which may be damaged or made to deceive. Standard library only."""

import json
from typing import Any


def json_object(data: bytes, name: str) -> dict[str, Any]:
    """The object that a JSON file holds; `name`: what messages call the file.

    Raises ValueError if it is empty, not UTF-8, cut short, no JSON, nested too deeply, no object, or names a key twice.
    """
    if not data.strip():
        raise ValueError(f"{name} is empty; fetch it again")
    try:
        value = json.loads(text := data.decode(), object_pairs_hook=_once)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half a character, as in "\ud800", is no text
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 (byte {data[error.start]:#04x} at {error.start:,}); fetch it again") from None
    except UnicodeEncodeError:
        raise ValueError(f"{name} has an escape that is no character; fetch it again") from None
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply to be read; fetch it again") from None
    except _Twice as error:
        raise ValueError(f"{name} names {error.args[0]!r} twice; delete one of them, or fetch it again") from None
    except ValueError as error:
        raise ValueError(f"{name} is cut short or no JSON ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} holds {kind_of(value)} where an object belongs; fetch it again")
    return value


def kind_of(value: Any) -> str:
    """What a JSON value is, for messages: "null", "a list", "an object", or the value itself, cut off if it is long."""
    if value is None:
        return "null"
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    text = json.dumps(value) if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class _Twice(Exception):
    """A key stands twice in an object."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [k for k, _ in pairs]
        raise _Twice(next(k for k in keys if keys.count(k) > 1))
    return made
