"""Names that people use: `name@1`, `name@2`, ... and labels that point at them: small records that never change.

Knows artifacts by key; what a name means to a pipeline is the caller's business.
"""

import builtins
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from moeflow.nearest import meant
from moeflow.store import labels, names
from moeflow.store.errors import NotStored
from moeflow.store.manifest import Manifest
from moeflow.store.names import split_part
from moeflow.store.records import RECORD, newest, now, read_record
from moeflow.store.store import THREADS, Store

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Version:
    name: str
    n: int
    key: str
    created: str  # UTC, ISO 8601
    reports: tuple[str, ...] = ()  # keys of the steps that describe it
    record: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ()

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.n}"


def publish(store: Store, name: str, key: str, *, record: Mapping[str, Any] | None = None, reports: Sequence[str] = ()) -> int:
    """Make `key` the newest version of `name`; return its number.

    If that has the same files and reports already, under whatever keys, nothing changes, unless `record` names another gate.

    Raises ValueError, NotStored.
    """
    check_name(name)
    reports = [*dict.fromkeys(reports)]
    if not store.has(key):
        raise NotStored(f"{key} is not stored in {store.url}, so it cannot be published as {name}")
    manifest = store.manifest(key)
    if outside := sorted(manifest.stands_for.keys() - manifest.files.keys()):
        raise ValueError(f"{outside[0]} of {key} lies outside the store; publish a checkpoint whose model is `lasting`")
    while True:
        if (n := published(store, name, key, reports)) and same_gate(_read(store, name, n).record, record or {}):
            return n
        n = max(newest(store, f"versions/{name}/"), newest(store, f"removed/{name}/"))
        about = {"name": name, "n": n + 1, "key": key, "created": now(), "reports": reports, "record": record or {}}
        if store.blobs.create(_version(name, n + 1), json.dumps(about, indent=1).encode()):
            return n + 1


def published(store: Store, name: str, key: str, reports: Sequence[str] = ()) -> int:
    """The number of the newest version of `name` if it has the files of `key` and of these reports; else 0."""
    n = newest(store, f"versions/{name}/")
    return n if n and _identical(store, _read(store, name, n), key, reports) else 0


