"""The command line: parses words, calls what does the work, and prints. Knows no models and decides nothing.

A pipeline file ends with `main(build)`, so `python PIPELINE.py ...` is `moeflow run PIPELINE.py ...`.
"""

import sys
from collections.abc import Callable
from typing import Any

from moeflow.cli import families, fit, labels, recompress, runs, stored
from moeflow.cli.common import app, own
from moeflow.machine import restart_without_spaces

__all__ = ["app", "families", "fit", "labels", "main", "recompress", "runs", "stored"]


def main(build: Callable[..., Any] | None = None) -> None:
    """The `moeflow` command; with a pipeline's `build`, `moeflow run` with the file that is running."""
    restart_without_spaces()
    own.set(build)
    app(None if build is None else ["run", *sys.argv])
