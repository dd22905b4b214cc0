"""The command line: parses words, calls what does the work, and prints. Knows no models and decides nothing.

A pipeline file ends with `main(build)`, so `python PIPELINE.py ...` is `moeflow run PIPELINE.py ...`.
"""

import sys
from collections.abc import Callable
from typing import Any

from moeflow import __version__, extras
from moeflow.machine import restart_without_spaces

try:
    from moeflow.cli import explain, families, fit, labels, listing, pulled, recompress, runs, stored
    from moeflow.cli.common import app, own
except ModuleNotFoundError as error:
    if (error.name or "moeflow").partition(".")[0] not in extras.EXTRAS:
        raise
    if "--version" in sys.argv[1:]:
        print(f"moeflow {__version__}")
        raise SystemExit(0) from None
    print(f"error: {extras.said(str(error.name))}", file=sys.stderr)
    raise SystemExit(2) from None

__all__ = ["app", "explain", "families", "fit", "labels", "listing", "main", "pulled", "recompress", "runs", "stored"]


def main(build: Callable[..., Any] | None = None) -> None:
    """The `moeflow` command; with a pipeline's `build`, `moeflow run` with the file that is running."""
    restart_without_spaces()
    own.set(build)
    app(None if build is None else ["run", *sys.argv])
