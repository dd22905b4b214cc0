"""What a place that holds bytes promises, a disk and a bucket alike."""

import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moeflow.store import Blobs, LocalBlobs, S3Blobs, Store, StoreError, open_blobs
from moeflow.store import s3 as s3_module
from tests import servers


@pytest.fixture
def blobs(store: Store) -> Blobs:
    return store.blobs


def test_bytes_come_back_whole_and_by_range(blobs: Blobs, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"0123456789")
    blobs.upload(tmp_path / "x", "a/x")
    assert blobs.stat("a/x") and not blobs.stat("a/y") and not blobs.stat("a")
    assert blobs.read("a/x") == b"0123456789"
    assert (blobs.read("a/x", 2, 5), blobs.read("a/x", 8), blobs.read("a/x", 8, 99)) == (b"234", b"89", b"89")
    assert (blobs.read("a/x", 5, 5), blobs.read("a/x", 99, 100)) == (b"", b"")
    blobs.download("a/x", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"0123456789"


def test_an_empty_file_is_a_file(blobs: Blobs, tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    blobs.upload(tmp_path / "x", "x")
    blobs.download("x", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"" == blobs.read("x")


def test_what_is_not_there_is_a_file_not_found(blobs: Blobs, tmp_path: Path) -> None:
    assert blobs.stat("none") is None
    asked = [
        lambda: blobs.read("none"),
        lambda: blobs.download("none", tmp_path / "x"),
        lambda: blobs.touch("none"),
    ]
    for ask in asked:
        with pytest.raises(FileNotFoundError):
            ask()


def test_of_eight_writers_of_one_name_one_wins_and_its_bytes_stand(blobs: Blobs) -> None:
    with ThreadPoolExecutor(8) as pool:
        won = [*pool.map(lambda i: blobs.create("versions/1", bytes([i])), range(8))]
    assert sum(won) == 1
    assert blobs.read("versions/1") == bytes([won.index(True)])


def test_listing_goes_by_prefix_also_within_a_name(blobs: Blobs) -> None:
    for name in ("found/cal-1/a", "found/cal-2/b", "found/caz", "other"):
        assert blobs.create(name, b"12")
    listed = {e.name: e.size for e in blobs.list("found/cal-")}
    assert listed == {"found/cal-1/a": 2, "found/cal-2/b": 2}
    assert {e.name for e in blobs.list("found/")} == {"found/cal-1/a", "found/cal-2/b", "found/caz"}
    assert [*blobs.list("nothing/")] == []


def test_deleting_takes_many_names_and_forgives_those_that_are_gone(blobs: Blobs) -> None:
    for i in range(5):
        blobs.create(f"a/{i}", b"")
    blobs.delete([f"a/{i}" for i in range(4)] + ["a/9"])
    assert [e.name for e in blobs.list("a/")] == ["a/4"]


def test_touching_renews_the_age_and_keeps_the_bytes(blobs: Blobs) -> None:
    blobs.create("x", b"bytes")
    first = blobs.stat("x")
    time.sleep(1.1)  # S3 tells time in seconds
    blobs.touch("x")
    again = blobs.stat("x")
    assert first is not None and again is not None and again.modified > first.modified
    assert blobs.read("x") == b"bytes"


def test_they_pickle_and_find_the_same_bytes_elsewhere(blobs: Blobs) -> None:
    blobs.create("x", b"1")
    assert pickle.loads(pickle.dumps(blobs)).read("x") == b"1"
    assert open_blobs(blobs.url).read("x") == b"1"


def test_a_usable_place_passes_its_check_twice(blobs: Blobs) -> None:
    blobs.check()
    blobs.check()


def test_a_file_that_is_taken_moves_no_bytes_and_one_with_another_name_is_copied(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path / "store")
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "shared").write_text("shared")
    (tmp_path / "other name").hardlink_to(tmp_path / "shared")
    for name in ("mine", "shared"):
        blobs.upload(tmp_path / name, f"blobs/{name}", take=True)
    assert (blobs.root / "blobs/mine").samefile(tmp_path / "mine")
    assert not (blobs.root / "blobs/shared").samefile(tmp_path / "shared")
    blobs.upload(tmp_path / "mine", "blobs/copy")
    assert not (blobs.root / "blobs/copy").samefile(tmp_path / "mine")
    assert [*blobs.list("halves/")] == []


def test_a_small_object_costs_one_request_each_way(s3_store: Store, server: servers.Proxy, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x" * 1000)
    s3_store.blobs.upload(tmp_path / "x", "x")
    s3_store.blobs.download("x", tmp_path / "y")
    assert [(r.method, r.sent, r.received) for r in server.requests] == [("PUT", 1000, 0), ("GET", 0, 1000)]


def test_a_range_moves_only_its_bytes(s3_store: Store, server: servers.Proxy) -> None:
    s3_store.blobs.create("x", b"x" * 10_000)
    server.requests.clear()
    s3_store.blobs.read("x", 100, 350)
    assert sum(r.received for r in server.requests) == 250


def test_large_objects_travel_in_parts_and_arrive_equal(
    s3_store: Store, server: servers.Proxy, bucket: str, tmp_path: Path
) -> None:
    data = bytes(range(256)) * 40
    s3_store.blobs.create("x", data)
    server.requests.clear()
    at = {"Bucket": bucket, "Key": "pre/fix/x"}
    for size in (999, 10_240, 20_000):
        s3_module.download(s3_module.client(server.url), at, tmp_path / "y", part=size)
        assert (tmp_path / "y").read_bytes() == data
    assert len(server.requests) == 11 + 1 + 1


def test_a_large_file_is_uploaded_in_parts(s3_store: Store, server: servers.Proxy, tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.truncate(s3_module.PART + 1)
    s3_store.blobs.upload(tmp_path / "x", "x")
    assert server.count("PUT", "partNumber=") == 2
    entry = s3_store.blobs.stat("x")
    assert entry is not None and entry.size == s3_module.PART + 1
    s3_store.blobs.download("x", tmp_path / "y")
    assert (tmp_path / "y").read_bytes() == (tmp_path / "x").read_bytes()


def test_an_answer_that_breaks_off_is_asked_for_again_from_there(s3_store: Store, server: servers.Proxy, tmp_path: Path) -> None:
    s3_store.blobs.create("x", b"0123456789" * 1000)
    cuts = iter([100, 7000])
    server.fault = lambda method, path: servers.Fault(break_off=next(cuts, -1)) if method == "GET" else None
    s3_store.blobs.download("x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"0123456789" * 1000


def test_a_busy_server_is_asked_again(s3_store: Store, server: servers.Proxy) -> None:
    faults = iter([servers.Fault(503, "SlowDown"), servers.Fault(409, "ConditionalRequestConflict")])
    server.fault = lambda method, path: next(faults, None)
    assert s3_store.blobs.create("x", b"1")
    assert s3_store.blobs.read("x") == b"1"


def test_a_writer_whose_answer_was_lost_knows_its_own_write_again(s3_store: Store, server: servers.Proxy) -> None:
    lost = iter([servers.Fault(lose=True)])
    server.fault = lambda method, path: next(lost, None) if method == "PUT" else None
    assert s3_store.blobs.create("x", b"mine")
    assert server.count("PUT") == 2 and s3_store.blobs.read("x") == b"mine"
    lost = iter([servers.Fault(lose=True)])
    assert not s3_store.blobs.create("x", b"another's")


def test_a_server_without_bulk_delete_is_asked_one_by_one(s3_store: Store, server: servers.Proxy) -> None:
    for i in range(3):
        s3_store.blobs.create(f"a/{i}", b"")
    server.fault = lambda method, path: servers.Fault(400, "MissingContentMD5") if method == "POST" else None
    s3_store.blobs.delete(f"a/{i}" for i in range(3))
    assert [*s3_store.blobs.list("a/")] == []


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("gs://bucket/x", "know folders and s3://"),
        ("", "give a folder"),
        ("s3:///prefix", "names no bucket"),
        ("s3://key:secret@bucket/x", "credentials do not belong"),
        ("s3://bucket/x?endpoint=http://key:secret@host", "credentials do not belong"),
        ("s3://bucket/x?endpoint=localhost:9000", "write http://host:port"),
        ("s3://bucket/x?regoin=eu", "unknown option 'regoin'; known: endpoint, addressing, checksum, region"),
        ("s3://bucket/x?addressing=paths", "known: auto, path, virtual"),
    ],
)
def test_an_address_that_is_none_is_refused_with_what_is_known(url: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        open_blobs(url)


def test_an_address_carries_what_s3_compatible_servers_differ_in() -> None:
    url = "s3://bucket/a/b?endpoint=http://host:9000&region=eu-west-1&addressing=path&checksum=when_supported"
    blobs = open_blobs(url)
    assert blobs == S3Blobs("bucket", "a/b", "http://host:9000", "path", "when_supported", "eu-west-1")
    assert open_blobs(blobs.url) == blobs
    assert open_blobs("s3://bucket") == S3Blobs("bucket")


def test_a_bucket_that_does_not_exist_is_named(server: servers.Proxy, tmp_path: Path) -> None:
    server.reset()
    missing = open_blobs(f"s3://no-such-bucket/x?endpoint={server.url}")
    for ask in (missing.check, lambda: missing.create("x", b""), lambda: [*missing.list("")]):
        with pytest.raises(StoreError, match="there is no bucket 'no-such-bucket'; create it"):
            ask()


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (servers.Fault(403, "InvalidAccessKeyId"), "credentials are not accepted .InvalidAccessKeyId.; check AWS_"),
        (servers.Fault(403, "SignatureDoesNotMatch"), "credentials are not accepted"),
        (servers.Fault(403, "AccessDenied"), "no permission for .*; grant read, write, list and delete"),
        (servers.Fault(400, "InvalidArgument"), "InvalidArgument: told to; if it lasts"),
    ],
)
def test_what_the_server_refuses_is_one_line_with_the_way_out(
    s3_store: Store, server: servers.Proxy, tmp_path: Path, fault: servers.Fault, says: str
) -> None:
    server.fault = lambda method, path: fault
    (tmp_path / "x").write_text("1")
    asked = [
        lambda: s3_store.blobs.create("x", b""),
        lambda: s3_store.blobs.read("x"),
        lambda: s3_store.blobs.upload(tmp_path / "x", "x"),
        lambda: s3_store.blobs.download("x", tmp_path / "y"),
        lambda: [*s3_store.blobs.list("")],
        s3_store.check,
    ]
    for ask in asked:
        with pytest.raises(StoreError) as caught:
            ask()
        assert "\n" not in str(caught.value)
    with pytest.raises(StoreError, match=says):
        s3_store.blobs.read("x")


def test_missing_credentials_are_said_to_be_missing(server: servers.Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    server.reset()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    # Another region, so that this process makes another client, which looks for credentials again.
    with pytest.raises(StoreError, match="no credentials were found; set AWS_ACCESS_KEY_ID"):
        open_blobs(f"s3://bucket/x?endpoint={server.url}&region=eu-north-1").check()


def test_a_server_that_ignores_conditions_is_refused_before_the_run(s3_store: Store, server: servers.Proxy) -> None:
    server.drop = {"if-none-match"}
    with pytest.raises(StoreError, match="ignores If-None-Match"):
        s3_store.check()


def test_a_server_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with servers.proxy("http://127.0.0.1:9") as gone:
        url = gone.url
    blobs = S3Blobs("bucket", "x", url)
    with pytest.raises(StoreError, match="check the endpoint and the network"):
        blobs.read("x")
