"""A store that ends a process of a gang, so that a test needs no guess of how fast the gang is."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

from moeflow.store import LocalBlobs


@dataclass(frozen=True)
class DyingBlobs(LocalBlobs):
    """Kills the process of rank 1, once, when it completes its part of the snapshot at step `die_at`."""

    die_at: int = 0
    marker: Path = Path()
    """The file that says that it has done so."""

    def create(self, name: str, data: bytes) -> bool:
        if f"/{1:05d}/{self.die_at:020d}-of-" in name and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().create(name, data)
