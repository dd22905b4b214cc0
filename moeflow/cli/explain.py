"""The commands that explain results: report, one version as a page; compare, several side by side."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from moeflow import report as reporting
from moeflow.cli.common import Json, Ref, Url, asking, command, print_json, reading, working
from moeflow.report import about as abouts
from moeflow.report import comparing, side_by_side
from moeflow.run.outcome import printable
from moeflow.run.words import size

Out = Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="where the page goes; - is the standard output")]


@command()
def report(ref: Ref, out: Out = Path("report.html"), store: Url = "", json: Json = False) -> None:
    """Write a version as one page: what was kept, how good it is, what it cost. It needs no network and no script."""
    with asking():
        opened = reading(store)
        about = abouts.of(opened, ref)
        _ = about.manifest  # that it is stored is the request's business
        if str(out) != "-" and (out.is_dir() or not out.absolute().parent.is_dir()):
            raise FileNotFoundError(f"-o {out}: {'that is a folder' if out.is_dir() else 'its folder is not there'}; name a file")
    with working():
        from moeflow.report.page import page

        text = page(about)
        if str(out) == "-":
            sys.stdout.write(text)
            return
        out.write_text(text, encoding="utf-8")
    written = len(text.encode())
    if json:
        print_json({"ref": about.title, "key": about.key, "file": str(out.absolute()), "bytes": written})
    else:
        print(f"{out}: {about.title}, {size(written)}; open it in a browser")


@command()
def compare(
    refs: Annotated[
        list[str], typer.Argument(metavar="A B [C...]", help="versions, labels or keys; the first is what others are held against")
    ],
    store: Url = "",
    json: Json = False,
) -> None:
    """Put versions side by side: figures, paired differences, layers, options, and what they were made from."""
    with asking():
        if len(refs) < 2:
            raise ValueError(f"compare needs two versions or more, and {refs[0]} is one; see `moeflow ls`")
        opened = reading(store)
        compared = [abouts.of(opened, ref) for ref in refs]
        _ = [about.manifest for about in compared]
    with working():
        made = comparing.compare(compared)
    if json:
        print_json(made)
        return
    out = reporting.console()
    for title, body in side_by_side.tables(made, plain=not out.is_terminal):
        out.print(f"\n{title}", style="bold", markup=False)
        out.print(printable(body) if isinstance(body, str) else body)
