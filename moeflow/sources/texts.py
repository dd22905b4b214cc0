"""Texts by name: one string names the sources, the columns that are read of them, and their weights.

    URI[#column[+column...]][*weight][, URI...]      for example  code.jsonl#text*2,s3://bucket/wiki/*.parquet#body

The name of a known data set (`NAMED`) stands for its URI and columns: `alpaca*2,metamathqa`. The string is parsed when a `Texts` is
made, and its sources are pinned when `entries` is first called. No text is read here.
"""

import math
import re
from dataclasses import dataclass
from functools import cached_property

from moeflow.sources.source import Source, pin

WEIGHT = re.compile(r"\*(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)$")


@dataclass(frozen=True)
class Named:
    """A data set on the hub that has a short name here."""

    uri: str
    columns: tuple[str, ...]
    format: str  # what the columns are: "instruction" (prompts, and last the response) or "chat" (messages)


NAMED = {
    "alpaca": Named("hf://datasets/tatsu-lab/alpaca@main/data/train-*.parquet", ("instruction", "input", "output"), "instruction"),
    "metamathqa": Named("hf://datasets/meta-math/MetaMathQA@main/MetaMathQA-395K.json", ("query", "response"), "instruction"),
    "mathinstruct": Named("hf://datasets/TIGER-Lab/MathInstruct@main/MathInstruct.json", ("instruction", "output"), "instruction"),
    "magicoder": Named(
        "hf://datasets/ise-uiuc/Magicoder-Evol-Instruct-110K@main/data-evol_instruct-decontaminated.jsonl",
        ("instruction", "response"),
        "instruction",
    ),
    "tulu3": Named("hf://datasets/allenai/tulu-3-sft-mixture@main/data/train-*.parquet", ("messages",), "chat"),
}
"""The data sets with a short name; files and columns are those that other programs use. A local file is written ./alpaca."""


@dataclass(frozen=True)
class TextEntry:
    """One text of a mixture, pinned."""

    source: Source
    columns: tuple[str, ...]  # none: the text itself, or the column that the reader takes by default
    weight: float
    format: str = ""  # of a data set with a short name, if its own columns are read


@dataclass(frozen=True)
class Texts:
    """One or more texts, by name. Raises ValueError for a string that cannot be parsed."""

    spec: str

    def __post_init__(self) -> None:
        _ = self._parsed

    def entries(self) -> tuple[TextEntry, ...]:
        """Each source, pinned. Raises MissingSource."""
        return self._pinned

    def each(self) -> tuple["Texts", ...]:
        """Each text by itself."""
        return tuple(Texts(part.strip()) for part in self.spec.split(","))

    @property
    def is_tokens(self) -> bool:
        """Is this a ready-made matrix of token ids, one local `.npy` file?"""
        uris = [p[0] for p in self._parsed]
        return len(uris) == 1 and "://" not in uris[0] and uris[0].endswith(".npy")

    @cached_property
    def _pinned(self) -> tuple[TextEntry, ...]:
        return tuple(TextEntry(pin(p[0], kind="data"), *p[1:]) for p in self._parsed)

    @cached_property
    def _parsed(self) -> tuple[tuple[str, tuple[str, ...], float, str], ...]:
        return tuple(_parse(part.strip(), self.spec) for part in self.spec.split(","))


def _parse(part: str, spec: str) -> tuple[str, tuple[str, ...], float, str]:
    weight = 1.0
    if match := WEIGHT.search(part):
        weight, part = float(match[1]), part[: match.start()]
    uri, _, columns = part.partition("#")
    if not uri:
        raise ValueError(f"texts {spec!r}: an entry names no source; write URI[#column[+column]][*weight], ...")
    if not (weight > 0 and math.isfinite(weight)):
        raise ValueError(f"texts {spec!r}: the weight of {uri} is {weight:g}; weights are numbers above 0")
    names = tuple(c for c in columns.split("+") if c)
    if "#" in part and not names:
        raise ValueError(f"texts {spec!r}: {uri}# names no column; write {uri}#text or leave the # away")
    if (known := NAMED.get(uri)) is None:
        return uri, names, weight, ""
    return known.uri, names or known.columns, weight, "" if names else known.format
