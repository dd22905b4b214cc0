"""What `pip install moeflow` leaves out: which extra brings a package that is missing. Standard library only."""

import importlib.util
from collections.abc import Iterable

EXTRAS = {
    "boto3": "compress",
    "botocore": "compress",
    "pyarrow": "compress",
    "rich": "compress",
    "threadpoolctl": "compress",
    "typer": "compress",
    "xxhash": "compress",
    "yaml": "compress",
    "deepspeed": "train",
    "ninja": "train",
    "ray": "ray",
    "lm_eval": "eval",
}
"""Packages by the name that is imported, and the extra of moeflow that has them."""


def lacking(modules: Iterable[str]) -> str:
    """One line that names the first of these packages that is not installed here, and what installs it; "" if all are."""
    missing = next((name for name in modules if importlib.util.find_spec(name) is None), "")
    return said(missing) if missing else ""


def said(module: str) -> str:
    """One line about a package that is not installed, and what installs it."""
    package = module.partition(".")[0]
    extra = EXTRAS.get(package)
    what = f"'moeflow[{extra}]'" if extra else package
    return f"{package} is not installed here: pip install {what}"
