"""Texts by name: one string names the sources, the columns that are read of them, and their weights.

    URI[#column[+column...]][*weight][, URI...]      for example  code.jsonl#text*2,s3://bucket/wiki/*.parquet#body

The name of a known data set (`NAMED`) stands for its URI and columns, that of a mixture (`MIXTURES`) for several data sets:
`mix-agent*3,alpaca`. `traffic:FILE` is what a serving engine has recorded of its requests, by itself.
The string is parsed when a `Texts` is made, and its sources are pinned when `entries` is first called. No text is read here.
"""

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

from moeflow.sources.source import Source, pin

TRAFFIC = "traffic:"
"""What a string begins with that names what an engine recorded, instead of texts."""
WEIGHT = re.compile(r"\*(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)$")


@dataclass(frozen=True)
class Named:
    """A data set on the hub that has a short name here."""

    uri: str
    columns: tuple[str, ...]
    format: str
    """What the columns are: "text", "instruction" (prompts, and last the response), "chat" (messages, or the same to be rendered by
    the chat template) or "calls" (a question, tools, and the calls that answer it)."""


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
    "evol-codealpaca": Named("hf://datasets/theblackcat102/evol-codealpaca-v1@main/train.jsonl", ("instruction", "output"), "chat"),
    "xlam": Named(
        "hf://datasets/Salesforce/xlam-function-calling-60k@main/xlam_function_calling_60k.json",
        ("query", "tools", "answers"),
        "calls",
    ),
    "swe-smith": Named("hf://datasets/SWE-bench/SWE-smith-trajectories@main/data/tool-*.parquet", ("messages",), "chat"),
    **{
        f"thoughts-{part}": Named(f"hf://datasets/open-r1/Mixture-of-Thoughts@main/{part}/train-*.parquet", ("messages",), "chat")
        for part in ("code", "math", "science")
    },
    "c4-en": Named("hf://datasets/allenai/c4@main/en/c4-train.00000-of-01024.json.gz", ("text",), "text"),
}
"""The data sets with a short name; files and columns are those that other programs use. A local file is written ./alpaca."""

MIXTURES = {
    "mix-agent": {"evol-codealpaca": 2, "xlam": 1, "swe-smith": 1},
    "mix-reasoning": {"evol-codealpaca": 1, "thoughts-code": 1, "thoughts-math": 1, "thoughts-science": 1},
    "mix-general": {"evol-codealpaca": 1, "xlam": 1, "thoughts-math": 1, "c4-en": 1},
}
"""Mixtures for calibration with a name, by the weight of each data set in them. The first two are what coding agents and reasoning
models are publicly pruned on; the third has code, tool calls, mathematics and prose in equal parts."""


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
        if self.is_traffic and len(self._parsed) > 1:
            raise ValueError(f"texts {self.spec!r}: {TRAFFIC}FILE stands alone; several files are a folder or a glob")
        if self.is_traffic and (self._parsed[0][1] or WEIGHT.search(self.spec)):
            raise ValueError(f"texts {self.spec!r}: {TRAFFIC}FILE has neither columns nor a weight; leave them away")

    def entries(self) -> tuple[TextEntry, ...]:
        """Each source, pinned; those on this machine first. Raises MissingSource."""
        return self._pinned

    def check_local(self) -> None:
        """Pin those sources that lie on this machine, and ask nobody for the others. Raises MissingSource."""
        _ = self._local

    def each(self) -> tuple["Texts", ...]:
        """Each text by itself."""
        return tuple(Texts(part) for part in _parts(self.spec))

    @property
    def is_tokens(self) -> bool:
        """Is this a ready-made matrix of token ids, one local `.npy` file?"""
        uris = [p[0] for p in self._parsed]
        return len(uris) == 1 and "://" not in uris[0] and uris[0].endswith(".npy") and not uris[0].startswith(TRAFFIC)

    @property
    def is_traffic(self) -> bool:
        """Is this what a serving engine has recorded of its requests (docs/traffic.md)?"""
        return any(p[0].startswith(TRAFFIC) for p in self._parsed)

    @cached_property
    def files(self) -> frozenset[str]:
        """By what their files are known (`SourceFile.known_by`). Raises MissingSource."""
        return frozenset(word for e in self.entries() for f in e.source.files for word in f.known_by(e.source.uri))

    @cached_property
    def _local(self) -> dict[int, TextEntry]:
        """Those on this machine, by their place among all."""
        return {i: self._entry(i) for i, (uri, *_) in enumerate(self._parsed) if "://" not in uri}

    @cached_property
    def _pinned(self) -> tuple[TextEntry, ...]:
        local = self._local
        return tuple(local.get(i) or self._entry(i) for i in range(len(self._parsed)))

    def _entry(self, i: int) -> TextEntry:
        uri, columns, weight, format = self._parsed[i]
        return TextEntry(pin(uri.removeprefix(TRAFFIC), kind="data"), columns, weight, format)

    @cached_property
    def _parsed(self) -> tuple[tuple[str, tuple[str, ...], float, str], ...]:
        return tuple(_parse(part, self.spec) for part in _parts(self.spec))


class NamesFiles(ABC):
    """Options that name texts or files among other things."""

    @abstractmethod
    def check_files(self) -> None:
        """Raise MissingSource, or what reading raises, for one that should be on this machine and is not; nobody else is asked."""


def _parts(spec: str) -> list[str]:
    """The entries of a string, with the data sets of a mixture in place of its name; their weights sum to its own."""
    parts = []
    for part in (p.strip() for p in spec.split(",")):
        name, weight = WEIGHT.sub("", part), WEIGHT.search(part)
        mixture = MIXTURES.get(name, {})
        total = sum(mixture.values())
        parts += [f"{n}*{(float(weight[1]) if weight else 1.0) * w / total!r}" for n, w in mixture.items()] or [part]
    return parts


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
