"""Sources in S3: the objects under a prefix, one object, or a glob, pinned by ETag and version without reading them."""

import fnmatch
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from botocore.exceptions import ClientError

from moeflow.sources.places import Grow, Kind, Pinned, SourceFile, chosen
from moeflow.store import s3
from moeflow.store.address import parse_s3
from moeflow.store.errors import MissingSource, SourceUnavailable, StoreError, Unavailable

BY_PARTS = True
WILD = "*?["


def pin(uri: str, kind: Kind) -> Pinned:
    at = parse_s3(uri)
    wild = any(c in at.prefix for c in WILD)
    fixed = at.prefix[: min(at.prefix.index(c) for c in WILD if c in at.prefix)] if wild else at.prefix
    with asked(uri):
        objects = _listed(s3.client(**at.options), at.bucket, fixed)
    left: tuple[str, ...] = ()
    if not wild and at.prefix in objects:
        root, _, name = at.prefix.rpartition("/")
        files = [name]
    else:
        root = fixed.rpartition("/")[0] if wild else at.prefix
        above = f"{root}/" if root else ""
        inside = {k.removeprefix(above): k for k in objects if k.startswith(above)}
        if wild:
            files = sorted(n for n, k in inside.items() if fnmatch.fnmatchcase(k, at.prefix))
        else:
            files, left = chosen(inside, kind, uri) if inside else ([], ())
    if not files:
        raise MissingSource(f"{uri}: there are no such objects; check bucket and prefix")
    query = urlencode({k: v for k, v in sorted(at.options.items()) if v}, safe=":/")
    canonical = f"s3://{at.bucket}/{root}".rstrip("/") + (f"?{query}" if query else "")
    return Pinned(canonical, "", tuple(SourceFile(n, *objects[f"{root}/{n}" if root else n]) for n in files), left)


def read(uri: str, file: SourceFile, start: int, stop: int) -> bytes:
    if min(stop, file.size) <= start:
        return b""
    client, at = _object(uri, file)
    with asked(uri, file):
        return s3.read_body(client, at | {"Range": f"bytes={start}-{min(stop, file.size) - 1}"})


def stays(uri: str, file: SourceFile) -> bool:
    return True


def local(uri: str, file: SourceFile) -> Path | None:
    return None


def known(uri: str, file: SourceFile) -> SourceFile:
    return file


def bring(uri: str, file: SourceFile, to: Path, grow: Grow, start: int, stop: int) -> None:
    client, at = _object(uri, file)
    with asked(uri, file), to.open("wb") as out:
        s3.pour(client, at, out.fileno(), start, stop, grow)
    if os.path.getsize(to) != stop - start:
        raise MissingSource(f"{uri}: {file.name} ended after {os.path.getsize(to)} of {stop - start} bytes; run again")


def _listed(client: Any, bucket: str, prefix: str) -> dict[str, tuple[int, str]]:
    """Size and pin of each object; with its version if the bucket keeps versions and allows listing them."""
    try:
        pages = client.get_paginator("list_object_versions").paginate(Bucket=bucket, Prefix=prefix)
        newest = [v for page in pages for v in page.get("Versions", ()) if v["IsLatest"]]
        return {v["Key"]: (v["Size"], _pin(v["ETag"], v.get("VersionId", "null"))) for v in newest}
    except ClientError as error:
        if error.response.get("Error", {}).get("Code") not in ("AccessDenied", "NotImplemented", "403", "501"):
            raise
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return {o["Key"]: (o["Size"], _pin(o["ETag"], "null")) for page in pages for o in page.get("Contents", ())}


def _pin(etag: str, version: str) -> str:
    return f"etag:{etag.strip(chr(34))}" + ("" if version == "null" else f"/{version}")


def _object(uri: str, file: SourceFile) -> tuple[Any, dict[str, str]]:
    at = parse_s3(uri)
    etag, _, version = file.pin.removeprefix("etag:").partition("/")
    key = f"{at.prefix}/{file.name}" if at.prefix else file.name
    # radosgw compares If-Match without quotation marks, AWS and others with or without
    asked = {"Bucket": at.bucket, "Key": key, "IfMatch": etag}
    return s3.client(**at.options), asked | ({"VersionId": version} if version else {})


@contextmanager
def asked(uri: str, file: SourceFile | None = None) -> Iterator[None]:
    """Turn S3's errors into MissingSource, in one line with the source's name."""
    what = f"{uri}: {file.name}" if file else uri
    try:
        with s3.said(uri.partition("?")[0]):
            yield
    except s3.Refused as error:
        raise MissingSource(f"{what} has changed since it was pinned; run again to pin it anew") from error
    except FileNotFoundError as error:
        raise MissingSource(f"{what} is gone since it was pinned; put it back, or run again without it") from error
    except Unavailable as error:
        raise SourceUnavailable(str(error)) from error
    except StoreError as error:
        raise MissingSource(str(error).replace("name another in --store", "check the address")) from error
