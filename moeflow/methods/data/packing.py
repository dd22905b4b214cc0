"""Documents into rows of tokens: texts are read, joined, cut to one length and mixed by weight.

This module knows no example formats and no models. Suffixes: N sequences, L tokens each.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moeflow.methods.data.readers import Files, named
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
    """The columns to read; none: "text"."""
    format: str = ""
    """What the columns mean: "text", "instruction", "chat", "calls" (a question, tools, calls), or none, which is text."""


class LeftOut(Exception):
    """A row that is left out. The message names the kind of such rows, in the plural; a second word may say more of this one."""


OTHERS = ", and others"


@dataclass
class Tally:
    """How many rows of a text were left out, for each reason, and what else there is to say about others."""

    left_out: Counter[str] = field(default_factory=Counter)
    remarks: Counter[str] = field(default_factory=Counter)
    _more: dict[str, str] = field(default_factory=dict)  # what the first of a kind said, and whether others said something else

    def leave_out(self, why: LeftOut) -> None:
        kind, more = (*map(str, why.args), "")[:2]
        self.left_out[kind] += 1
        if not self._more.setdefault(kind, more).startswith(more):
            self._more[kind] = f"{self._more[kind].removesuffix(OTHERS)}{OTHERS}"

    def reasons(self) -> dict[str, int]:
        """The rows that were left out, by their kind with what the first of them said; the most frequent first."""
        return {f"{kind} ({more})" if (more := self._more[kind]) else kind: n for kind, n in self.left_out.most_common()}

    def said(self) -> list[str]:
        left_out = [f"{why}: {n:,} left out" for why, n in self.reasons().items()]
        return left_out + [f"{what}: {n:,}" for what, n in self.remarks.items()]


Documents = Callable[[Files, Portion, Tally], Iterator[list[Piece]]]
"""Reads a text: the pieces of each document in turn. It counts what it leaves out."""


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
        tally = Tally()
        rows: list[Row] = []
        used = skipped = 0
        for row, count in _packed(documents(files, part, tally), sample.length, sample.group):
            if len(rows) == share:
                break
            if not row[1][1:].any():
                skipped += 1
                continue
            rows.append(row)
            used = count
            context.progress(done + len(rows), sample.sequences, "sequences")
        remarks = tally.said() + [f"sequences in which nothing is learned: {skipped:,} left out"] * bool(skipped)
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
        record |= {"left_out": tally.reasons(), "skipped": skipped}
        records.append({k: v for k, v in record.items() if v or k not in ("format", "left_out", "skipped")})
    ids, learned = zip(*_interleaved(parts), strict=True)
    np.save(context.out / TOKENS, np.stack(ids))
    (context.out / "tokens.json").write_text(json.dumps(records, indent=1) + "\n")
    return np.stack(learned)


def words(value: Any) -> str:
    """One value of a column as text, "" for None."""
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
