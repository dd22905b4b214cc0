"""Where moeflow keeps on this machine what it can have again: MOEFLOW_CACHE, or `~/.cache/moeflow`."""

import os
from pathlib import Path


def home() -> Path:
    return Path(os.environ.get("MOEFLOW_CACHE", "~/.cache/moeflow")).expanduser().absolute()
