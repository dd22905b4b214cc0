"""The folder on this machine for what can be fetched or computed again: MOEFLOW_CACHE, or `~/.cache/moeflow`."""

import os
from pathlib import Path


def home() -> Path:
    return Path(os.environ.get("MOEFLOW_CACHE", "~/.cache/moeflow")).expanduser().absolute()
