"""Named bytes in a bucket, through boto3: one request for small objects, parallel parts for large ones.

S3-compatible servers differ, so the only special request is PutObject with If-None-Match, for what must be written once;
digests are the store's own. Knows no keys and no manifests.
"""

import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import cache, wraps
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any, Concatenate, ParamSpec, TypeVar
from urllib.parse import urlencode, urlsplit
from urllib.request import getproxies

import boto3
import botocore.session
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import ClientError, ConnectionError, IncompleteReadError, ReadTimeoutError, ResponseStreamingError
from botocore.utils import parse_timestamp

from moeflow.store.errors import StoreError, Unavailable
from moeflow.store.names import Entry
from moeflow.store.patience import wait_out
from moeflow.store.s3_errors import TAKEN, THROTTLED, Refused, code_of, said

__all__ = ["Refused", "S3Blobs", "client", "download", "pour", "read_body", "said"]

PART = 64 << 20  # bytes
CONNECTIONS = 32
EMPTY = ("InvalidRange", "416")
BROKEN_OFF = (IncompleteReadError, ReadTimeoutError, ResponseStreamingError, ConnectionError)
ATTEMPTS = 5
T = TypeVar("T")
P = ParamSpec("P")
_making = Lock()


def patiently(method: Callable[Concatenate["S3Blobs", P], T]) -> Callable[Concatenate["S3Blobs", P], T]:
    """Make a method that may be called again wait for a server that does not answer."""

    @wraps(method)
    def waiting(self: "S3Blobs", *args: P.args, **kwargs: P.kwargs) -> T:
        return wait_out(lambda: method(self, *args, **kwargs), self.patience, self._where)

    return waiting


