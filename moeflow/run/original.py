"""The checkpoint that a version was made from, brought into a folder as it was pinned then."""

from collections.abc import Mapping
from pathlib import Path

from moeflow.sources import Source, pin
from moeflow.sources.where import place_of


def pinned(uri: str, pins: Mapping[str, str]) -> Source:
    """The source at this address, if its files are still those with these pins. Raises ValueError if they are not."""
    if not uri:
        raise ValueError("the version names no model that it was made from; --profile needs the original beside the experts kept")
    source = pin(uri, kind="model")
    now = {f.name: f.pin for f in source.files}
    if other := next((name for name in pins if now.get(name) != pins[name]), None):
        raise ValueError(
            f"{other} at {uri} is not what the version was made from; bring back the original, or run its recipe again"
        )
    return source


def bring(source: Source, folder: Path) -> int:
    """Copy the files of a source into a folder. Returns their bytes. Raises OSError and MissingSource."""
    place = place_of(source.uri)
    for file in source.files:
        to = folder / file.name
        to.parent.mkdir(parents=True, exist_ok=True)
        place.bring(source.uri, file, to, lambda _: None, 0, file.size)
    return sum(file.size for file in source.files)
