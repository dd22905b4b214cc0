"""A model's weights may stay where they lie: layers are read there by range, as the same bytes that a copy would give."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.prune.searches import Search
from moeflow.methods.recipes import naee
from moeflow.run import StepFailed
from moeflow.sources import How, Source, pin
from moeflow.sources.steps import folders_read
from moeflow.step import Step, upstream
from moeflow.store import Store, s3
from tests import running, servers, tiny
from tests.models import calibrated
from tests.sources.test_sources import old

SHARD = "model.safetensors"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write("mixtral", tmp_path_factory.mktemp("written") / "model")


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return old(Path(shutil.copytree(written, tmp_path / "model")))


@pytest.fixture
def bucketed(folder: Path, server: servers.Proxy, bucket: str) -> str:
    for path in folder.iterdir():
        s3.client(server.url).upload_file(str(path), bucket, f"models/tiny/{path.name}")
    return f"s3://{bucket}/models/tiny?endpoint={server.url}"


@pytest.fixture(params=["folder", "s3"])
def uri(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue("folder" if request.param == "folder" else "bucketed"))


def target_of(uri: str, at: Path, how: How | None = None) -> Step:
    """The checkpoint pruned by how often experts are chosen."""
    seen = calibrated(checkpoint.pinned(pin(uri, kind="model", how=how)), at, between=False)
    return checkpoint.checkpoint_of(naee.prune(seen, 5, Search("frequency")))


def test_weights_that_stay_where_they_are_are_referred_to_and_copied_on_request(uri: str) -> None:
    def made_by(source: Source) -> str:
        return source.weights(SHARD).name

    assert made_by(pin(uri, kind="model")) == made_by(pin(uri, kind="model", how="refer")) == "sources.reference"
    assert made_by(pin(uri, kind="model", how="copy")) == "sources.file"
    assert pin(uri, kind="model").group(["config.json"]).name == "sources.files", "small files are always copied"


def test_what_comes_out_is_the_same_and_the_weights_are_not_in_the_store(uri: str, tmp_path: Path) -> None:
    stores = [Store.open(str(tmp_path / how)) for how in ("refer", "copy")]
    refer, copy = target_of(uri, tmp_path, "refer"), target_of(uri, tmp_path, "copy")
    assert refer.key != copy.key
    for target, store in zip((refer, copy), stores, strict=True):
        running.run(store, target)
    digests = [store.manifest(target.key).digest for target, store in zip((refer, copy), stores, strict=True)]
    assert digests[0] == digests[1]
    weights = pin(uri, kind="model").find(SHARD).size
    of_layers = sum(store.manifest(layer.key).bytes for layer in upstream([copy]) if layer.name == "checkpoint.layer")
    without, with_copy = (sum(e.size for e in store.blobs.list("blobs/")) for store in stores)
    assert weights * 0.95 < with_copy - without - of_layers <= weights, "neither the file is there, nor what its layers have of it"


@pytest.mark.parametrize("first", ["copy", "refer"])
def test_switching_computes_nothing_behind_the_layers_again(uri: str, first: How, tmp_path: Path) -> None:
    second: How = "refer" if first == "copy" else "copy"
    store, before, behind = running.store_in(tmp_path), target_of(uri, tmp_path, first), target_of(uri, tmp_path, second)
    running.run(store, before)
    made = {s.name for s in running.run(store, behind).steps if s.state == "run"}
    # the SHA-256 of a file on a disk is known before it is read, so that not even layers are read again
    again = {"checkpoint.layer", "checkpoint.rest"} if uri.startswith("s3://") else set()
    assert made == again | {"sources.reference" if second == "refer" else "sources.file"}
    assert store.manifest(before.key).digest == store.manifest(behind.key).digest


def test_a_folder_that_moved_computes_nothing_again(folder: Path, tmp_path: Path) -> None:
    store = running.store_in(tmp_path)
    running.run(store, target_of(str(folder), tmp_path))
    moved = folder.rename(tmp_path / "elsewhere")
    assert {s.name for s in running.run(store, target_of(str(moved), tmp_path)).steps if s.state == "run"} == {
        "sources.reference", "sources.files",
    }  # fmt: skip


def test_bytes_of_a_source_that_are_read_are_counted(uri: str, tmp_path: Path) -> None:
    store, target = running.store_in(tmp_path), checkpoint.checkpoint_of(checkpoint.pinned(pin(uri, kind="model")))
    done = running.run(store, target).steps
    read = sum(s.reads for s in done if s.name in ("checkpoint.layer", "checkpoint.rest"))
    assert read == pytest.approx(pin(uri, kind="model").find(SHARD).size, rel=0.02)
    assert all(s.reads == s.writes > 0 for s in done if s.name == "sources.files")


def overwritten(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def rotten(path: Path) -> None:
    """One bit in the middle of the weights, and the time as before: what only reading tells."""
    about, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (overwritten, "has changed since it was pinned: it holds other bytes than were written"),
        (rotten, "has changed since it was pinned: it holds other bytes than were written"),
        (truncated, r"has changed since it was pinned: it has \d+ bytes instead of \d+"),
        (Path.unlink, "is not on this machine; put it on a disk that all machines share, or in S3"),
    ],
)
def test_a_file_that_changed_or_moved_is_told_in_one_line_with_the_way_out(
    spoil: Callable[[Path], None], said: str, folder: Path, tmp_path: Path
) -> None:
    store, target = running.store_in(tmp_path), target_of(str(folder), tmp_path)
    spoil(folder / SHARD)
    with pytest.raises(StepFailed, match=f"{said}.*; with -p source=copy the store keeps a copy") as failed:
        running.run(store, target)
    assert "\n" not in str(failed.value)


def test_a_file_that_turned_out_to_be_changed_is_pinned_anew_whatever_its_time(folder: Path, tmp_path: Path) -> None:
    store, target = running.store_in(tmp_path), target_of(str(folder), tmp_path)
    before = pin(str(folder), kind="model")
    rotten(folder / SHARD)
    assert pin(str(folder), kind="model") == before, "nothing has read it yet"
    with pytest.raises(StepFailed):
        running.run(store, target)
    assert pin(str(folder), kind="model").find(SHARD).pin != before.find(SHARD).pin


def test_an_object_that_was_overwritten_or_is_gone_is_refused(
    bucketed: str, server: servers.Proxy, bucket: str, tmp_path: Path
) -> None:
    store, target = running.store_in(tmp_path), target_of(bucketed, tmp_path)
    client, key = s3.client(server.url), f"models/tiny/{SHARD}"
    client.put_object(Bucket=bucket, Key=key, Body=bytes(client.head_object(Bucket=bucket, Key=key)["ContentLength"]))
    with pytest.raises(StepFailed, match=f"{SHARD} has changed since it was pinned; .*; with -p source=copy"):
        running.run(store, target)
    client.delete_object(Bucket=bucket, Key=key)
    with pytest.raises(StepFailed, match=f"{SHARD} is gone since it was pinned; .*; with -p source=copy"):
        running.run(store, target)


def test_layers_read_only_their_own_bytes_of_an_object(bucketed: str, server: servers.Proxy, tmp_path: Path) -> None:
    model = checkpoint.pinned(pin(bucketed, kind="model"))
    store, layer = running.store_in(tmp_path), model.layers[1]
    server.requests.clear()
    running.run(store, layer)
    # and the proxy counts the answers' bytes, not their headers
    assert sum(r.received for r in server.requests) == layer.spec.reads


def test_another_process_needs_no_digests_of_the_whole_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on another machine of a cluster, which sees the folder but has no notes of its digests."""
    store, target = running.store_in(tmp_path), checkpoint.pinned(pin(str(folder), kind="model")).layers[0]
    monkeypatch.setenv("MOEFLOW_CACHE", str(tmp_path / "elsewhere"))
    running.run(store, target)
    assert not (tmp_path / "elsewhere" / "digests.json").exists()


def test_a_folder_is_named_to_those_who_may_not_see_it(folder: Path, bucketed: str) -> None:
    for how in ("copy", "refer"):
        for uri, named in ((str(folder), [str(folder)]), (bucketed, [])):
            model = checkpoint.pinned(pin(uri, kind="model", how=how))
            fetch = [i for i in model.layers[0].inputs if isinstance(i, Step)]
            assert folders_read([model.layers[0], *fetch]) == named
    assert folders_read([model.layers[0]]) == []
    referring = checkpoint.pinned(pin(str(folder), kind="model"))
    assert folders_read([referring.layers[0]]) == [str(folder)], "it is read also where the note of it is stored already"
