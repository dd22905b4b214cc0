"""Both runners on a bucket: only what is used is moved, counted at the server."""

import uuid
from collections.abc import Callable
from pathlib import Path

import boto3
import pytest

from moeflow.run.plan import plan
from moeflow.step import Step
from moeflow.store import Store
from moeflow.store.manifest import CHUNK
from tests import servers
from tests.run import toy


@pytest.fixture
def store(server: servers.Proxy, tmp_path: Path) -> Store:
    bucket = f"bucket-{uuid.uuid4().hex}"
    boto3.client("s3", endpoint_url=server.url, region_name="us-east-1").create_bucket(Bucket=bucket)
    server.reset()
    return Store.open(f"s3://{bucket}/pre/fix?endpoint={server.url}", tmp_path / "cache")


def moved(server: servers.Proxy) -> int:
    """Bytes of blobs that crossed the wire."""
    return sum(r.sent + r.received for r in server.requests if "/blobs/" in r.path)


def graph(n: int) -> Step:
    return toy.total(*(toy.half(toy.number(n=n + i)) for i in range(3)))


def test_a_run_on_a_bucket_is_whole_and_a_second_does_nothing(run: Callable, store: Store) -> None:
    assert len(run([graph(0)], store).ran) == 7
    assert store.artifact(graph(0).key).file("n").read_text().strip() == "1"
    assert run([graph(0)], store).stored == 7


def test_a_finished_graph_is_found_by_listings_alone(run: Callable, store: Store, server: servers.Proxy) -> None:
    run([graph(0)], store)
    server.reset()
    run([graph(0)], store)
    assert {r.method for r in server.requests} == {"GET"}
    assert server.count() == server.count(path="list-type=2") == 2, "manifests and markers of all steps of a verb"


def test_same_contents_move_no_bytes(run: Callable, store: Store, server: servers.Proxy) -> None:
    old, new = toy.half(toy.number(n=6, size=5000)), toy.half(toy.number(n=7, size=5000))
    run([toy.total(old, size=3000), new], store)
    server.reset()
    assert run([toy.total(new, size=3000)], store).aliased == 1
    assert moved(server) == 0


def test_linking_moves_no_bytes(run: Callable, store: Store, server: servers.Proxy) -> None:
    parts = [toy.number(n=n, size=5000 + n) for n in (1, 2)]
    run(parts, store)
    server.reset()
    run([toy.assemble(*parts)], store)
    assert moved(server) < 100, "the one byte of its own, and answers without a body"


def test_a_range_is_read_without_the_rest(run: Callable, store: Store, server: servers.Proxy) -> None:
    base = toy.number(n=7, size=4_000_000)
    run([base], store)
    server.reset()
    run([toy.slice_(base, start=2_500_000, stop=2_501_000)], store)
    assert CHUNK <= moved(server) < CHUNK + 5000, "the chunk in which a thousand bytes lie, and as many written"


def test_a_plan_of_two_thousand_steps_is_a_few_listings(store: Store, server: servers.Proxy) -> None:
    target = toy.total(*(toy.half(toy.number(n=n)) for n in range(1000)))
    assert len(plan([target], store).keys("run")) == 2001
    assert server.count() == server.count(path="list-type=2") == 2
