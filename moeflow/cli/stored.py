"""The commands about what is stored: gc, rm and verify."""

import sys
from typing import Annotated

import typer

from moeflow.cli.common import (
    Json,
    Url,
    asking,
    command,
    print_json,
    reading,
    seconds,
    working,
)
from moeflow.run.words import count, size
from moeflow.store import Store, versions
from moeflow.store import gc as garbage_
from moeflow.store import repair as repair_


@command()
def gc(
    keep: Annotated[int | None, typer.Option("--keep", help="of each name only this many versions stay, and labelled ones")] = None,
    keep_results: Annotated[bool, typer.Option("--keep-results", help="of versions only their own files and reports stay")] = False,
    delete: Annotated[bool, typer.Option("--delete", help="delete what is listed")] = False,
    grace: Annotated[str, typer.Option("--grace", help="spare what no version reached and is younger: 7d, 12h, 0s")] = "7d",
    store: Url = "",
    json: Json = False,
) -> None:
    """List what no version reaches and is older than the grace period; with --delete, delete it.

    With --keep-results also what versions were made from: it is computed again when it is asked for again.
    """
    with asking():
        opened = reading(store)
        garbage = garbage_.gc(opened, garbage_.Policy(seconds("--grace", grace), keep, keep_results))
    _collected(opened, garbage, delete, json)


@command()
def rm(
    ref: Annotated[str, typer.Argument(metavar="NAME@N", help="a version that no label points at")],
    delete: Annotated[bool, typer.Option("--delete", help="delete what is listed")] = False,
    store: Url = "",
    json: Json = False,
) -> None:
    """List what is deleted with a version: its record and what nothing else needs; with --delete, delete it."""
    with asking():
        opened = reading(store)
        version = versions.resolve(opened, ref)
        if isinstance(version, str) or version.ref != ref:
            known = version.ref if not isinstance(version, str) else "NAME@N"
            raise ValueError(f"{ref!r} is no single version; write {known}, as `moeflow ls` does")
        garbage = garbage_.gc(opened, garbage_.Policy(only=ref))
    _collected(opened, garbage, delete, json)


def _collected(store: Store, garbage: garbage_.Garbage, delete: bool, json: bool) -> None:
    """Delete the garbage if it is to be deleted, and print what it is."""
    with working():
        gone = garbage_.delete(store, garbage) if delete else garbage
    refs = [v.ref for v in gone.versions]
    if json:
        about = {"deleted": delete, "versions": refs, "manifests": list(gone.manifests), "partials": list(gone.partials)}
        print_json(about | {"blobs": len(gone.blobs), "bytes": gone.bytes, "broken": list(gone.broken), "runs": gone.runs})
        return
    for line in [*refs, *gone.manifests, *(f"{key} (interrupted)" for key in gone.partials)]:
        print(line)
    what = [count(len(refs), "version")] if refs else []
    what += [count(len(gone.manifests), "artifact"), f"{count(len(gone.blobs), 'blob')}, {size(gone.bytes)}"]
    text = f"{', '.join(what[:-1])} and {what[-1]}"
    print("nothing to delete" if gone.empty else f"deleted {text}" if delete else f"{text}; delete with --delete")
    if gone.runs:
        print(
            f"{count(gone.runs, 'run')} under way: what is younger than two days, and what it relies on, is spared", file=sys.stderr
        )
    for key in gone.broken:
        print(f"warning: {key} cannot be read: a blob is gone or cut short; run its pipeline again", file=sys.stderr)


@command()
def verify(
    ref: Annotated[str, typer.Argument(metavar="[REF]", help="a version or key, with everything that it was made from")] = "",
    all: Annotated[bool, typer.Option("--all", help="everything that the store holds")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="drop what is damaged with everything that rests on it")] = False,
    store: Url = "",
    json: Json = False,
) -> None:
    """Compare every byte of a version, or of the store, with what was written. Exit code 1 if any is damaged and not dropped."""
    with asking():
        if bool(ref) == all:
            raise ValueError("name a version or key, or say --all")
        opened = reading(store)
        version, key = _resolve(opened, ref) if ref else (None, "")
    with working():
        damage = repair_.inspect(opened, key, version.reports if version else ())
        if repair and damage.names:
            repair_.drop(opened, damage.names)
    refs = [v.ref for v in damage.versions]
    if json:
        about = {"files": damage.files, "bytes": damage.bytes, "damaged": dict(damage.names), "keys": list(damage.keys)}
        print_json(about | {"versions": refs, "orphans": len(damage.orphans), "dropped": bool(repair and damage.names)})
    else:
        for line in [*damage.names.values(), *(f"{key} rests on what is damaged" for key in damage.keys)]:
            print(line)
        read = f"{count(damage.files, 'file')}, {size(damage.bytes)}"
        print(f"{read}: {count(len(damage.names), 'object')} damaged" if damage.names else f"{read}: all as they were written")
        if damage.orphans:
            unused = size(sum(e.size for e in damage.orphans))
            print(f"{count(len(damage.orphans), 'blob')}, {unused}, that nothing names; see `moeflow gc`")
        if damage.names:
            print("dropped: the next run computes them again" if repair else "to drop them, and compute them again: --repair")
        for v in damage.versions:
            print(f"{v.ref} rests on them: run its pipeline, {v.record.get('pipeline', v.name)}, again")
    if damage.names and not repair:
        raise typer.Exit(1)


def _resolve(store: Store, ref: str) -> tuple[versions.Version | None, str]:
    """The version and key that `ref` means; for a key, the newest version that published it, or None."""
    target = versions.resolve(store, ref)
    if isinstance(target, str):
        published = [v for v in versions.list(store) if v.key == target]
        return max(published, key=lambda v: v.created, default=None), target
    return target, target.key
