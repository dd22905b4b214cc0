"""Garbage collection: lists what nothing needs any more, and deletes it on request. Knows no pipelines.

Everything that a version reaches stays: its key, its reports, and everything upstream of them. Everything younger than
the grace period stays too, with everything upstream, because a running pipeline has no version yet.
"""

import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from moeflow.store import names, versions
from moeflow.store.names import Entry
from moeflow.store.store import Store

DAY = 86400


@dataclass(frozen=True)
class Garbage:
    grace: float  # seconds
    manifests: tuple[str, ...]  # keys
    blobs: tuple[Entry, ...]
    partials: tuple[str, ...]  # keys of interrupted steps that no run resumed
    leftovers: tuple[Entry, ...]  # unfinished writes, and markers of deleted manifests
    bytes: int  # freed by deleting it all
    broken: tuple[str, ...] = ()  # keys that stay but cannot be read: a blob is missing or cut short


def gc(store: Store, grace: float = 7 * DAY) -> Garbage:
    """List what could be deleted. `grace`: seconds, below two days only while nothing runs. Raises ValueError."""
    if grace < 0:
        raise ValueError(f"grace is {grace} seconds; give 0 or more")
    before = time.time() - grace
    # In this order, so that what is committed or published between two listings counts as needed, not as garbage.
    blobs = {e.name: e for e in store.blobs.list("blobs/")}
    markers = [*store.blobs.list("found/")]
    stored = {names.key_of(e.name): e for e in store.blobs.list("manifests/")}
    published = [k for v in versions.list(store) for k in (v.key, *v.reports)]
    young = [k for k, e in stored.items() if e.modified >= before]
    kept = versions.reach(store, [*published, *young])
    sizes = {names.blob(f.sha256): f.size for m in kept.values() for f in m.files.values()}
    unused = tuple(e for n, e in blobs.items() if n not in sizes and e.modified < before)
    partial: dict[str, list[Entry]] = defaultdict(list)
    for entry in store.blobs.list("partial/"):
        partial[entry.name.split("/")[1]].append(entry)
    stale = {k: es for k, es in partial.items() if max(e.modified for e in es) < before}
    leftovers = [e for e in store.blobs.list("halves/") if e.modified < before]
    leftovers += [e for e in markers if e.name.split("/")[1] not in stored and e.modified < before]
    lost = {n for n, size in sizes.items() if n not in blobs or blobs[n].size != size}
    broken = [k for k, m in kept.items() if any(names.blob(f.sha256) in lost for f in m.files.values())] if lost else []
    total = sum(e.size for e in (*unused, *leftovers, *(e for es in stale.values() for e in es)))
    dead = tuple(sorted(stored.keys() - kept.keys()))
    return Garbage(grace, dead, unused, tuple(sorted(stale)), tuple(leftovers), total, tuple(sorted(broken)))


def delete(store: Store, garbage: Garbage) -> Garbage:
    """Delete what is in `garbage` and still is garbage; return what was deleted. Raises StoreError."""
    now = gc(store, garbage.grace)
    dead = {*garbage.manifests} & {*now.manifests}
    blobs, leftovers = _both(garbage.blobs, now.blobs), _both(garbage.leftovers, now.leftovers)
    stale = {*garbage.partials} & {*now.partials}
    partial = [e for e in store.blobs.list("partial/") if e.name.split("/")[1] in stale]
    # Manifests first: an artifact without its blobs must not look stored.
    store.blobs.delete(names.manifest(k) for k in sorted(dead))
    store.blobs.delete([e.name for e in store.blobs.list("found/") if e.name.split("/")[1] in dead])
    store.blobs.delete(e.name for e in (*blobs, *leftovers, *partial))
    store.blobs.sweep(time.time() - garbage.grace)
    store.node.sweep()
    total = sum(e.size for e in (*blobs, *leftovers, *partial))
    gone = tuple(sorted(dead)), blobs, tuple(sorted(stale)), leftovers
    return Garbage(garbage.grace, *gone, total, now.broken)


def _both(listed: Iterable[Entry], now: Iterable[Entry]) -> tuple[Entry, ...]:
    still = {e.name for e in now}
    return tuple(e for e in listed if e.name in still)
