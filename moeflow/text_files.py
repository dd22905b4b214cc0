"""Which files hold text, by the ending of their names."""

TABLES = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".csv", ".tsv")
DOCUMENTS = (".txt", ".md", ".py")
PACKED = (".gz", ".zst", ".xz", ".bz2")
"""The endings of packed files, behind those."""


def ending(name: str) -> str:
    """A file's ending in lower case, without that of its packing: ".jsonl" of "a.JSONL.gz", "" if there is none."""
    name = name.rpartition("/")[2].lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return f".{name.rpartition('.')[2]}" if "." in name else ""
