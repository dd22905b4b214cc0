"""A store that does not answer is waited for; what cannot pass is not."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from pathlib import Path

import pytest

from moeflow.store import CorruptBlob, Record, Store, StoreError
from moeflow.store.errors import GaveUp, NoDefault, NoNetwork, SourceUnavailable, Unavailable
from moeflow.store.patience import Once, duration, heard, wait_out
from tests import servers

DOWN = servers.Fault(520, "Down")  # which boto3 does not try again by itself


def failing(times: int, error: Exception) -> Callable[[], str]:
    left = [error] * times

    def ask() -> str:
        if left:
            raise left.pop()
        return "answer"

    return ask


def outage(server: servers.Proxy, seconds: float, fault: servers.Fault = DOWN) -> None:
    """From now on the server does not answer, for that time."""
    end = time.monotonic() + seconds
    server.fault = lambda method, path: fault if time.monotonic() < end else None


def test_what_may_pass_is_asked_again_and_what_cannot_is_not() -> None:
    assert wait_out(failing(1, Unavailable("busy")), 60, "here") == "answer"
    assert wait_out(failing(1, SourceUnavailable("busy")), 60, "here") == "answer"
    for error in (StoreError("no permission"), CorruptBlob("rotten", "blobs/x"), ValueError("no"), KeyError("no")):
        with pytest.raises(type(error)):
            wait_out(failing(1, error), 60, "here")
    wrapped = RuntimeError("a library says so")
    wrapped.__cause__ = Unavailable("busy")
    assert wait_out(failing(1, wrapped), 60, "here") == "answer"


def test_patience_ends_with_what_was_wrong_and_how_long_it_was_waited() -> None:
    with pytest.raises(GaveUp, match="busy; it was waited for, 1 s, and run again continues there"):
        wait_out(failing(9, Unavailable("busy")), 1, "here")
    with pytest.raises(Unavailable, match="^busy$"):
        wait_out(failing(9, Unavailable("busy")), 0, "here")
    given_up = RuntimeError("failed")
    given_up.__cause__ = GaveUp("busy")
    with pytest.raises(RuntimeError):  # who waits outside does not wait once more
        wait_out(failing(1, given_up), 60, "here")


def test_without_a_network_a_run_that_has_not_begun_ends_soon() -> None:
    with pytest.raises(GaveUp, match="unknown; it was waited for, 1 s"):
        wait_out(failing(9, NoDefault("unknown")), 900, "here", offline=1)
    assert wait_out(failing(2, NoDefault("unknown")), 60, "here") == "answer"  # a run that has begun waits as for anything
    for other in (SourceUnavailable("busy"), NoNetwork("what was asked for by name is waited for")):
        assert wait_out(failing(2, other), 60, "here", offline=1) == "answer"


def test_it_is_said_once_whoever_waits() -> None:
    said: list[str] = []
    once = Once(said.append)
    with heard(once):
        for _ in range(2):
            wait_out(failing(2, Unavailable("busy")), 60, "here")
    assert said == ["here does not answer; it is waited for, up to 1 min (busy)", "here answers again"]
    once("there", "there does not answer; it is waited for, up to 1 min (gone)")
    assert len(said) == 3


@pytest.mark.parametrize(("seconds", "text"), [(900, "15 min"), (90, "90 s"), (7200, "2 h"), (0.5, "0.5 s")])
def test_times_in_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_every_way_of_using_a_store_outlasts_an_outage(s3_url: str, server: servers.Proxy, tmp_path: Path) -> None:
    store = Store.open(s3_url, tmp_path / "cache", patience=60)
    out = tmp_path / "out"
    out.mkdir()
    (out / "x").write_bytes(b"x" * 5000)
    key = f"a.step-{0:032x}"
    uses = [
        store.check,
        store.look,
        lambda: store.commit(key, out, record=Record(step="a.step", version=1)),
        lambda: store.artifact(key).read("x", 10, 20),
        lambda: store.artifact(key).file("x"),
        lambda: store.fetch(key, tmp_path / "in"),
        lambda: store.index(["a.step"]),
        lambda: store.blobs.touch(f"manifests/{key}.json"),
        lambda: store.blobs.delete([f"manifests/{key}.json"]),
        lambda: store.blobs.sweep(0),
    ]
    for use in uses:
        outage(server, 0.2)
        use()
    assert (tmp_path / "in" / "x").read_bytes() == b"x" * 5000
    assert not store.has(key)


def test_a_listing_goes_on_after_an_outage_where_it_was(s3_url: str, server: servers.Proxy, tmp_path: Path) -> None:
    blobs = Store.open(s3_url, tmp_path, patience=60).blobs
    with ThreadPoolExecutor(16) as pool:
        [*pool.map(lambda n: blobs.create(f"found/{n:04}", b""), range(1001))]  # a page is a thousand
    listed = []
    for entry in blobs.list("found/"):
        listed.append(entry.name)
        if len(listed) == 1000:
            outage(server, 0.2)
    assert listed == [f"found/{n:04}" for n in range(1001)]


@pytest.mark.parametrize("fault", [servers.Fault(503, "SlowDown"), servers.Fault(hang_up=True)])
def test_a_server_that_is_busy_or_gone_may_come_back(
    s3_url: str, server: servers.Proxy, fault: servers.Fault, tmp_path: Path
) -> None:
    server.fault = lambda method, path: fault
    with pytest.raises(Unavailable, match="run again") as caught:
        Store.open(s3_url, tmp_path).blobs.stat("x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("status", "code"), [(403, "AccessDenied"), (501, "NotImplemented"), (507, "XMinioStorageFull")])
def test_a_refusal_is_not_waited_for(s3_url: str, server: servers.Proxy, status: int, code: str, tmp_path: Path) -> None:
    server.fault = lambda method, path: servers.Fault(status, code)
    store = Store.open(s3_url, tmp_path, patience=3600)
    with pytest.raises(StoreError) as caught:
        store.blobs.read("x")
    assert not isinstance(caught.value, (Unavailable, GaveUp))


def test_a_host_that_does_not_exist_is_not_waited_for(tmp_path: Path) -> None:
    store = Store.open("s3://bucket/x?endpoint=http://no-such-host.invalid", tmp_path, patience=3600)
    with pytest.raises(StoreError, match="no host is called no-such-host.invalid; check the endpoint"):
        store.check()


@pytest.mark.parametrize("patience", [0, 60])
def test_a_check_whose_answers_are_lost_accuses_nobody(s3_url: str, server: servers.Proxy, patience: float, tmp_path: Path) -> None:
    losing = iter([servers.Fault(lose=True)] * 3)
    server.fault = lambda method, path: next(losing, None) if method == "PUT" else None
    store = Store.open(s3_url, tmp_path, patience=patience)
    store.check()
    assert server.count("PUT") >= 4
    server.fault = lambda method, path: DOWN if method == "PUT" and server.count("PUT") % 2 else None
    if patience:
        store.check()


@pytest.mark.parametrize("code", ["RequestTimeTooSkewed", "AccessDenied", "SignatureDoesNotMatch"])
@pytest.mark.parametrize(("ahead", "says"), [(3600, "60 minutes behind"), (-7200, "120 minutes ahead of")])
def test_a_wrong_clock_is_called_one(
    s3_url: str, server: servers.Proxy, ahead: float, says: str, code: str, tmp_path: Path
) -> None:
    date = formatdate(time.time() + ahead, usegmt=True)
    server.fault = lambda method, path: servers.Fault(403, code, date=date)
    store = Store.open(s3_url, tmp_path)
    for ask in (store.look, lambda: store.blobs.read("x"), lambda: store.blobs.stat("x")):
        with pytest.raises(StoreError, match=f"this machine's clock is {says} the server's"):
            ask()
    server.fault = lambda method, path: servers.Fault(403, "AccessDenied", date=formatdate(usegmt=True))
    with pytest.raises(StoreError, match="no permission"):
        store.look()
