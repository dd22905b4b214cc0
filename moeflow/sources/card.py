"""What a model's own card says of it: licence, language, base model. It is asked for when a version is published.

The card itself, README.md, stays where the model lies: what is made of the model gets a card of its own.
"""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from moeflow.sources.places import SourceFile
from moeflow.store.errors import MayPass, StoreError

CARD = "README.md"
MOST = 1 << 20  # bytes of a card
FRONT = re.compile(r"\A\ufeff?---\r?\n(.*?)\r?\n---", re.DOTALL)
KEPT = ("license", "license_name", "license_link", "language", "base_model", "pipeline_tag")


def facts_of(uri: str) -> dict[str, Any]:
    """The `KEPT` entries at the head of the card of the model at a pinned address; empty if it has none, or cannot be asked.

    A result stands without them, so nothing is raised: neither for a hub that does not answer nor for a card that is no YAML.
    """
    with suppress(OSError, ValueError, StoreError, MayPass, yaml.YAMLError):
        front = FRONT.match(_card(uri))
        read = yaml.safe_load(front[1]) if front else None
        if isinstance(read, dict):
            return {name: kept for name in KEPT if (kept := _plain(read.get(name)))}
    return {}


def _card(uri: str) -> str:
    if uri.startswith("s3://"):
        from moeflow.store import s3
        from moeflow.store.address import parse_s3

        at = parse_s3(uri)
        key = f"{at.prefix}/{CARD}" if at.prefix else CARD
        with s3.said(uri.partition("?")[0]):
            return s3.read_body(s3.client(**at.options), {"Bucket": at.bucket, "Key": key, "Range": f"bytes=0-{MOST - 1}"}).decode()
    if uri.startswith("hf://"):
        from huggingface_hub import try_to_load_from_cache

        from moeflow.sources import hub

        repo, commit = uri.removeprefix("hf://models/").split("@")
        cached = try_to_load_from_cache(repo, CARD, revision=commit)
        return (
            Path(cached).read_text() if isinstance(cached, str) else hub.read(uri, SourceFile(CARD, MOST, commit), 0, MOST).decode()
        )
    return (Path(uri) / CARD).read_text()[:MOST]


def _plain(value: Any) -> str | list[str]:
    """A text or a list of texts; nothing for anything else."""
    if isinstance(value, list):
        return [v for v in value if isinstance(v, str)]
    return value if isinstance(value, str) else ""
