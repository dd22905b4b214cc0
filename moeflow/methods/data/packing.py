"""Documents into rows of tokens: texts are read, joined, cut to one length and mixed by weight.

This module knows no example formats and no models. Suffixes: N sequences, L tokens each.
"""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeflow.methods.data.readers import Files, check_beginnings, named, reader, told
from moeflow.methods.graph import TOKENS, Sample
from moeflow.step import Context

Piece = tuple[list[int], list[int]]
"""The tokens of a document, and for each token 1 if it is learned and 0 if it is only read."""

Row = tuple[np.ndarray, np.ndarray]
"""Tokens int32 [L], and 1 or 0 for each as in `Piece`, uint8 [L]."""


@dataclass(frozen=True)
class Portion:
    """One text of a mixture, as it enters a step's key: without the text's location."""

    weight: float
    """Its fraction of the rows; the weights of all texts sum to one."""
    columns: tuple[str, ...] = ()
    """The columns to read; none: "text", or the reader's default column."""
    format: str = ""
    """What the columns mean for fine-tuning: "text", "instruction" or "chat"."""


Documents = Callable[[Files, Portion, Counter[str]], Iterator[list[Piece]]]
"""Reads a text: the pieces of each document in turn. It counts what it leaves out by reason: "examples without a response"."""


def fill(
    context: Context, texts: Sequence[Files], mix: tuple[Portion, ...], documents: Documents, sample: Sample,
    otherwise: str = "give more text, fewer sequences or another weight",
) -> np.ndarray:  # fmt: skip
    """Fill rows from every text by its weight, spread evenly. Write `tokens.npy` and `tokens.json`; return learned_NL, uint8.

    `tokens.npy`: int32 [N, L]; `tokens.json`: what came from each text, and what was left out. A row without learned tokens is
    skipped; its first token does not count, because nothing predicts it. Raises ValueError if there is too little text; the message
    has the number of missing tokens and `otherwise`, the way out.
    """
    shares = _shares([part.weight for part in mix], sample.sequences)
    parts, records, done = [], [], 0
    for files, part, share in zip(texts, mix, shares, strict=True):
        left_out: Counter[str] = Counter()
        rows: list[Row] = []
        used = skipped = 0
        for row, count in _packed(documents(files, part, left_out), sample.length, sample.group):
            if len(rows) == share:
                break
            if not row[1][1:].any():
                skipped += 1
                continue
            rows.append(row)
            used = count
            context.progress(done + len(rows), sample.sequences, "sequences")
        remarks = [f"{why}: {n:,} left out" for why, n in left_out.most_common(3)]
        remarks += [f"sequences in which nothing is learned: {skipped:,} left out"] * bool(skipped)
        if len(rows) < share:
            raise ValueError(
                f"{named(files)} gives {len(rows)} of {share} sequences of {sample.length} tokens: "
                + "; ".join([f"{(share - len(rows)) * sample.length:,} tokens are missing", otherwise, *remarks])
            )
        for remark in remarks:
            context.note(f"{named(files)}: {remark}")
        done += len(rows)
        parts.append(rows)
        record: dict[str, Any] = {"files": [os.path.basename(n) for n, _ in files], "columns": list(part.columns)}
        record |= {"format": part.format, "sequences": share, "documents": used}
        record |= {"left_out": dict(left_out.most_common(9)), "skipped": skipped}
        records.append({k: v for k, v in record.items() if v or k not in ("format", "left_out", "skipped")})
    ids, learned = zip(*_interleaved(parts), strict=True)
    np.save(context.out / TOKENS, np.stack(ids))
    (context.out / "tokens.json").write_text(json.dumps(records, indent=1) + "\n")
    return np.stack(learned)


