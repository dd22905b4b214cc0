"""The commands that explain results: report, one version as a page; compare, several side by side."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from moeflow.cli.common import Json, Ref, Url, asking, command, print_json, reading, working
from moeflow.report import about as abouts
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
