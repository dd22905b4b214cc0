"""A store that ends a process of a gang, so that a test needs no guess of how fast the gang is."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

from moeflow.store import Store
from moeflow.store.partial import Snapshot


@dataclass(frozen=True)
class DyingStore(Store):
    """Kills the process of rank 1, once, instead of storing its part of the snapshot at step `die_at`."""

    die_at: int = 0
    marker: Path = Path()
    """The file that says that it has done so."""

    def save_partial(self, key: str, folder: Path, snapshot: Snapshot | None = None, rank: int = 0) -> None:
        if snapshot is not None and (snapshot.at, rank) == (self.die_at, 1) and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        super().save_partial(key, folder, snapshot, rank)
