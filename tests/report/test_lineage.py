"""What is said of an artifact and of all that is upstream of it."""

import io
import json
from pathlib import Path

import pytest

from moeflow.report import about, console, lineage, summary
from moeflow.run import in_process
from moeflow.store import Store, versions
from tests.run import toy


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "store"))


def text(made: object) -> str:
    stream = io.StringIO()
    console(stream).print(made)
    return stream.getvalue()


def test_a_version_is_described_a_fact_a_line(store: Store) -> None:
    target = toy.total(toy.number(n=1), size=100)
    in_process.run([target], store)
    versions.publish(store, "small", target.key)
    versions.promote(store, "small", "production")
    (version,) = versions.list(store)
    told = about.of(store, version.ref)
    assert summary.lines(told)[0] == "small@1  production"
    assert [line.endswith("size = 100") for line in lineage.parameters(told.manifest)] == [True, False]
    *_, contents, key = summary.hashes(told)
    assert key.endswith(target.key) and "1 file, 100 bytes" in contents


def test_upstream_is_a_line_for_each_name_or_for_each_key(store: Store) -> None:
    target = toy.total(*(toy.number(n=n) for n in range(5)))
    in_process.run([target], store)
    upstream = versions.lineage(store, target.key)
    grouped, whole = text(lineage.steps(upstream, plain=True)), text(lineage.steps(upstream, every=True, plain=True))
    assert len(grouped.splitlines()) == 3 and len(whole.splitlines()) == 7
    assert "n=..." in grouped and "size=8" in grouped
    assert all(key in whole for key in upstream)
    assert target.source[:8] in grouped


def test_library_versions_are_those_of_everything_upstream(store: Store) -> None:
    target = toy.total(toy.number(n=1))
    in_process.run([target], store)
    libraries = lineage.libraries(versions.lineage(store, target.key))
    assert len(libraries["python"]) == 1 and "numpy" in libraries


def test_a_lineage_holds_the_manifest_of_every_key(store: Store) -> None:
    target = toy.total(*(toy.number(n=n) for n in range(3)))
    in_process.run([target], store)
    manifests = [json.loads(m.dump()) for m in versions.lineage(store, target.key).values()]
    assert {m["key"] for m in manifests} == {target.key, *(i.key for i in target.inputs)}
    assert all({"params", "libraries", "source", "inputs", "files"} <= m.keys() for m in manifests)
