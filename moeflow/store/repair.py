"""What is damaged in a store, and what was computed from it: to be told, dropped, and computed again. Knows no pipelines."""

from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from moeflow.store import checked, names, versions
from moeflow.store.cache import ELSEWHERE, take
from moeflow.store.errors import CorruptBlob, disk
from moeflow.store.manifest import File, Manifest
from moeflow.store.names import Entry, split_part
from moeflow.store.store import Store
from moeflow.store.versions import Version

THREADS = 4


@dataclass(frozen=True)
class Damage:
    """Blobs and manifests that are damaged or gone, by name with the reason, and everything that rests on them."""

    names: Mapping[str, str]  # why, by the name of a blob or a manifest
    keys: tuple[str, ...] = ()  # of the artifacts that contain them, and of all that was computed from those
    versions: tuple[Version, ...] = ()  # that are, or whose reports are, among these keys
    orphans: tuple[Entry, ...] = ()  # blobs that no manifest names; `gc` deletes them
    files: int = field(default=0, compare=False)  # that were read
    bytes: int = field(default=0, compare=False)


def inspect(store: Store, key: str = "", reports: Iterable[str] = ()) -> Damage:
    """Read every byte that `key` and `reports` were made from, or every byte of the store, and compare it with its digest.

    Raises NotStored and StoreError.
    """
    blobs = {e.name: e for e in store.blobs.list("blobs/")}
    manifests, damaged = _all(store)
    within = versions.reach(store, [key, *reports]) if key else manifests
    if key:
        damaged = {}
    files = {f.sha256: f for m in within.values() for f in m.files.values()}

    with ThreadPoolExecutor(THREADS) as pool:
        reasons = dict(zip(map(names.blob, files), pool.map(lambda f: _why(store, f), files.values()), strict=True))
    damaged |= {name: why for name, why in reasons.items() if why}
    known = {names.blob(f.sha256) for m in manifests.values() for f in m.files.values()}
    orphans = () if key else tuple(e for n, e in blobs.items() if n not in known)
    damage = _damage(store, manifests, damaged, orphans)
    return replace(damage, files=len(files), bytes=sum(f.size for f in files.values()))


def confirm(store: Store, keys: Iterable[str], intact: Collection[str] = ()) -> None:
    """Read the files of these artifacts, but for blobs known to be intact, and compare them with their digests.

    Raises NotStored, StoreError, and CorruptBlob for the first that is damaged.
    """
    files = {f.sha256: f for m in map(store.manifest, keys) for f in m.files.values() if f.sha256 not in intact}
    with ThreadPoolExecutor(THREADS) as pool:
        [*pool.map(lambda file: _read(store, file), files.values())]


def drop(store: Store, damaged: Mapping[str, str]) -> Damage:
    """Delete damaged blobs and manifests with everything that was computed from them; return what was deleted."""
    manifests, _ = _all(store)
    damage = _damage(store, manifests, damaged)
    gone = {*damage.keys}
    store.blobs.delete(names.manifest(k) for k in damage.keys)  # first: an artifact without its blobs must not look stored
    store.blobs.delete([e.name for e in store.blobs.list("found/") if e.name.split("/")[1] in gone])
    store.blobs.delete([e.name for e in store.blobs.list("partial/") if e.name.split("/")[1] in gone])
    store.blobs.delete([*damage.names, *_rotten(store, manifests, gone)])
    return damage


def _rotten(store: Store, manifests: Mapping[str, Manifest], keys: Iterable[str]) -> list[str]:
    """The damaged blobs of these artifacts: computed again they would be taken for stored, and nobody would write them."""
    files = {f.sha256: f for k in keys if k in manifests for f in manifests[k].files.values()}
    with ThreadPoolExecutor(THREADS) as pool:
        reasons = pool.map(lambda file: _why(store, file), files.values())
        return [names.blob(digest) for digest, why in zip(files, reasons, strict=True) if why]


def _all(store: Store) -> tuple[dict[str, Manifest], dict[str, str]]:
    """All manifests that can be read, and why the others cannot, by name."""
    damaged: dict[str, str] = {}

    def read(key: str) -> Manifest | None:
        try:
            return store.manifests([key]).get(key)
        except CorruptBlob as error:
            damaged[error.name] = error.why
            return None

    keys = [e.name.removeprefix("manifests/").removesuffix(".json") for e in store.blobs.list("manifests/")]
    with ThreadPoolExecutor(8 * THREADS) as pool:
        manifests = {k: m for k, m in zip(keys, pool.map(read, keys), strict=True) if m is not None}
    return manifests, damaged


def _damage(store: Store, manifests: Mapping[str, Manifest], damaged: Mapping[str, str], orphans: tuple[Entry, ...] = ()) -> Damage:
    keys = {n.removeprefix("manifests/").removesuffix(".json") for n in damaged if n.startswith("manifests/")}
    keys |= {k for k, m in manifests.items() if any(names.blob(f.sha256) in damaged for f in m.files.values())}
    while below := {k for k, m in manifests.items() if k not in keys and any(split_part(i.key)[0] in keys for i in m.inputs)}:
        keys |= below
    hit = tuple(v for v in versions.list(store) if keys & {v.key, *v.reports}) if keys else ()
    return Damage(dict(damaged), tuple(sorted(keys)), hit, orphans)


def _why(store: Store, file: File) -> str:
    """How a blob is damaged, or that it is gone; "" if it is whole."""
    try:
        _read(store, file)
    except CorruptBlob as error:
        return error.why
    return ""


def _read(store: Store, file: File) -> None:
    """Read a whole blob where it is stored, not from a cache. Raises CorruptBlob."""
    if (path := store.blobs.local(names.blob(file.sha256))) is not None:
        checked.whole(path, file)
        return
    with disk(store.cache, file.size, ELSEWHERE):
        store.cache.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=store.cache) as folder:
            take(store.blobs, file, Path(folder) / "blob")