def table(context: Context, files: Files, columns: Sequence[str]) -> Any:
    """The columns of a text's files as one `datasets.Dataset`. Raises ValueError if a file is damaged or lacks a column."""
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")  # the files are local already
    from datasets import concatenate_datasets, load_dataset
    from datasets.utils.logging import CRITICAL, disable_progress_bar, set_verbosity

    disable_progress_bar()
    set_verbosity(CRITICAL)  # what it logs of a damaged file, `told` says
    by_reader: dict[str, list[tuple[str, Path]]] = {}
    folder = Path(tempfile.mkdtemp(dir=context.scratch))
    for i, (name, path) in enumerate(files):  # readers choose by a file's ending, and blobs have none
        link = folder / f"{i:05d}-{os.path.basename(name)}"
        link.symlink_to(path)
        if path.stat().st_size or reader(name) not in ("json", "csv") or len(files) == 1:  # no rows, which these take for damage
            by_reader.setdefault(reader(name), []).append((name, link))
    sets = []
    for by, links in by_reader.items():
        options: dict[str, Any] = {"sample_by": "document"} if by == "text" else {}
        check_beginnings(links)
        with told(links, context.scratch):
            paths = [str(link) for _, link in links]
            dataset = load_dataset(by, data_files=paths, split="train", cache_dir=str(context.scratch), **options)
        if missing := [c for c in columns if c not in dataset.column_names]:
            has = ", ".join(dataset.column_names)
            raise ValueError(f"{named(files)} has no column {missing[0]!r}; it has: {has} (write URI#column)")
        sets.append(dataset.select_columns(list(columns)))
    return concatenate_datasets(sets)


def rows(context: Context, files: Files, dataset: Any, seed: int) -> Iterator[dict[str, Any]]:
    """The rows of a text's `datasets.Dataset`, shuffled. Raises ValueError for a row that is damaged: strings are checked late."""
    with told(files, context.scratch):
        yield from dataset.shuffle(seed=seed)


def words(value: Any, column: str, where: str) -> str:
    """One value of a column as text, "" for None. Raises ValueError for a list or dictionary, with `where`, the files' names."""
    if isinstance(value, list | dict):
        raise ValueError(f"column {column!r} of {where} holds a {type(value).__name__} and no text; name another (URI#column)")
    return "" if value is None else str(value)


def edges(tokenizer: Any, *, bos: bool, eos: bool) -> tuple[list[int], list[int]]:
    """The tokens before and after every document. Raises ValueError if the tokenizer lacks one that is asked for."""
    if bos and tokenizer.bos_token_id is None:
        raise ValueError("the tokenizer has no beginning-of-sequence token; pass bos=False")
    if eos and tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-sequence token; pass eos=False")
    return [tokenizer.bos_token_id] * bos, [tokenizer.eos_token_id] * eos


def _packed(documents: Iterator[list[Piece]], length: int, group: int) -> Iterator[tuple[Row, int]]:
    """Rows of `length` tokens, each with the number of documents read so far; see `Sample.group`."""
    ids: list[int] = []
    learned: list[int] = []
    for count, pieces in enumerate(documents, 1):
        for piece, flags in pieces:
            ids += piece
            learned += flags
        while len(ids) >= length:
            yield (np.array(ids[:length], dtype=np.int32), np.array(learned[:length], dtype=np.uint8)), count
            ids, learned = ids[length:], learned[length:]
        if group and count % group == 0:
            ids, learned = [], []


def _shares(weights: list[float], total: int) -> list[int]:
    """Whole numbers in proportion to the weights, which sum to `total` (largest remainders)."""
    exact = [w * total for w in weights]
    shares = [int(e) for e in exact]
    for i in sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])[: total - sum(shares)]:
        shares[i] += 1
    return shares


def _interleaved(parts: list[list[Row]]) -> list[Row]:
    """All rows, with each part's spread evenly, so that any run of rows has the mixture."""
    placed = [((i + 0.5) / len(rows), p, row) for p, rows in enumerate(parts) for i, row in enumerate(rows)]
    return [row for _, _, row in sorted(placed, key=lambda at: at[:2])]
