"""Models and texts that exist elsewhere: pinned when the graph is built, and brought into the store by steps."""

from moeflow.sources.places import How, Kind, Mtp, SourceFile
from moeflow.sources.source import LayoutWanted, Source, pin
from moeflow.sources.texts import TextEntry, Texts

__all__ = ["How", "Kind", "LayoutWanted", "Mtp", "Source", "SourceFile", "TextEntry", "Texts", "pin"]
