"""Immutable folders by key, on a disk or in S3, and the names people give them."""

from moeflow.store.blobs import Blobs, LocalBlobs, S3Blobs, open_blobs
from moeflow.store.errors import CorruptBlob, MissingSource, NotStored, StoreError
from moeflow.store.index import Index, Listed
from moeflow.store.manifest import File, Input, Manifest, Record, part_digest
from moeflow.store.store import Committed, Store

__all__ = [
    "Blobs",
    "Committed",
    "CorruptBlob",
    "File",
    "Index",
    "Input",
    "Listed",
    "LocalBlobs",
    "Manifest",
    "MissingSource",
    "NotStored",
    "Record",
    "S3Blobs",
    "Store",
    "StoreError",
    "open_blobs",
    "part_digest",
]
