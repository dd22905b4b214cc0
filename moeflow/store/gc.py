"""Garbage collection: lists what nothing needs any more, and deletes it on request. Knows no pipelines.

Everything that a version reaches stays: its key, its reports, and everything upstream of them; so does what a run that is under
way relies on (`runs.py`). What no version ever reached stays for a grace period, because an interrupted run goes on from it.
All times are the server's.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from moeflow.store import labels, names, runs, versions
from moeflow.store.manifest import Manifest
from moeflow.store.names import Entry, split_part
from moeflow.store.store import RENEW, THREADS, Store
from moeflow.store.versions import Version

DAY = 86400


@dataclass(frozen=True)
class Policy:
    """What may go. `grace`: seconds for which stays what no version reached, 0 or more.

    `keep`: the newest versions of each name that stay, beside labelled ones and those that a rollback would return to; None keeps
    all. `results`: of the versions only their own files and reports stay, not what they were made from. `only`: names a version
    that goes, alone. `name`: `keep` is of the versions of this name; "" of all names.
    """

    grace: float = 7 * DAY
    keep: int | None = None
    results: bool = False
    only: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        if self.grace < 0:
            raise ValueError(f"grace is {self.grace} seconds; give 0 or more")
        if self.keep is not None and self.keep < 1:
            raise ValueError(f"keep is {self.keep}; keep 1 version of each name or more, and remove single ones with `moeflow rm`")

    def leaving(self, listed: Sequence[Version], spared: Iterable[str] = ()) -> tuple[Version, ...]:
        """The versions that go; `spared`: those that a rollback returns to. Raises ValueError for one that a label points at."""
        if self.only:
            gone = tuple(v for v in listed if v.ref == self.only)
            if gone and gone[0].labels:
                raise ValueError(f"{' and '.join(gone[0].labels)} is {self.only}: promote another version first, or keep it")
            return gone
        if self.keep is None:
            return ()
        newest: dict[str, list[int]] = defaultdict(list)
        for v in listed:
            newest[v.name].append(v.n)
        last = {name: sorted(ns)[-self.keep :] for name, ns in newest.items()}
        spared = {*spared}
        mine = [v for v in listed if self.name in ("", v.name)]
        return tuple(v for v in mine if v.n not in last[v.name] and not v.labels and v.ref not in spared)


@dataclass(frozen=True)
class Garbage:
    policy: Policy
    versions: tuple[Version, ...]
    manifests: tuple[str, ...]  # keys
    blobs: tuple[Entry, ...]
    partials: tuple[str, ...]  # keys of interrupted steps that no run resumed
    leftovers: tuple[Entry, ...]  # unfinished writes, and markers of deleted manifests
    bytes: int  # freed by deleting it all
    broken: tuple[str, ...] = ()  # keys that stay but cannot be read: a blob is missing or cut short
    runs: int = 0  # under way
    origins: Mapping[str, Manifest] = field(default_factory=dict)  # what versions that stay were made from, and what goes

    @property
    def empty(self) -> bool:
        return not (self.versions or self.manifests or self.blobs or self.partials or self.leftovers)


def gc(store: Store, policy: Policy = Policy()) -> Garbage:
    """List what could be deleted. Raises ValueError."""
    now = store.blobs.now()
    # In this order, so that what is committed or published between two listings counts as needed, not as garbage.
    blobs = {e.name: e for e in store.blobs.list("blobs/")}
    markers = [*store.blobs.list("found/")]
    stored = {names.key_of(e.name): e for e in store.blobs.list("manifests/")}
    live = runs.live(store, now)  # before the versions: a run publishes its version, and only then ends its mark
    listed = versions.list(store)
    leaving = policy.leaving(listed, _returned_to(store) if policy.keep is not None else ())
    staying = [k for v in listed if v not in leaving for k in (v.key, *v.reports)]
    left = [k for v in leaving for k in (v.key, *v.reports)]
    before = now - policy.grace

    origins = versions.reach(store, staying)
    once = origins.keys() | versions.reach(store, left).keys()  # what some version reached
    young = [k for k, e in stored.items() if e.modified >= before and k not in once]
    if policy.results:
        own = {split_part(k)[0] for k in staying}
        kept = {k: m for k, m in origins.items() if k in own}
    else:
        kept = dict(origins)
    kept |= versions.reach(store, [*young, *live.keys])
    dead = stored.keys() - kept.keys()
    if policy.only:
        dead &= once - origins.keys()

    sizes = {names.blob(f.sha256): f.size for m in kept.values() for f in m.files.values()}
    # A run finds blobs that nothing names, too, and relies on them before its manifest says so; it touches those of a day.
    grace = max(policy.grace, 2 * RENEW) if live.runs else policy.grace
    unused = [e for n, e in blobs.items() if n not in sizes and e.modified < now - grace]
    if policy.only or policy.keep is not None or policy.results:
        freed = [e for e in _freed(store, blobs, sizes, dead) if not live.runs or e.modified < now - 2 * RENEW]
        unused = [*{e.name: e for e in (*freed, *(() if policy.only else unused))}.values()]
    partial: dict[str, list[Entry]] = defaultdict(list)
    leftovers: list[Entry] = []
    if not policy.only:
        for entry in store.blobs.list("partial/"):
            partial[entry.name.split("/")[1]].append(entry)
        idle = now - _idle(policy, live.runs)
        leftovers = [e for kind in ("halves/", "claims/") for e in store.blobs.list(kind) if e.modified < idle]
        leftovers += [e for e in markers if e.name.split("/")[1] not in stored and e.modified < before]
    stale = {k: es for k, es in partial.items() if max(e.modified for e in es) < before and k not in live.keys}
    lost = {n for n, size in sizes.items() if n not in blobs or blobs[n].size != size}
    broken = [k for k, m in kept.items() if any(names.blob(f.sha256) in lost for f in m.files.values())] if lost else []
    return Garbage(
        policy,
        leaving,
        tuple(sorted(dead)),
        tuple(unused),
        tuple(sorted(stale)),
        tuple(leftovers),
        sum(e.size for e in (*unused, *leftovers, *(e for es in stale.values() for e in es))),
        tuple(sorted(broken)),
        live.runs,
        {k: m for k, m in origins.items() if k in dead},
    )


def delete(store: Store, garbage: Garbage) -> Garbage:
    """Delete what is in `garbage` and still is garbage; return what was deleted. Raises StoreError."""
    policy = garbage.policy
    now = gc(store, policy)
    dead = {*garbage.manifests} & {*now.manifests}
    gone = tuple(v for v in garbage.versions if v in now.versions)
    blobs, leftovers = _both(garbage.blobs, now.blobs), _both(garbage.leftovers, now.leftovers)
    stale = {*garbage.partials} & {*now.partials}
    partial = [e for e in store.blobs.list("partial/") if e.name.split("/")[1] in stale]
    with ThreadPoolExecutor(THREADS) as pool:  # what the versions that stay were made from is still told
        [*pool.map(lambda k: versions.remember(store, now.origins[k]), dead & now.origins.keys())]
    for version in gone:
        versions.withdraw(store, version)
    # Manifests first: an artifact without its blobs must not look stored.
    store.blobs.delete(names.manifest(k) for k in sorted(dead))
    store.blobs.delete([e.name for e in store.blobs.list("found/") if e.name.split("/")[1] in dead])
    store.blobs.delete(e.name for e in (*blobs, *leftovers, *partial))
    if not policy.only:
        time = store.blobs.now()
        live = runs.live(store, time)
        store.blobs.delete(live.dead)
        store.blobs.sweep(time - _idle(policy, live.runs))
        store.node.sweep()
    total = sum(e.size for e in (*blobs, *leftovers, *partial))
    return Garbage(policy, gone, tuple(sorted(dead)), blobs, tuple(sorted(stale)), leftovers, total, now.broken, now.runs)


def _returned_to(store: Store) -> set[str]:
    """The versions that a rollback of a label would return to."""
    return {back.ref for there in labels.pointing(store).values() if (back := labels.before(store, there))}


def _idle(policy: Policy, live: int) -> float:
    """The age from which a file that is not whole, or a claim, is nobody's: where a run is alive, it may be its."""
    return max(policy.grace, runs.LIVE) if live else policy.grace


def _freed(store: Store, blobs: Mapping[str, Entry], needed: Iterable[str], dead: Iterable[str]) -> list[Entry]:
    """The blobs of artifacts that go, without those that others need."""
    needed = {*needed}
    files = {names.blob(f.sha256) for m in store.manifests(dead).values() for f in m.files.values()}
    return [blobs[n] for n in sorted(files - needed) if n in blobs]


def _both(listed: Iterable[Entry], now: Iterable[Entry]) -> tuple[Entry, ...]:
    still = {e.name for e in now}
    return tuple(e for e in listed if e.name in still)
