"""Named bytes in a bucket, through boto3: one request for small objects, parallel parts for large ones.

S3-compatible servers differ, so the only special request is PutObject with If-None-Match, for what must be written once;
digests are the store's own. Knows no keys and no manifests.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar
from urllib.parse import urlencode

import boto3
import botocore.session
from boto3.exceptions import S3UploadFailedError
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ReadTimeoutError,
    ResponseStreamingError,
)
from botocore.utils import parse_timestamp

from moeflow.store.errors import StoreError
from moeflow.store.names import Entry

PART = 64 << 20  # bytes
CONNECTIONS = 32
ABSENT = ("404", "NoSuchKey", "NotFound")
TAKEN = ("PreconditionFailed", "412")
BUSY = ("ConditionalRequestConflict", "409", "OperationAborted")
STRANGERS = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired")
EMPTY = ("InvalidRange", "416")
BROKEN_OFF = (IncompleteReadError, ReadTimeoutError, ResponseStreamingError, ConnectionError)
ATTEMPTS = 5
T = TypeVar("T")
_making = Lock()


@dataclass(frozen=True)
class S3Blobs:
    bucket: str
    prefix: str = ""
    endpoint: str = ""
    addressing: str = "auto"
    checksum: str = "when_required"
    region: str = ""

    @property
    def url(self) -> str:
        names = ("endpoint", "region", "addressing", "checksum")
        changed = {n: getattr(self, n) for n in names if getattr(self, n) != getattr(S3Blobs, n)}
        query = urlencode(changed, safe=":/")
        return self._where + (f"?{query}" if query else "")

    def stat(self, name: str) -> Entry | None:
        try:
            with said(self._where):
                head = self._s3.head_object(Bucket=self.bucket, Key=self._at(name))
        except FileNotFoundError:
            return None
        return Entry(name, head["ContentLength"], head["LastModified"].timestamp())

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
                if _code(error) in EMPTY:  # the range begins behind the last byte
                    return b""
                raise

    def download(self, name: str, path: Path) -> None:
        with said(self._where):
            download(self._s3, {"Bucket": self.bucket, "Key": self._at(name)}, path)

    def upload(self, path: Path, name: str, *, take: bool = False) -> None:
        with said(self._where):
            # boto3 aborts a multipart upload that fails, and an object appears only when it is whole.
            self._s3.upload_file(str(path), self.bucket, self._at(name), Config=_TRANSFER)

    def create(self, name: str, data: bytes) -> bool:
        for attempt in range(6):
            try:
                with said(self._where):
                    self._s3.put_object(Bucket=self.bucket, Key=self._at(name), Body=data, IfNoneMatch="*")
                return True
            except Refused as refused:
                if refused.code in TAKEN:
                    # If an answer was lost, boto3 has repeated the request and may have met its own first write.
                    return refused.asked_again and self.read(name) == data
                time.sleep(0.05 * 2**attempt)  # 409: somebody else is writing this name right now
        raise StoreError(f"{self._where}: {name} is being written by somebody else all the time; run again later")

    def list(self, prefix: str) -> Iterator[Entry]:
        skip = len(self._at(""))
        with said(self._where):
            pages = self._s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self._at(prefix))
            for page in pages:
                for item in page.get("Contents", ()):
                    yield Entry(item["Key"][skip:], item["Size"], item["LastModified"].timestamp())

    def delete(self, names: Iterable[str]) -> None:
        rest = iter(names)
        while chunk := [self._at(n) for n in islice(rest, 1000)]:
            with said(self._where):
                try:
                    asked = {"Objects": [{"Key": k} for k in chunk], "Quiet": True}
                    failed = self._s3.delete_objects(Bucket=self.bucket, Delete=asked).get("Errors", [])
                except ClientError as error:  # some servers have no bulk delete, or want a checksum that boto3 omits
                    if _code(error) not in ("NotImplemented", "MissingContentMD5", "InvalidRequest", "InvalidDigest"):
                        raise
                    failed = []
                    with ThreadPoolExecutor(CONNECTIONS) as pool:
                        [*pool.map(lambda k: self._s3.delete_object(Bucket=self.bucket, Key=k), chunk)]
            if failed:
                first = failed[0]
                raise StoreError(
                    f"{self._where}: {len(failed)} objects cannot be deleted, first {first.get('Key')}: "
                    f"{first.get('Code')}; grant s3:DeleteObject"
                )

    def touch(self, name: str) -> None:
        here = {"Bucket": self.bucket, "Key": self._at(name)}
        with said(self._where):
            # S3 refuses to copy an object onto itself unless something changes: here the time in its metadata.
            extra = {"MetadataDirective": "REPLACE", "Metadata": {"touched": str(int(time.time()))}}
            self._s3.copy(here, self.bucket, self._at(name), ExtraArgs=extra)

    def local(self, name: str) -> Path | None:
        return None

    def sweep(self, before: float) -> None:
        here = {"Bucket": self.bucket}
        with said(self._where):
            for page in self._s3.get_paginator("list_multipart_uploads").paginate(**here, Prefix=self._at("")):
                for upload in page.get("Uploads", ()):
                    if upload["Initiated"].timestamp() < before:
                        self._s3.abort_multipart_upload(**here, Key=upload["Key"], UploadId=upload["UploadId"])

    def check(self) -> None:
        with said(self._where):
            self._s3.head_bucket(Bucket=self.bucket)
        if self.create("probe", b"") and self.create("probe", b""):
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
            if _code(error) in EMPTY:  # an empty object has no first byte
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


class Refused(Exception):
    """A conditional write was refused."""

    def __init__(self, code: str, asked_again: bool) -> None:
        super().__init__(code)
        self.code, self.asked_again = code, asked_again


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


@contextmanager
def said(where: str) -> Iterator[None]:
    """Turn boto3's errors into StoreError, Refused, or FileNotFoundError for a missing name, in one line about `where`."""
    try:
        yield
    except ClientError as error:
        code, message = _code(error), error.response.get("Error", {}).get("Message", "")
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        bucket = where.removeprefix("s3://").partition("/")[0]
        if code == "NoSuchBucket" or (code == "404" and error.operation_name == "HeadBucket"):
            raise StoreError(f"{where}: there is no bucket {bucket!r}; create it or name another in --store") from error
        if code in ABSENT:
            raise FileNotFoundError(f"{where}: {message or code}") from error
        if code in TAKEN or code in BUSY:
            again = error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0) > 0
            raise Refused(code, again) from error
        if code in STRANGERS:
            why = f"the credentials are not accepted ({code}); check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the clock"
        elif code in ("AccessDenied", "403", "Forbidden", "AllAccessDisabled") or status == 403:
            why = f"no permission for {error.operation_name} ({code}); grant read, write, list and delete on this prefix"
        else:
            line = message.splitlines()[0] if message else str(status)
            advice = "if it lasts, check the server and the addressing= and checksum= options"
            why = f"{error.operation_name} failed with {code}: {line}; {advice}"
        raise StoreError(f"{where}: {why}") from error
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise StoreError(
            f"{where}: no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use a profile or a role"
        ) from error
    except S3UploadFailedError as error:
        if isinstance(cause := error.__context__, ClientError):
            with said(where):
                raise cause from None
        raise StoreError(f"{where}: {str(error).splitlines()[0]}; run again") from error
    except BotoCoreError as error:
        raise StoreError(f"{where}: {str(error).splitlines()[0]}; check the endpoint and the network, then run again") from error
