"""A snapshot of what is stored, from listings: a plan of thousands of steps asks for a few pages, for no single step.

Manifests are the authority. Markers are empty objects whose names say what a manifest would; a manifest without one
(its writer died in between) is read.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from moeflow.store.blobs import Blobs
from moeflow.store.manifest import Manifest
from moeflow.store.names import Entry

THREADS = 32


@dataclass(frozen=True)
class Listed:
    """What a listing tells of one artifact."""

    digest: str  # of its contents
    source: str  # first 8 hex digits of the digest of the function that made it
    bytes: int  # of all its files


@dataclass(frozen=True)
class Index:
    keys: dict[str, Listed] = field(default_factory=dict)
    contents: dict[str, str] = field(default_factory=dict)  # recipe on contents -> a key that holds its result
    modified: dict[str, float] = field(default_factory=dict)  # age of the manifests, seconds since the epoch


def read_index(blobs: Blobs, steps: Sequence[str], manifests: Callable[[Iterable[str]], dict[str, Manifest]]) -> Index:
    def listed(prefix: str) -> list[Entry]:
        return [*blobs.list(prefix)]

    with ThreadPoolExecutor(THREADS) as pool:
        # all steps of a verb at once ("calibrate."): a request takes longer than the names that come beside the wanted ones
        verbs = sorted({s.partition(".")[0] + ("." if "." in s else "-") for s in steps})
        stored = pool.map(listed, [f"manifests/{v}" for v in verbs])
        marked = pool.map(listed, [f"found/{v}" for v in verbs])
        index, wanted = Index(), set(steps)
        for entry in (e for page in stored for e in page):
            key = entry.name.removeprefix("manifests/").removesuffix(".json")
            if key.rpartition("-")[0] in wanted:
                index.modified[key] = entry.modified
        for entry in (e for page in marked for e in page):
            _, key, about = entry.name.split("/")
            if key in index.modified:
                content, digest, source, size = about.split("-")
                _add(index, key, content, Listed(digest, source, int(size)))
    for key, m in manifests(k for k in index.modified if k not in index.keys).items():
        _add(index, key, m.content.rpartition("-")[2] or "0", Listed(m.digest, m.source[:8] or "0", m.bytes))
    return index


def _add(index: Index, key: str, content: str, found: Listed) -> None:
    index.keys[key] = found
    if content != "0":
        index.contents.setdefault(f"{key.rpartition('-')[0]}-{content}", key)