def same_gate(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a version's record names the gate that is wanted for it; none wanted is no change."""
    return not wanted.get("gate") or there.get("gate") == wanted["gate"]


def _identical(store: Store, version: Version, key: str, reports: Sequence[str]) -> bool:
    """Whether a version has the files of `key`, and reports with the files of these."""
    mine, others = (key, *reports), (version.key, *version.reports)
    if mine[0] == others[0] and {*mine} == {*others}:
        return True
    digests = {k: m.digest for k, m in store.manifests([*mine, *others]).items()}
    if len(digests) != len({*mine, *others}) or digests[key] != digests[version.key]:
        return False
    return sorted(digests[k] for k in reports) == sorted(digests[k] for k in version.reports)


def resolve(store: Store, ref: str) -> Version | str:
    """The version or key that `ref` means: "name@3", "name" (its newest), a label, a key, or the beginning of one key.

    Raises NotStored, and ValueError if several keys begin with `ref`.
    """
    name, at, number = ref.partition("@")
    if at:
        if not re.fullmatch(r"[0-9]{1,9}", number):
            raise ValueError(f"{ref!r}: a version is a number, as in {name}@1; see `moeflow ls`")
        check_name(name)
        return _read(store, name, int(number))
    if NAME.fullmatch(ref):
        if n := newest(store, f"versions/{ref}/"):
            return _read(store, ref, n)
        if there := labels.last(store, ref):
            return resolve(store, there.ref)
    keys = [names.key_of(e.name) for e in islice(store.blobs.list(f"manifests/{ref}"), 5)]
    if len(keys) == 1 or ref in keys:
        return ref if ref in keys else keys[0]
    if keys:
        raise ValueError(f"{ref!r} is how several keys begin: {', '.join(keys[:4])}...; write more of the key")
    advice = meant(ref, [*_names(store), *labels.pointing(store)], "see `moeflow ls`")
    raise NotStored(f"{ref!r} is no version, label or key in {store.url}; {advice}")


def list(store: Store, name: str = "") -> tuple[Version, ...]:
    """All versions, or those of one name, with the labels that point at them; sorted by name, oldest first."""
    entries = [e.name for e in store.blobs.list(f"versions/{name}/" if name else "versions/") if RECORD.fullmatch(e.name)]
    at = labelled(store)
    with ThreadPoolExecutor(THREADS) as pool:
        published = [*pool.map(lambda e: _parse(store, e), entries)]
    published.sort(key=lambda v: (v.name, v.n))
    return tuple(replace(v, labels=tuple(label for label, ref in at.items() if ref == v.ref)) for v in published)


def labelled(store: Store) -> dict[str, str]:
    """The `name@n` that each label points at now."""
    return {label: there.ref for label, there in labels.pointing(store).items()}


def promote(store: Store, ref: str, label: str, *, about: Mapping[str, Any] | None = None, since: int | None = None) -> Version:
    """Point `label` at a version; its records keep where it pointed before, and `about` this move (`labels.Move`).

    `since`: how often the label had been moved when that was decided; None: until now. Raises ValueError, NotStored, and
    LabelMoved if it was moved meanwhile.
    """
    version = promotable(store, ref, label)
    there = labels.last(store, label)
    if there is None or there.ref != version.ref:
        labels.move(store, label, version.ref, since=(there.n if there else 0) if since is None else since, about=about)
    return version


def promotable(store: Store, ref: str, label: str) -> Version:
    """The version that `ref` means, if this label can point at it. Raises ValueError, NotStored."""
    check_label(store, label)
    version = resolve(store, ref)
    if isinstance(version, str):
        raise ValueError(f"{ref!r} is a key; only versions are promoted: publish it by running with --name")
    return version


def check_label(store: Store, label: str) -> None:
    """Raise ValueError unless a label can have this name."""
    check_name(label)
    if newest(store, f"versions/{label}/"):
        raise ValueError(f"{label!r} is the name of versions; choose another label")


def rollback(store: Store, label: str, *, about: Mapping[str, Any] | None = None) -> Version:
    """Point `label` where it pointed before; a second time, where it pointed before that.

    Raises NotStored if it never pointed elsewhere or that version is gone, and LabelMoved.
    """
    there = labels.history(store, label)[-1]
    earlier = labels.before(store, there)
    if earlier is None:
        raise NotStored(f"{label} has pointed at nothing before {there.ref}; promote another version, or see `moeflow ls`")
    version = resolve(store, earlier.ref)
    assert isinstance(version, Version)
    labels.move(store, label, version.ref, since=there.n, about=about, back_to=earlier.back_to or earlier.n)
    return version


def withdraw(store: Store, version: Version) -> None:
    """Delete a version's record; its number is not given again. What it reached is garbage's business."""
    store.blobs.create(f"removed/{version.name}/{version.n:06d}.json", b"{}")
    store.blobs.delete([_version(version.name, version.n)])


def remember(store: Store, manifest: Manifest) -> None:
    """Keep how an artifact was made when the artifact itself is deleted, so that what was made from it can be told."""
    store.blobs.create(f"lineage/{manifest.key}.json", manifest.dump())


def lineage(store: Store, key: str) -> dict[str, Manifest]:
    """The manifest of `key` and of everything upstream of it, deleted or not, nearest first. Raises NotStored for `key` itself."""
    store.manifest(key)
    return reach(store, [key], remembered=True)


def reach(store: Store, keys: Iterable[str], *, remembered: bool = False) -> dict[str, Manifest]:
    """The manifests of `keys` and of everything upstream, level by level.

    Missing ones are left out; with `remembered` those count that were deleted and are remembered.
    """
    manifests: dict[str, Manifest] = {}
    level = [split_part(k)[0] for k in keys]
    while level:
        manifests |= store.manifests(level)
        if remembered:
            manifests |= _remembered(store, [k for k in level if k not in manifests])
        tried = {*manifests, *level}
        above = (split_part(i.key)[0] for k in level if k in manifests for i in manifests[k].inputs)
        level = [*dict.fromkeys(k for k in above if k not in tried)]
    return manifests


def _remembered(store: Store, keys: Iterable[str]) -> dict[str, Manifest]:
    def read(key: str) -> Manifest | None:
        try:
            return Manifest.load(store.blobs.read(f"lineage/{key}.json"))
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return None

    asked = [*keys]
    with ThreadPoolExecutor(THREADS) as pool:
        return {k: m for k, m in zip(asked, pool.map(read, asked), strict=True) if m is not None}


def _read(store: Store, name: str, n: int) -> Version:
    try:
        return _parse(store, _version(name, n))
    except FileNotFoundError:
        last = newest(store, f"versions/{name}/")
        none = "" if last else f"there is no version of {name}; {meant(name, _names(store), 'see `moeflow ls`')}"
        raise NotStored(f"{name}@{n} is not in {store.url}; {none or f'the newest is {name}@{last}'}") from None


def _names(store: Store) -> builtins.list[str]:
    """The names that versions have."""
    return sorted({e.name.split("/")[1] for e in store.blobs.list("versions/") if RECORD.fullmatch(e.name)})


def _parse(store: Store, at: str) -> Version:
    raw = read_record(store, at, key=str, reports=builtins.list, record=dict)
    return Version(raw["name"], raw["n"], raw["key"], raw["created"], tuple(raw["reports"]), raw["record"])


def _version(name: str, n: int) -> str:
    return f"versions/{name}/{n:06d}.json"


def check_name(name: str) -> None:
    """Raise ValueError unless versions can have this name."""
    if not NAME.fullmatch(name):
        raise ValueError(f"name {name!r}: use at most 128 letters, digits, '.', '_', '-', not beginning with a sign")
