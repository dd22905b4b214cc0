"""Models and texts that exist elsewhere: pinned when the graph is built, and brought into the store by steps."""

from moeflow.sources.places import How, Kind, Mtp, SourceFile
from moeflow.sources.source import Source, pin
from moeflow.sources.texts import TextEntry, Texts

__all__ = ["How", "Kind", "Mtp", "Source", "SourceFile", "TextEntry", "Texts", "pin"]
