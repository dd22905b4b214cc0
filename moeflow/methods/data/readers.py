"""The readers of text files, and why a file cannot be read: its line and the cause, in place of what `datasets` says."""

import codecs
import errno
import json
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

BEGINNING = 1 << 20  # bytes in which the first row of a JSON file begins
WHOLE = 64 << 20  # bytes of a JSON file that may be one value over many lines, as people write it
UNPACKING = (EOFError, OSError, zlib.error, lzma.LZMAError)  # what the readers of packed files raise

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text", ".py": "text", ".md": "text", ".csv": "csv"}
"""The reader of `datasets` for each file ending."""
PACKED = (".gz", ".zst", ".xz", ".bz2")
"""The endings of packed files, behind those."""

Files = list[tuple[str, Path]]
"""The files of a text: each one's name at its source, and its local path."""


def reader(name: str) -> str:
    """The reader of `datasets` for this file. Raises ValueError if none can read it."""
    ending = next((s for s in reversed(Path(name).suffixes) if s not in PACKED), "")
    if ending not in READERS:
        raise ValueError(f"{name} is no text that can be read; known endings: {', '.join(READERS)}")
    return READERS[ending]


def named(files: Files) -> str:
    """A text's name for messages: its first file, and how many more there are."""
    return files[0][0] + (f" and {len(files) - 1} more files" if files[1:] else "")


def check_beginnings(files: Files) -> None:
    """Raise ValueError if a JSON file does not begin with an object or a list: over a null, Arrow ends the process."""
    for name, path in files:
        if reader(name) == "json" and (fault := _begins(name, path)):
            raise ValueError(f"{name}, {fault}; correct it, or name another text")


@contextmanager
def told(files: Files, where: Path) -> Iterator[None]:
    """Turn what `datasets` raises about these files into an error that names the file, its line and the cause.

    `where`: the folder that it writes to. Raises OSError for a full disk, and ValueError for a file that is damaged.
    """
    try:
        yield
    except Exception as error:  # readers raise of many kinds, those of pandas, Arrow and Python among them
        causes = [*_causes(error)]
        if full := next((c for c in causes if isinstance(c, OSError) and c.errno in (errno.ENOSPC, errno.EDQUOT)), None):
            message = f"no space left on {where} while text is read; free some, or point MOEFLOW_CACHE to another disk"
            raise OSError(full.errno, message) from error
        for name, path in files:
            if fault := _fault(name, path):
                raise ValueError(f"{name}, {fault}; correct it, or name another text") from error
        cause = next((c for c in reversed(causes) if str(c).strip()), error)
        raise ValueError(f"{named(files)} cannot be read: {' '.join(str(cause).split())} ({type(cause).__name__})") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on: the outermost first."""
    while error is not None:
        yield error
        error = error.__cause__


def _fault(name: str, path: Path) -> str:
    """What is wrong with a file, beginning with the line if it has lines; empty if nothing is found."""
    try:
        if (by := reader(name)) == "parquet":
            return _of_parquet(path)
        with _opened(name, path) as file:
            return _of_json(file) if by == "json" else _of_text(file)
    except UNPACKING as error:
        return f"which is packed, cannot be unpacked ({' '.join(str(error).split())})"


def _opened(name: str, path: Path) -> IO[bytes]:
    """A file, unpacked as the ending of its name says."""
    import fsspec
    from fsspec.utils import infer_compression

    file: IO[bytes] = fsspec.open(str(path), "rb", compression=infer_compression(name)).open()
    return file


def _begins(name: str, path: Path) -> str:
    """What is wrong with the first row of a JSON file."""
    try:
        with _opened(name, path) as file:
            start = file.read(BEGINNING)
    except UNPACKING:
        return ""  # told when it is read
    rows = start.removeprefix(codecs.BOM_UTF8).lstrip()
    if not rows:
        return "" if len(start) == BEGINNING else "which has no rows, is empty"
    if rows[:1] in b"{[" or rows[0] > 127:
        return ""
    line, first = 1 + start[: -len(rows)].count(b"\n"), rows.splitlines()[0][:20].decode(errors="replace")
    return f"line {line} begins with {first!r}, and a row is an object"


def _of_json(file: IO[bytes]) -> str:
    start = file.read(WHOLE)
    if len(start) < WHOLE:
        try:
            value = json.loads(start.decode())
        except (ValueError, RecursionError):
            pass
        else:
            rows = value if isinstance(value, list) else [value]
            return "which has no rows, is an empty list" if not rows else ""
        if start.lstrip()[:1] == b"[":
            return _of_value(start)
    file.seek(0)
    for number, line in enumerate(file, 1):
        if line.strip() and (fault := _of_value(line.strip(), number)):
            return fault
    return ""


def _of_value(data: bytes, number: int = 0) -> str:
    """What is wrong with a JSON value; `number`: of its line, 0 if it has many."""
    try:
        json.loads(data.decode())
    except UnicodeDecodeError as error:
        line = number or 1 + data[: error.start].count(b"\n")
        return f"line {line}: byte {data[error.start]:#04x} is not UTF-8"
    except json.JSONDecodeError as error:
        return f"line {number or error.lineno}: no JSON ({error.msg}, column {error.colno})"
    except RecursionError:
        return f"line {number or 1}: nested too deeply"
    return ""


def _of_text(file: IO[bytes]) -> str:
    """What is wrong with a file of plain text or comma-separated values."""
    number = 0
    for number, line in enumerate(file, 1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            return f"line {number}: byte {line[error.start]:#04x} is not UTF-8"
    return "" if number else "which has no rows, is empty"


def _of_parquet(path: Path) -> str:
    from pyarrow import ArrowException
    from pyarrow.parquet import read_metadata

    try:
        about: Any = read_metadata(path)
    except (ArrowException, OSError) as error:
        return f"which should be Parquet, is damaged ({' '.join(str(error).split())})"
    return "" if about.num_rows else "which has no rows, is empty"
