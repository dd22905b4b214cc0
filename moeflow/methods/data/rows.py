"""The rows of a text, kept on the scratch disk, so that they can be read in any order and more than once, however many they are."""

import json
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moeflow.methods.data.readers import Files, named, rows_of

Checked = Callable[[dict[str, Any], str, str], dict[str, Any]]
"""Makes of a row's values those that are kept, given its file and where it stands there. Raises ValueError for a bad row."""


class Rows:
    """The rows of one text, every file read once, and of each row the columns that are asked for; None where a row lacks one.

    `optional`: columns that a file may lack, though not every file. Raises ValueError for files that are damaged, that lack a
    column or hold no rows, and for rows that `checked` refuses.
    """

    def __init__(
        self,
        files: Files,
        columns: tuple[str, ...],
        path: Path,
        checked: Checked = lambda row, *_: row,
        optional: tuple[str, ...] = (),
    ) -> None:
        self._path = path
        self._ends = array("q", [0])
        all_known: dict[str, None] = {}
        with path.open("wb") as out:
            for name, file in files:
                known: dict[str, None] = {}
                before = len(self)
                for at, row in rows_of(name, file, columns, known):
                    kept = checked({c: row.get(c) for c in columns}, name, at)
                    out.write(json.dumps(kept, default=str).encode())
                    self._ends.append(out.tell())
                if len(self) > before or known:
                    check_columns(name, [c for c in columns if c not in optional], known)
                all_known |= known
        if not len(self):
            raise ValueError(f"{named(files)}, which has no rows, is empty; name a text that holds some")
        check_columns(named(files), columns, all_known)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def shuffled(self, seed: int) -> Iterator[dict[str, Any]]:
        """All rows, in an order that the seed decides."""
        with self._path.open("rb") as file:
            for i in np.random.default_rng(seed).permutation(len(self)):
                file.seek(self._ends[i])
                yield json.loads(file.read(self._ends[i + 1] - self._ends[i]))


def check_columns(name: str, columns: tuple[str, ...] | list[str], known: dict[str, None]) -> None:
    """Raise ValueError, with the columns that are known, if a file or a text lacks one of these."""
    if missing := [c for c in columns if c not in known]:
        raise ValueError(f"{name} has no column {missing[0]!r}; it has: {', '.join(known) or 'none'} (write URI#column)")
