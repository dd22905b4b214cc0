"""Errors about stored bytes, each with a one-line message that ends with the way out. Knows no step and no runner."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moeflow.sizes import bytes_text


class StoreError(Exception):
    """The store cannot do what was asked: no bucket, no permission, no space, no conditional writes."""


class MayPass(Exception):
    """What was asked does not answer, or is too busy. That may pass: see `patience.py`."""


class Unavailable(StoreError, MayPass):
    """The store does not answer, or is too busy."""


class GaveUp(StoreError):
    """What was asked did not answer for as long as it was to be waited for."""


class LabelMoved(StoreError):
    """Another process moved the label since it was looked at."""


class CorruptBlob(StoreError):
    """A blob or a manifest is missing, or its bytes are not those that were written. `name` is its name in the store."""

    def __init__(self, why: str, name: str = "") -> None:
        super().__init__(why, name)  # both, so that it can be pickled
        self.why, self.name = why, name

    def __str__(self) -> str:
        way_out = "; `moeflow verify --all --repair` drops it with everything computed from it, then run again"
        return self.why + (way_out if self.name else "")


class NotStored(KeyError):
    """Nothing is stored under that key or name."""

    def __str__(self) -> str:  # KeyError would print its message in quotation marks
        return str(self.args[0])


class MissingSource(ValueError):
    """A source does not exist, or has changed since it was pinned."""


class SourceUnavailable(MissingSource, MayPass):
    """A source does not answer, or is too busy."""


class NoNetwork(SourceUnavailable):
    """A source cannot be asked, since its name cannot be resolved, or no network is there."""


class NoDefault(NoNetwork):
    """What cannot be asked is what a parameter is by default: nobody has named it, and another may be given."""


def too_large(where: Path, instead: str) -> StoreError:
    """The error of a file that grew beyond what the process, or the disk, allows one file."""
    return StoreError(f"a file under {where} became larger than is allowed; raise the limit (see `ulimit -f`), or {instead}")


@contextmanager
def disk(where: Path, need: int = 0, instead: str = "pass another --store") -> Iterator[None]:
    """Turn errors of a full, limited, read-only or forbidden disk under `where` into StoreError; `need`: bytes to be written."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = f"free {bytes_text(need)}" if need else "free some"
            raise StoreError(f"no space left on {where}; {free} or {instead}") from error
        if error.errno == errno.EFBIG:
            raise too_large(where, instead) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            at = error.filename or where
            raise StoreError(f"no permission for {at}; make {where} readable and writable or {instead}") from error
        if error.errno == errno.ENAMETOOLONG:
            raise StoreError(f"a name is too long for the disk under {where}: {error.filename!r}; {instead}") from error
        raise
