"""The rows of text files as they are written: of every row only the columns that are asked for.

No column's type is guessed, and none is made to fit another row's. What cannot be read is told in one line, with its file and its
line ("row" in a binary file).
"""

import csv
import gzip
import io
import lzma
import sys
import zlib
from bz2 import BZ2File
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from moeflow.methods.data.arrow_rows import arrow_rows, parquet_rows
from moeflow.methods.data.json_rows import Row, json_rows
from moeflow.text_files import PACKED, ending

Files = list[tuple[str, Path]]
"""The files of a text: each one's name at its source, and its local path."""

READERS = {
    ".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".tsv": "tsv",
    ".txt": "text", ".md": "text", ".py": "text",
}  # fmt: skip
"""The reader for each file ending."""
UNPACKING = (EOFError, OSError, zlib.error, lzma.LZMAError)  # what the readers of packed files raise


def reader(name: str) -> str:
    """The reader for this file. Raises ValueError if none can read it."""
    if ending(name) not in READERS:
        raise ValueError(f"{name} is no text that can be read; known endings: {', '.join(READERS)}")
    return READERS[ending(name)]


def named(files: Files) -> str:
    """A text's name for messages: its first file, and how many more there are."""
    return files[0][0] + (f" and {len(files) - 1} more files" if files[1:] else "")


def rows_of(name: str, path: Path, columns: Collection[str], known: dict[str, None]) -> Iterator[Row]:
    """Every row of one file with those of the columns that it has; the names of all its columns are added to `known`.

    Raises ValueError, with the file and its line, for what is damaged.
    """
    fault = ""
    try:
        with _opened(name, path) as file:
            yield from _READ[reader(name)](file, columns, known)
    except UnicodeDecodeError:
        with _opened(name, path) as file:
            fault = _no_utf8(file)
    except UNPACKING as error:
        if not name.lower().endswith(PACKED):
            raise
        fault = f"which is packed, cannot be unpacked ({' '.join(str(error).split())})"
    except ValueError as error:
        fault = str(error)
    if fault:
        raise ValueError(f"{name}, {fault}; correct it, or name another text")


def _opened(name: str, path: Path) -> IO[bytes]:
    """A file, unpacked as the ending of its name says."""
    packing = name.lower().rpartition(".")[2]
    if packing == "zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), 1 << 20)
    openers: dict[str, Callable[[Path], Any]] = {"gz": gzip.open, "xz": lzma.open, "bz2": BZ2File}
    opened: IO[bytes] = openers.get(packing, lambda at: at.open("rb"))(path)
    return opened


def _documents(file: IO[bytes], columns: Collection[str], known: dict[str, None]) -> Iterator[Row]:
    """The whole file as one row."""
    known["text"] = None
    yield "line 1", {"text": io.TextIOWrapper(file, "utf-8-sig").read()}


def _separated(separator: str, file: IO[bytes], columns: Collection[str], known: dict[str, None]) -> Iterator[Row]:
    """The rows of a file whose first line names its columns. Every value is text."""
    csv.field_size_limit(sys.maxsize)
    table = csv.reader(io.TextIOWrapper(file, "utf-8-sig", newline=""), delimiter=separator, strict=True)
    try:
        header = next((fields for fields in table if fields), [])
        known.update(dict.fromkeys(header))
        wanted = [(c, header.index(c)) for c in columns if c in header]
        for fields in table:
            if len(fields) > len(header):
                raise ValueError(f"line {table.line_num}: {len(fields)} fields where the header names {len(header)}")
            if fields:
                yield f"line {table.line_num}", {c: fields[i] for c, i in wanted if i < len(fields)}
    except csv.Error as error:
        raise ValueError(f"line {table.line_num}: {error}") from None


_READ: dict[str, Callable[[IO[bytes], Collection[str], dict[str, None]], Iterator[Row]]] = {
    "json": json_rows,
    "parquet": parquet_rows,
    "arrow": arrow_rows,
    "csv": partial(_separated, ","),
    "tsv": partial(_separated, "\t"),
    "text": _documents,
}


def _no_utf8(file: IO[bytes]) -> str:
    """The first line that is not UTF-8."""
    for number, line in enumerate(file, 1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            return f"line {number}: byte {line[error.start]:#04x} is not UTF-8"
    return "which is not UTF-8"
