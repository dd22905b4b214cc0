"""Small numbered records that never change: of versions, and of where labels point."""

import json
import re
from datetime import UTC, datetime
from typing import Any

from moeflow.store.errors import CorruptBlob
from moeflow.store.store import Store

RECORD = re.compile(r"(versions|labels)/[^/]+/[0-9]{6,9}\.json")


def newest(store: Store, prefix: str) -> int:
    """The highest number below `prefix`; 0 if there is none."""
    numbers = (re.fullmatch(r"([0-9]{1,9})\.json", e.name.removeprefix(prefix)) for e in store.blobs.list(prefix))
    return max((int(number[1]) for number in numbers if number), default=0)


def read_record(store: Store, at: str, **kinds: type) -> dict[str, Any]:
    """The record of a version or a label. Raises CorruptBlob if it is damaged, and FileNotFoundError."""
    try:
        raw = json.loads(store.blobs.read(at))
        wrong = [k for k, kind in ({"name": str, "n": int, "created": str} | kinds).items() if type(raw[k]) is not kind]
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptBlob(f"{at} in {store.url} is damaged ({type(error).__name__}: {error}); restore or delete it") from error
    if wrong:
        raise CorruptBlob(f"{at} in {store.url} is damaged ({wrong[0]} is {raw[wrong[0]]!r:.60}); restore or delete it")
    return dict(raw)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
