"""Sources in S3: pinned by ETag and version from a listing, brought by range, refused when they have changed."""

from pathlib import Path
from typing import Any

import pytest

from moeflow.sources import pin
from moeflow.sources import s3 as place
from moeflow.store import MissingSource
from moeflow.store import s3 as s3_module
from tests import servers
from tests.making import read
from tests.sources.running import run


@pytest.fixture
def client(server: servers.Proxy) -> Any:
    return s3_module.client(server.url)


@pytest.fixture
def uri(client: Any, bucket: str, server: servers.Proxy) -> str:
    for name, data in {
        "models/tiny/config.json": b"{}",
        "models/tiny/model.safetensors": b"weights" * 1000,
        "models/tiny/own.py": b"import os",
        "models/tiny-other/config.json": b"{}",
        "texts/a.jsonl": b'{"text": 1}',
        "texts/b.jsonl": b'{"text": 2}',
        "texts/c.txt": b"text",
    }.items():
        client.put_object(Bucket=bucket, Key=name, Body=data)
    server.requests.clear()
    return f"s3://{bucket}/models/tiny?endpoint={server.url}"


def test_a_prefix_is_pinned_by_one_listing_and_no_object_is_read(uri: str, server: servers.Proxy) -> None:
    source = pin(uri, kind="model")
    assert source.names() == ["config.json", "model.safetensors", "own.py"] and source.uri == uri
    assert all(f.pin.startswith("etag:") and "/" not in f.pin for f in source.files)
    assert source.find("model.safetensors").size == 7000
    assert len(server.requests) == 1
    assert pin(uri.replace("tiny", "tiny/"), kind="model") == source


def test_headers_are_read_by_range(uri: str, server: servers.Proxy) -> None:
    source = pin(uri, kind="model")
    server.requests.clear()
    assert source.read("model.safetensors", 7, 14) == b"weights" and source.read("config.json", 2, 9) == b""
    assert sum(r.received for r in server.requests) == 7


def test_files_arrive_whole_with_progress(uri: str, tmp_path: Path) -> None:
    source = pin(uri, kind="model")
    fetched = run(source.file("model.safetensors"), tmp_path / "1")
    assert (fetched.out / "model.safetensors").read_bytes() == b"weights" * 1000
    assert fetched.reported[-1] == (7000, 7000, "bytes")
    assert read(run(source.group(["config.json"]), tmp_path / "2").out) == {"config.json": "{}"}


def test_a_part_of_a_file_costs_only_its_bytes(uri: str, server: servers.Proxy, tmp_path: Path) -> None:
    source = pin(uri, kind="model")
    server.requests.clear()
    place.bring(source.uri, source.find("model.safetensors"), tmp_path / "x", lambda n: None, 700, 1400)
    assert (tmp_path / "x").read_bytes() == b"weights" * 100
    assert sum(r.received for r in server.requests) == 700


def test_an_object_that_was_overwritten_is_refused(uri: str, client: Any, bucket: str, tmp_path: Path) -> None:
    source = pin(uri, kind="model")
    client.put_object(Bucket=bucket, Key="models/tiny/config.json", Body=b"[]")
    client.delete_object(Bucket=bucket, Key="models/tiny/model.safetensors")
    for ask in (lambda: source.text("config.json"), lambda: run(source.group(["config.json"]), tmp_path / "1")):
        with pytest.raises(MissingSource, match=r"config.json has changed since it was pinned; run again to pin it"):
            ask()
    with pytest.raises(MissingSource, match=r"model.safetensors is gone since it was pinned; put it back"):
        run(source.file("model.safetensors"), tmp_path / "2")
    assert pin(uri.replace("tiny", "tiny/config.json"), kind="data").files != source.files[:1]


def test_in_a_versioned_bucket_the_version_is_pinned_and_stays_readable(uri: str, client: Any, bucket: str, tmp_path: Path) -> None:
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    client.put_object(Bucket=bucket, Key="models/tiny/config.json", Body=b'{"new": 1}')
    source = pin(uri, kind="model")
    assert "/" in source.find("config.json").pin
    client.put_object(Bucket=bucket, Key="models/tiny/config.json", Body=b'{"newer": 1}')
    assert source.text("config.json") == '{"new": 1}'
    assert read(run(source.group(["config.json"]), tmp_path).out) == {"config.json": '{"new": 1}'}


def test_without_leave_to_list_versions_etags_are_enough(uri: str, server: servers.Proxy) -> None:
    expected = pin(uri, kind="model")
    server.fault = lambda method, path: servers.Fault(403, "AccessDenied") if "versions" in path else None
    assert pin(uri, kind="model") == expected


def test_texts_are_an_object_a_prefix_or_a_glob(bucket: str, uri: str, server: servers.Proxy) -> None:
    at = f"s3://{bucket}/texts"
    query = f"?endpoint={server.url}"
    assert pin(f"{at}{query}", kind="data").names() == ["a.jsonl", "b.jsonl", "c.txt"]
    assert pin(f"{at}/c.txt{query}", kind="data").names() == ["c.txt"]
    some = pin(f"{at}/?.jsonl{query}", kind="data")
    assert (some.names(), some.uri) == (["a.jsonl", "b.jsonl"], f"{at}{query}")
    assert some.text("b.jsonl") == '{"text": 2}'


def test_what_is_not_there_is_said_to_be_missing(bucket: str, server: servers.Proxy) -> None:
    with pytest.raises(MissingSource, match="there are no such objects; check bucket and prefix"):
        pin(f"s3://{bucket}/none?endpoint={server.url}", kind="model")
    with pytest.raises(MissingSource, match="there is no bucket 'no-such-bucket'"):
        pin(f"s3://no-such-bucket/x?endpoint={server.url}", kind="data")
    with pytest.raises(ValueError, match="credentials do not belong"):
        pin("s3://key:secret@bucket/x", kind="data")