@dataclass(frozen=True)
class S3Blobs:
    bucket: str
    prefix: str = ""
    endpoint: str = ""
    addressing: str = "auto"
    checksum: str = "when_required"
    region: str = ""
    patience: float = 0.0  # seconds that a server which does not answer is waited for

    @property
    def url(self) -> str:
        names = ("endpoint", "region", "addressing", "checksum")
        changed = {n: getattr(self, n) for n in names if getattr(self, n) != getattr(S3Blobs, n)}
        query = urlencode(changed, safe=":/")
        return self._where + (f"?{query}" if query else "")

    @patiently
    def stat(self, name: str) -> Entry | None:
        try:
            with said(self._where):
                head = self._s3.head_object(Bucket=self.bucket, Key=self._at(name))
        except FileNotFoundError:
            return None
        return Entry(name, head["ContentLength"], head["LastModified"].timestamp())

    @patiently
    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        if stop is not None and stop <= start:
            return b""
        asked = {"Bucket": self.bucket, "Key": self._at(name)}
        if start or stop is not None:
            asked["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        with said(self._where):
            try:
                return read_body(self._s3, asked)
            except ClientError as error:
                if code_of(error) in EMPTY:  # the range begins behind the last byte
                    return b""
                raise

    @patiently
    def download(self, name: str, path: Path) -> None:
        with said(self._where):
            download(self._s3, {"Bucket": self.bucket, "Key": self._at(name)}, path)

    @patiently
    def upload(self, path: Path, name: str, *, take: bool = False) -> None:
        with said(self._where):
            # boto3 aborts a multipart upload that fails, and an object appears only when it is whole.
            self._s3.upload_file(str(path), self.bucket, self._at(name), Config=_TRANSFER)

    def create(self, name: str, data: bytes) -> bool:
        lost = False  # whether the answer to an earlier attempt was

        def once() -> bool:
            nonlocal lost
            for attempt in range(6):
                try:
                    with said(self._where):
                        self._s3.put_object(Bucket=self.bucket, Key=self._at(name), Body=data, IfNoneMatch="*")
                    return True
                except Unavailable:
                    lost = True
                    raise
                except Refused as refused:
                    if refused.code in TAKEN:
                        # If an answer was lost, the request was repeated and may have met its own first write.
                        return (lost or refused.asked_again) and self.read(name) == data
                    time.sleep(0.05 * 2**attempt)  # 409: somebody else is writing this name right now
            raise Unavailable(f"{self._where}: {name} is being written by somebody else all the time; run again later")

        return wait_out(once, self.patience, self._where)

    def list(self, prefix: str) -> Iterator[Entry]:
        skip, asked = len(self._at("")), {"Bucket": self.bucket, "Prefix": self._at(prefix)}
        while True:
            page = self._page(asked)
            for item in page.get("Contents", ()):
                yield Entry(item["Key"][skip:], item["Size"], item["LastModified"].timestamp())
            if not page.get("IsTruncated"):
                return
            asked["ContinuationToken"] = page["NextContinuationToken"]

    @patiently
    def _page(self, asked: Mapping[str, str]) -> Any:
        with said(self._where):
            return self._s3.list_objects_v2(**asked)

    def delete(self, names: Iterable[str]) -> None:
        rest = iter(names)
        while chunk := [self._at(n) for n in islice(rest, 1000)]:
            self._delete(chunk)

    @patiently
    def _delete(self, keys: Sequence[str]) -> None:
        with said(self._where):
            try:
                asked = {"Objects": [{"Key": k} for k in keys], "Quiet": True}
                failed = self._s3.delete_objects(Bucket=self.bucket, Delete=asked).get("Errors", [])
            except ClientError as error:  # some servers have no bulk delete, or want a checksum that boto3 omits
                if code_of(error) not in ("NotImplemented", "MissingContentMD5", "InvalidRequest", "InvalidDigest"):
                    raise
                failed = []
                with ThreadPoolExecutor(CONNECTIONS) as pool:
                    [*pool.map(lambda k: self._s3.delete_object(Bucket=self.bucket, Key=k), keys)]
        if failed:
            first = failed[0]
            what = f"{len(failed)} objects cannot be deleted, first {first.get('Key')}: {first.get('Code')}"
            if first.get("Code") in (*THROTTLED, "InternalError", "ServiceUnavailable"):
                raise Unavailable(f"{self._where}: {what}; the server is busy, run again")
            raise StoreError(f"{self._where}: {what}; grant s3:DeleteObject")

    @patiently
    def touch(self, name: str) -> None:
        here = {"Bucket": self.bucket, "Key": self._at(name)}
        with said(self._where):
            # S3 refuses to copy an object onto itself unless something changes: here the time in its metadata.
            extra = {"MetadataDirective": "REPLACE", "Metadata": {"touched": str(int(time.time()))}}
            self._s3.copy(here, self.bucket, self._at(name), ExtraArgs=extra)

    @patiently
    def now(self) -> float:
        with said(self._where):
            head = self._s3.head_bucket(Bucket=self.bucket)
        date = head["ResponseMetadata"]["HTTPHeaders"].get("date")
        return parsedate_to_datetime(date).timestamp() if date else time.time()

    def local(self, name: str) -> Path | None:
        return None

    @patiently
    def sweep(self, before: float) -> None:
        here = {"Bucket": self.bucket}
        with said(self._where):
            for page in self._s3.get_paginator("list_multipart_uploads").paginate(**here, Prefix=self._at("")):
                for upload in page.get("Uploads", ()):
                    if upload["Initiated"].timestamp() < before:
                        self._s3.abort_multipart_upload(**here, Key=upload["Key"], UploadId=upload["UploadId"])

    @patiently
    def look(self) -> None:
        _known(self.endpoint, self._where)
        with said(self._where):
            self._s3.head_bucket(Bucket=self.bucket)

    def check(self) -> None:
        self.look()
        # Random content, so that a write whose answer was lost is not taken for somebody else's, nor that for ours.
        if self.create("probe", os.urandom(16)) and self.create("probe", os.urandom(16)):
            raise StoreError(
                f"{self._where} ignores If-None-Match, so two writers could both win; "
                "use a server with conditional writes (AWS, MinIO, Ceph) or a folder"
            )

    def _at(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    @property
    def _where(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def _s3(self) -> Any:
        return client(self.endpoint, self.addressing, self.checksum, self.region)


_TRANSFER = TransferConfig(multipart_threshold=PART, multipart_chunksize=PART, max_concurrency=4)


def client(endpoint: str = "", addressing: str = "auto", checksum: str = "when_required", region: str = "") -> Any:
    """This process's client for these options, made once: clients cannot be pickled, and making one is slow."""
    with _making:  # several threads cannot safely make sessions at once
        return _client(os.getpid(), endpoint, addressing, checksum, region)  # connections do not survive a fork


@cache
def _client(process: int, endpoint: str, addressing: str, checksum: str, region: str) -> Any:
    core = botocore.session.get_session()
    core.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_when)
    session = boto3.Session(botocore_session=core)
    config = Config(
        retries={"mode": "standard", "max_attempts": 5},
        max_pool_connections=CONNECTIONS,
        s3={"addressing_style": addressing},
        request_checksum_calculation=checksum,
        response_checksum_validation=checksum,
        connect_timeout=10,
        read_timeout=60,
    )
    where = region or session.region_name or "us-east-1"
    return session.client("s3", endpoint_url=endpoint or None, region_name=where, config=config)


def _when(text: str) -> datetime:
    """Parse a time; boto3's own parser takes three quarters of the time of a long listing."""
    try:
        return datetime.fromisoformat(text)
    except (TypeError, ValueError):  # not in the format of listings
        return parse_timestamp(text)


def download(s3: Any, at: Mapping[str, str], path: Path, part: int = PART) -> None:
    """Write one object to `path`: in one request if it fits in `part` bytes, else the rest in parallel parts."""
    with path.open("wb") as file:
        try:
            total = _slice(s3, at, file.fileno(), 0, part, 0, _ignore)
        except ClientError as error:
            if code_of(error) in EMPTY:  # an empty object has no first byte
                return
            raise
        pour(s3, at, file.fileno(), part, total, _ignore, origin=0, part=part)


def pour(
    s3: Any,
    at: Mapping[str, str],
    to: int,
    start: int,
    stop: int,
    grow: Callable[[int], None],
    *,
    origin: int | None = None,
    part: int = PART,
) -> None:
    """Write the bytes [start, stop) of an object to the open file `to`, whose first byte is the object's byte `origin`."""
    first = start if origin is None else origin
    with ThreadPoolExecutor(4) as pool:
        [*pool.map(lambda a: _slice(s3, at, to, a, min(a + part, stop), first, grow), range(start, stop, part))]


def read_body(s3: Any, asked: Mapping[str, str]) -> bytes:
    """Read one object, or the requested range. boto3 repeats a failed request, but not an answer that breaks off."""
    return _again(lambda: s3.get_object(**asked)["Body"].read())


def _slice(s3: Any, at: Mapping[str, str], to: int, start: int, stop: int, origin: int, grow: Callable[[int], None]) -> int:
    """Write one range; return the size of the whole object in bytes."""
    done = start

    def once() -> int:
        nonlocal done
        got = s3.get_object(**at, Range=f"bytes={done}-{stop - 1}")
        for chunk in got["Body"].iter_chunks(1 << 20):
            left = memoryview(chunk)
            while left:
                n = os.pwrite(to, left, done - origin)
                done, left = done + n, left[n:]
                grow(n)
        return int(got.get("ContentRange", "/0").rpartition("/")[2])

    return _again(once)


def _again(ask: Callable[[], T]) -> T:
    for attempt in range(ATTEMPTS - 1):
        try:
            return ask()
        except BROKEN_OFF:
            time.sleep(0.2 * 2**attempt)
    return ask()


def _ignore(n: int) -> None:
    pass


def _known(endpoint: str, where: str) -> None:
    """Raise StoreError if no host has the endpoint's name: that is misspelt, and waiting does not help."""
    host = urlsplit(endpoint).hostname
    if not host or getproxies():
        return
    try:
        socket.getaddrinfo(host, None)
    except socket.gaierror as error:
        if error.errno == socket.EAI_NONAME:
            raise StoreError(f"{where}: no host is called {host}; check the endpoint") from error
