"""The pages of a file on this machine's disk, in place of a copy of its bytes. Knows no stores."""

import mmap
import os
import sys
from functools import lru_cache
from pathlib import Path

LEAST = 1 << 20
"""Bytes from which on a view costs less than a copy."""
POPULATE_READ = 22
"""Linux 5.14: map all pages at once; one that cannot be read is an error then, and not a signal that ends the process."""
LOCAL = frozenset(("ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs"))
"""File systems whose pages stay readable while the file is open, deleted or not. Of one over a network they may not."""


def pages(opened: int, device: int, start: int, stop: int) -> memoryview | None:
    """The bytes [start, stop) of an open file on this device as a read-only view; None where they have to be read instead, or are
    not in memory yet, which reading does faster."""
    if stop - start < LEAST or not sys.platform.startswith("linux") or device not in _local():
        return None
    first = start - start % mmap.ALLOCATIONGRANULARITY
    try:
        for at in (first, (first + stop) // 2, stop - 1):
            os.preadv(opened, [bytearray(1)], at, os.RWF_NOWAIT)  # raises BlockingIOError if the page is not in memory
        mapped = mmap.mmap(opened, stop - first, access=mmap.ACCESS_READ, offset=first)
        mapped.madvise(POPULATE_READ)
    except (OSError, ValueError):  # an old kernel, a bad disk or a shorter file: reading says which
        return None
    return memoryview(mapped)[start - first :]


@lru_cache(maxsize=1)
def _local() -> frozenset[int]:
    """The devices of this machine's own file systems."""
    made = set()
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.split()[0] in LOCAL:
            major, minor = map(int, before.split()[2].split(":"))
            made.add(os.makedev(major, minor))
    return frozenset(made)
