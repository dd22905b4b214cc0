"""Which files of a folder are its text: those of a data set as it is cloned, without what is written about it."""

import re
from collections.abc import Iterable

from moeflow.store.errors import MissingSource
from moeflow.text_files import DOCUMENTS, PACKED, TABLES, ending

ABOUT = re.compile(
    r"(readme|licen[cs]e|notice|copying|citation|contributing|changelog|requirements)\b.*"
    r"|(dataset_infos?|dataset_dict|state|config|croissant)\.json|cache-.*\.arrow",
    re.IGNORECASE,
)
"""The names of files that are written about a data set."""


def data_files(names: Iterable[str], where: str) -> list[str]:
    """The data files among the files of a folder. Raises MissingSource if there are none.

    Files about the data (README.md, dataset_infos.json, a licence) are none, nor are pages and scripts beside tables.
    """
    files = [n for n in names if ending(n) in (*TABLES, *DOCUMENTS) and not ABOUT.fullmatch(n.rpartition("/")[2])]
    if any(ending(n) in TABLES for n in files):
        files = [n for n in files if ending(n) not in (".md", ".py")]
    if not files:
        raise MissingSource(
            f"{where} holds no text; know {', '.join((*TABLES, *DOCUMENTS))}, and these packed as {', '.join(PACKED)}"
        )
    return files
