"""A look at the beginning of a text when the graph is built, so that what cannot be read is told before anything runs.

Only files in folders of this machine are looked at. Whatever is raised here, the step that reads the text would raise too.
"""

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from moeflow.methods.data.chats import chat_of, checked
from moeflow.methods.data.packing import LeftOut
from moeflow.methods.data.readers import Files, named, rows_of
from moeflow.methods.data.rows import check_columns
from moeflow.text_files import ending

if TYPE_CHECKING:
    from moeflow.sources import Source

FILES, ROWS = 16, 1000  # so many of a text's files, and rows of each, are looked at
WHOLE = 16 << 20  # bytes; a larger file whose reader takes it whole is not looked at
BY_ROWS = (".jsonl", ".ndjson", ".parquet", ".arrow", ".csv", ".tsv")
"""The endings of files that are read row by row."""


def look(source: "Source", kinds: Mapping[str, str], *, chat: bool) -> None:
    """Read the first rows of the first files of a text; of each row the columns of `kinds`, which say what each holds.

    `chat`: whether a row is a conversation. Raises ValueError, with file and line, for what is damaged or is not what its column
    should hold, for a column that a file lacks, and for a small text with no conversation, or no letter, at all.
    """
    places = [(f.name, source.path(f.name), f.size) for f in source.files[:FILES]]
    files: Files = [(n, p) for n, p, size in places if p is not None and size and (size <= WHOLE or ending(n) in BY_ROWS)]
    whole, count, left_out = len(files) == sum(f.size > 0 for f in source.files), 0, Counter[str]()
    all_known: dict[str, None] = {}
    needed = [c for c, kind in kinds.items() if kind != "tools"]  # a file may lack the column of tools
    for name, path in files:
        known: dict[str, None] = {}
        rows, read = rows_of(name, path, kinds, known), 0
        for at, row in rows:
            values = checked({**kinds}, {c: row.get(c) for c in kinds}, name, at)
            read += 1
            if chat:
                try:
                    chat_of(values, {**kinds})
                except LeftOut as why:
                    left_out[str(why.args[0])] += 1
            elif not any(str(values[c] or "").strip() for c in needed):
                left_out["empty rows"] += 1
            if read >= ROWS and all(c in known for c in needed):
                whole = False
                break
        if read or known:
            check_columns(name, needed, known)
        count += read
        all_known |= known
    if not whole:
        return
    if not count:
        raise ValueError(f"{named(files)}, which has no rows, is empty; name a text that holds some")
    check_columns(named(files), [*kinds], all_known)
    if left_out.total() == count:
        reasons = "; ".join(f"{kind}: {n:,} left out" for kind, n in left_out.most_common())
        what = "conversation" if chat else "text"
        raise ValueError(f"{named(files)} has no {what} in column {needed[0]!r}: {reasons}; name another text or column")
