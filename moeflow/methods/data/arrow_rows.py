"""The rows of Parquet and Arrow files, as they were before Arrow gave all objects of a column the same fields.

Where one row's object has a field and another row's has not, Arrow adds it to the other as a null. Such nulls go, and with them
those that were written as nulls, because nothing tells them apart.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from moeflow.methods.data.json_rows import Row

BATCH = 256  # rows that are unpacked at once


def parquet_rows(file: IO[bytes], columns: Collection[str], known: dict[str, None]) -> Iterator[Row]:
    """Every row of a Parquet file with those of the columns that it has; the names of all columns are added to `known`.

    Only these columns are read. Raises ValueError for a damaged file.
    """
    from pyarrow.parquet import ParquetFile

    with _told("Parquet"):
        table = ParquetFile(file)
        known.update(dict.fromkeys(table.schema_arrow.names))
        if wanted := [c for c in columns if c in known]:
            yield from _rows(table.iter_batches(BATCH, columns=wanted), wanted)


def arrow_rows(file: IO[bytes], columns: Collection[str], known: dict[str, None]) -> Iterator[Row]:
    """The same of an Arrow stream, as `Dataset.save_to_disk` writes it, or of an Arrow file."""
    import pyarrow as pa

    with _told("Arrow"):
        try:
            stream: Any = pa.ipc.open_stream(file)
            batches: Iterable[Any] = stream
        except pa.ArrowInvalid:
            file.seek(0)
            stream = pa.ipc.open_file(file)
            batches = (stream.get_batch(i) for i in range(stream.num_record_batches))
        known.update(dict.fromkeys(stream.schema.names))
        if wanted := [c for c in columns if c in known]:
            yield from _rows((batch.select(wanted) for batch in batches), wanted)


def _rows(batches: Iterable[Any], columns: list[str]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        by_column = []
        for name in columns:
            values, plain = batch.column(name), _plain(batch.schema.field(name).type)
            by_column.append([plain(v) for v in values.to_pylist()])
        for row in zip(*by_column, strict=True):
            number += 1
            yield f"row {number}", dict(zip(columns, row, strict=True))


def _plain(kind: Any) -> Callable[[Any], Any]:
    """What makes of a value of this Arrow type what was written: objects without nulls, and values of the type JSON parsed."""
    from pyarrow import types

    if getattr(kind, "extension_name", "") == "arrow.json":
        return lambda value: None if value is None else json.loads(value)
    if types.is_struct(kind):
        fields = {field.name: _plain(field.type) for field in kind}
        return lambda value: value and {name: made(value[name]) for name, made in fields.items() if value[name] is not None}
    if types.is_map(kind):
        of_value = _plain(kind.item_type)
        return lambda value: None if value is None else {key: of_value(v) for key, v in value}
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        of_item = _plain(kind.value_type)
        return lambda value: None if value is None else [of_item(v) for v in value]
    return lambda value: value


@contextmanager
def _told(form: str) -> Iterator[None]:
    """Turn what Arrow raises about a damaged file into a ValueError."""
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError) as error:
        raise ValueError(f"which should be {form}, is damaged ({' '.join(str(error).split())})") from None
