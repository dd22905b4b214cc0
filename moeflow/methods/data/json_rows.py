"""The rows of a JSON file: an object on every line, or a list of objects, or one object over many lines.

Python's own parser reads them, so that a row is what its author wrote: nothing is converted, and no absent field becomes a null.
"""

import codecs
import json
import re
from collections.abc import Collection, Iterator
from typing import IO, Any

Row = tuple[str, dict[str, Any]]
"""Where a row stands ("line 7"), and its values by column."""
BLANKS = re.compile(r"[ \t\r\n]*")


def json_rows(file: IO[bytes], columns: Collection[str], known: dict[str, None]) -> Iterator[Row]:
    """Every row with those of the columns that it has; the names of all its columns are added to `known`.

    Raises ValueError, with the line, for what is no such row.
    """
    for line, value in _objects(file):
        known.update(dict.fromkeys(value))
        yield f"line {line}", {c: value[c] for c in columns if c in value}


def _objects(file: IO[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every object with its line. The first line that holds anything says whether they stand one on a line."""
    before, number = [], 0
    for number, line in enumerate(file, 1):
        before.append(line if number > 1 else line.removeprefix(codecs.BOM_UTF8))
        if before[-1].strip():
            break
    else:
        return
    first = before[-1]
    if _is_object(first) or _text(first, number).lstrip()[0] not in "{[":
        yield number, _object(first, number)
    else:
        following = file.readline()
        if first.lstrip()[:1] == b"{" and (not following or _is_object(following)):
            yield number, _object(first, number)  # which raises
        yield from _in_whole(_text(b"".join([*before, following, file.read()])))
        return
    for line in file:
        number += 1
        if line.strip():
            yield number, _object(line, number)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode()), dict)
    except (ValueError, RecursionError):
        return False


def _object(data: bytes, line: int) -> dict[str, Any]:
    """The object on a line. Raises ValueError, with the line, if it is no JSON or no object."""
    text = _text(data.strip(), line)
    if text[0] != "{":
        raise _no_row(text, line)
    value, end = _parsed(text, 0, line)
    if end < len(text):
        raise _no_json(json.JSONDecodeError("Extra data", text, end), line)
    return value


def _in_whole(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a list, or the one object, that is written over many lines, each with the line that it begins on."""
    at = _skip(text, 0)
    line, counted = 1, 0
    more = opening = text[at] == "["
    at = _skip(text, at + opening)
    more = more and text[at : at + 1] != "]"
    while more or not opening:
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] not in ("{", ""):
            raise _no_row(text[at:], line)
        value, end = _parsed(text, at)
        yield line, value
        at = _skip(text, end)
        if not opening:
            break
        if more := text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != "]":
            raise _no_json(json.JSONDecodeError("Expecting ',' delimiter", text, at))
    if (at := _skip(text, at + opening)) < len(text):
        raise _no_json(json.JSONDecodeError("Extra data", text, at))


def _skip(text: str, at: int) -> int:
    """The place of the first character from `at` that is no blank."""
    match = BLANKS.match(text, at)
    return match.end() if match else at


def _parsed(text: str, at: int, line: int = 0) -> tuple[Any, int]:
    """The value that begins at `at`, and where it ends; `line`: of the text, 0 if it has many."""
    try:
        return json.JSONDecoder().raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise _no_json(error, line) from None
    except RecursionError:
        raise ValueError(f"line {line or 1 + text.count(chr(10), 0, at)}: nested too deeply") from None
    except ValueError as error:  # a number of more digits than Python reads
        raise ValueError(f"line {line or 1 + text.count(chr(10), 0, at)}: {error}") from None


def _text(data: bytes, line: int = 0) -> str:
    """The text of these bytes; `line`: of the bytes, 0 if they have many. Raises ValueError if they are not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = line or 1 + data.count(b"\n", 0, error.start)
        raise ValueError(f"line {line}: byte {data[error.start]:#04x} is not UTF-8") from None


def _no_json(error: json.JSONDecodeError, line: int = 0) -> ValueError:
    return ValueError(f"line {line or error.lineno}: no JSON ({error.msg}, column {error.colno})")


def _no_row(text: str, line: int) -> ValueError:
    return ValueError(f"line {line} begins with {text.splitlines()[0][:20]!r}, and a row is an object")
