"""Models and texts that exist elsewhere: pinned when the graph is built, and brought into the store by steps."""

from moeflow.sources.places import How, Kind, Mtp, SourceFile
from moeflow.sources.source import LayoutWanted, Source, address, pin
from moeflow.sources.texts import NamesFiles, TextEntry, Texts

__all__ = [
    "How", "Kind", "LayoutWanted", "Mtp", "NamesFiles", "Source", "SourceFile", "TextEntry", "Texts", "address", "pin",
]  # fmt: skip
