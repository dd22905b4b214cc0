"""A snapshot of what is stored, from listings: a plan of thousands of steps makes a few requests, none per step.

Manifests are the authority. Markers are empty objects whose names repeat what a plan needs of a manifest; a manifest
without a marker (its writer died between the two) is read.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from moeflow.store.blobs import Blobs
from moeflow.store.manifest import Manifest
from moeflow.store.names import key_of

THREADS = 32
MARKER = re.compile(r"found/(?P<key>[^/]+)/(?P<content>[^-/]+)-(?P<digest>[^-/]+)-(?P<source>[^-/]+)-(?P<size>[0-9]{1,18})")


@dataclass(frozen=True)
class Listed:
    """What a listing says about one artifact."""

    digest: str  # of its contents
    source: str  # first 8 hex digits of the digest of the function that made it
    bytes: int  # of all its files


@dataclass(frozen=True)
class Index:
    keys: dict[str, Listed] = field(default_factory=dict)
    contents: dict[str, str] = field(default_factory=dict)  # content key -> a step's key that holds its result
    modified: dict[str, float] = field(default_factory=dict)  # by key: when the manifest was written, seconds since the epoch


def read_index(blobs: Blobs, steps: Sequence[str], manifests: Callable[[Iterable[str]], dict[str, Manifest]]) -> Index:
    """`manifests`: reads those of many keys."""
    with ThreadPoolExecutor(THREADS) as pool:
        # list all steps of a verb at once ("calibrate."): another request takes longer than reading names that are not wanted
        verbs = sorted({s.partition(".")[0] + ("." if "." in s else "-") for s in steps})
        stored, marked = (pool.map(lambda p: [*blobs.list(p)], [f"{kind}/{v}" for v in verbs]) for kind in ("manifests", "found"))
        index, wanted = Index(), set(steps)
        for entry in (e for page in stored for e in page):
            key = key_of(entry.name)
            if key.rpartition("-")[0] in wanted:
                index.modified[key] = entry.modified
        for entry in (e for page in marked for e in page):
            if (match := MARKER.fullmatch(entry.name)) and match["key"] in index.modified:  # else its manifest is read
                _add(index, match["key"], match["content"], Listed(match["digest"], match["source"], int(match["size"])))
    for key, m in manifests(k for k in index.modified if k not in index.keys).items():
        _add(index, key, m.content.rpartition("-")[2] or "0", Listed(m.digest, m.source[:8] or "0", m.bytes))
    return index


def _add(index: Index, key: str, content: str, listed: Listed) -> None:
    index.keys[key] = listed
    if content != "0":
        index.contents.setdefault(f"{key.rpartition('-')[0]}-{content}", key)
