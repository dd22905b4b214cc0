"""What exists elsewhere and is adopted: pinned when the graph is built, brought into the store by steps."""

from moeflow.store.sources.places import Kind, SourceFile
from moeflow.store.sources.source import Source, pin

__all__ = ["Kind", "Source", "SourceFile", "pin"]
