"""The commands that tell what is stored: ls, a line for each version; show, everything about one."""

import json as json_
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Annotated, Any, Literal

import typer
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from moeflow import report
from moeflow.cli.common import STORE, All, Json, Ref, Url, asking, command, print_json, print_reports, reading
from moeflow.nearest import meant
from moeflow.report import about as abouts
from moeflow.report import lineage as lineages
from moeflow.report import summary, words
from moeflow.report.about import About
from moeflow.report.figures import Figure, figures_of
from moeflow.run.outcome import describe, printable
from moeflow.run.words import size
from moeflow.store import CorruptBlob, versions

THREADS = 16
NUMBERS = ("weights", "resident", "KL")


@command()
def ls(
    name: Annotated[str, typer.Argument(help="only versions of this name")] = "",
    store: Url = "",
    json: Json = False,
) -> None:
    """List the versions, newest last: weights on disk and in memory, KL to the original (the largest of its texts), labels."""
    with asking():
        opened = reading(store)
        listed = [About(opened, v.key, v) for v in sorted(versions.list(opened, name), key=lambda v: v.created)]
        sizes = {k: m.bytes for k, m in opened.manifests(a.key for a in listed).items()}
        with ThreadPoolExecutor(THREADS) as pool:
            told = [*pool.map(_told, listed)]
    if json:
        print_json([version_json(a) | {"bytes": sizes.get(a.key)} | more for a, more in zip(listed, told, strict=True)])
        return
    if not listed:
        advice = f"; {near}" if name and (near := meant(name, {v.name for v in versions.list(opened)}, "")) else ""
        print(f"no versions{f' of {name}' if name else ''} in {store or STORE}{advice}", file=sys.stderr)
        return
    rows = []
    for about, more in zip(listed, told, strict=True):
        version = about.version
        assert version is not None
        files = sizes.get(about.key)
        held = "gone" if files is None else f"{size(files)} of files" if more["weights"] is None else size(int(more["weights"]))
        resident = "-" if more["resident"] is None else size(int(more["resident"]))
        divergence = f"{max(more['kl'].values()):.3g}" if more["kl"] else "-"
        made = version.created[:16].replace("T", " ")
        rows.append((version.ref, made, held, resident, divergence, about.key, " ".join(version.labels)))
    out = report.console()
    table = Table(box=SIMPLE if out.is_terminal else None, pad_edge=False)
    for title in ("version", "made (UTC)", "weights", "resident", "KL", "key", "labels"):
        side: Literal["right", "left"] = "right" if title in NUMBERS else "left"
        table.add_column(title, justify=side, no_wrap=title != "labels", overflow="ellipsis" if title == "key" else "fold")
    for row in rows:
        table.add_row(*map(Text, row))
    out.print(table)


@command()
def show(ref: Ref, store: Url = "", all: All = False, json: Json = False) -> None:
    """Show a version: what it is, from what, how, how good; then its parameters, everything upstream, libraries and hashes."""
    with asking():
        opened = reading(store)
        about = abouts.of(opened, ref)
        upstream = about.lineage
        reports = report.read(opened, about.version.reports if about.version else [])
    if json:
        told = {"version": version_json(about) if about.version else None, "key": about.key}
        lineage = [json_.loads(m.dump()) for m in upstream.values()]
        libraries = lineages.libraries(upstream)
        print_json(told | {"libraries": libraries, "lineage": lineage, "reports": [asdict(r) for r in reports]})
        return
    out = report.console()
    for line in summary.lines(about):
        print(line)
    print_reports(reports, {"change": _said(words.change), "what it is": _said(words.meaning)})
    for line in lineages.parameters(about.manifest):
        print(line)
    print(f"\n{len(upstream):,} keys, with everything upstream:")
    out.print(lineages.steps(upstream, every=all, plain=not out.is_terminal))
    print("\nlibraries  " + ", ".join(f"{k} {' and '.join(v)}" for k, v in lineages.libraries(upstream).items()))
    for line in summary.hashes(about):
        print(line)


def _said(words_of: Callable[[Figure], str]) -> report.Extra:
    """A column of words about each figure."""
    return lambda of, row: words_of(figures_of({"kind": of.kind, "rows": [row], "notes": of.notes})[0])


def _told(about: About) -> dict[str, Any]:
    """What is said of a version beside its record; one whose reports are damaged is listed without it, and that is said."""
    try:
        return summary.listed(about)
    except (CorruptBlob, ValueError, KeyError, TypeError) as error:
        why = printable(describe(error))
        print(f"warning: the reports of {about.title} cannot be read ({why}); see moeflow verify {about.title}", file=sys.stderr)
        return {"weights": None, "resident": None, "kl": {}}


def version_json(about: About) -> dict[str, Any]:
    """A version's record, as JSON has it."""
    v = about.version
    assert v is not None
    told = {"ref": v.ref, "name": v.name, "version": v.n, "key": v.key, "created": v.created}
    return told | {"labels": list(v.labels), "reports": list(v.reports), "record": dict(v.record)}
