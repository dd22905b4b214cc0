"""The kinds of places that an address can name, in one visible tuple. Imports huggingface_hub only for sources on the hub."""

from importlib import import_module
from typing import cast
from urllib.parse import quote

from moeflow.sources.places import Place

PLACES = (
    ("s3://", "moeflow.sources.s3"),
    ("hf://", "moeflow.sources.hub"),
    ("", "moeflow.sources.folder"),
)


def place_of(uri: str) -> Place:
    """The place that an address names. Raises ValueError for an address of no known kind."""
    module = next(module for prefix, module in PLACES if uri.startswith(prefix))
    if module == PLACES[-1][1] and "://" in uri:
        raise ValueError(
            f"{uri!r}: know folders, files, globs, s3://bucket/prefix, hf://datasets/org/name, python:stdlib, and "
            "org/name[@revision] or hf://models/org/name[@revision] for models on the hub"
        )
    return cast(Place, import_module(module))  # a module is the place: huggingface_hub takes long to import


def hub_uri(name: str) -> str:
    """The address of a model on the hub that is named `org/name[@revision]`."""
    repo, _, revision = name.partition("@")
    return f"hf://models/{repo}" + (f"@{quote(revision, safe='')}" if revision else "")
