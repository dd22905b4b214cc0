"""The newest complete checkpoint below a prefix, on a disk, in S3 and on the hub."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from moeflow.sources.newest import newest
from moeflow.store import s3
from moeflow.store.errors import MissingSource
from tests import fine_tuned, servers

INDEX = "model.safetensors.index.json"


def put(root: Path, name: str, at: float, files: dict[str, bytes]) -> Path:
    """A folder with these files, of this time."""
    folder = root / name
    for inside, data in files.items():
        path = folder / inside
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        os.utime(path, (at, at))
    return folder


def test_the_newest_of_several_is_taken_and_a_folder_may_be_one_itself(tmp_path: Path) -> None:
    put(tmp_path, "run/checkpoint-500", 200, fine_tuned.files(1))
    latest = put(tmp_path, "run/checkpoint-1000", 300, fine_tuned.files(2))
    put(tmp_path, "run/checkpoint-900", 100, fine_tuned.files(3))
    there, arriving = newest(str(tmp_path))
    assert there and (there.uri, there.kind, there.lacks) == (str(latest), "model", "") and arriving is None
    alone, _ = newest(str(latest))
    assert alone and alone.uri == str(latest) and alone.mark == there.mark
    put(tmp_path, "run/checkpoint-1000", 300, {"trainer_state.json": b"{}", "optimizer.pt": b"x"})
    assert newest(str(tmp_path))[0] == there, "a training's own state is no part of the model"
    put(tmp_path, "run/checkpoint-1000", 301, {"config.json": b'{"kl": 1}'})
    changed = newest(str(tmp_path))[0]
    assert changed and changed.mark != there.mark


def test_of_equally_old_ones_the_last_by_number_is_the_newest(tmp_path: Path) -> None:
    for n in (90, 500, 1000):
        put(tmp_path, f"checkpoint-{n}", 100, fine_tuned.files(n % 250))
    there, _ = newest(str(tmp_path))
    assert there and there.uri.endswith("checkpoint-1000")


def half(change: Callable[[dict[str, bytes]], object]) -> dict[str, bytes]:
    files = fine_tuned.files(2)
    change(files)
    return files


HALVES = {
    "it lacks model-00002-of-00002.safetensors": half(lambda f: f.pop("model-00002-of-00002.safetensors")),
    f"it has shards and lacks {INDEX}": half(lambda f: f.pop(INDEX)),
    f"its {INDEX} is cut short": half(lambda f: f.update({INDEX: f[INDEX][:-20]})),
    "it lacks config.json": half(lambda f: f.pop("config.json")),
    "it lacks its weights, model.safetensors or an index with shards": {"config.json": b"{}"},
    "its model-00001-of-00002.safetensors is cut short": half(
        lambda f: f.update({"model-00001-of-00002.safetensors": f["model-00001-of-00002.safetensors"][:-1]})
    ),
}


@pytest.mark.parametrize("lacks", HALVES)
def test_half_a_checkpoint_is_told_and_the_one_before_it_is_taken(lacks: str, tmp_path: Path) -> None:
    put(tmp_path, "b", 200, HALVES[lacks])
    there, arriving = newest(str(tmp_path))
    assert there is None and arriving and arriving.lacks == lacks
    whole = put(tmp_path, "a", 100, fine_tuned.files(1))
    there, arriving = newest(str(tmp_path))
    assert there and there.uri == str(whole) and arriving and arriving.lacks == lacks


def test_with_a_marker_a_checkpoint_without_it_is_not_complete(tmp_path: Path) -> None:
    folder = put(tmp_path, "a", 100, fine_tuned.files(1))
    assert newest(str(tmp_path), "DONE")[0] is None
    (folder / "DONE").touch()
    there, _ = newest(str(tmp_path), "DONE")
    assert there and there.uri == str(folder) and there == newest(str(tmp_path))[0]


def test_an_adapter_alone_names_its_base_and_a_zero_folder_is_known(tmp_path: Path) -> None:
    about = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    put(
        tmp_path, "a", 100, {"adapter_config.json": json.dumps(about).encode(), "adapter_model.safetensors": b"x", "README.md": b""}
    )
    there, _ = newest(str(tmp_path))
    assert there and (there.kind, there.base, there.lacks) == ("adapter", "org/base", "")
    half_of_it = put(tmp_path, "b", 200, {"adapter_config.json": json.dumps(about).encode()})
    arriving = newest(str(tmp_path))[1]
    assert arriving and (arriving.uri, arriving.lacks) == (str(half_of_it), "it lacks adapter_model.safetensors")
    zero = put(
        tmp_path, "c", 300, {"config.json": b"{}", "latest": b"global_step9", "global_step9/mp_rank_00_model_states.pt": b"x"}
    )
    there, _ = newest(str(tmp_path))
    assert there and (there.uri, there.kind) == (str(zero), "zero")
    put(tmp_path, "c", 301, fine_tuned.files(1))
    there, _ = newest(str(tmp_path))
    assert there and (there.uri, there.kind) == (str(zero), "model"), "its weights lie beside the shards of the training"


@pytest.mark.parametrize("name", ["absent", "empty", "file", "other"])
def test_a_source_that_holds_no_checkpoint_is_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    put(tmp_path, "other", 1, {"notes.txt": b"x"})
    (tmp_path / "file").touch()
    with pytest.raises(MissingSource, match=name) as error:
        newest(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_in_a_bucket_a_look_is_one_listing_and_the_small_files_of_the_newest(server: servers.Proxy, bucket: str) -> None:
    client, source = s3.client(server.url), f"s3://{bucket}/finetunes?endpoint={server.url}"
    with pytest.raises(MissingSource, match="no such objects"):
        newest(source)
    for n in (1, 2):
        for name, data in fine_tuned.files(n).items():
            client.put_object(Bucket=bucket, Key=f"finetunes/run/checkpoint-{n}/{name}", Body=data)
    server.reset()
    there, arriving = newest(source)
    assert there and there.uri == f"s3://{bucket}/finetunes/run/checkpoint-2?endpoint={server.url}" and arriving is None
    assert server.count() <= 3
    client.put_object(Bucket=bucket, Key="finetunes/run/checkpoint-3/config.json", Body=b"{}")
    before, arriving = newest(source)
    assert before == there and arriving and "checkpoint-3" in arriving.uri
    one, _ = newest(there.uri)
    assert one == there


def test_on_the_hub_the_commit_is_the_mark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with servers.hub_server() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        first = hub.put("models/org/tuned", fine_tuned.files(1))
        there, _ = newest("org/tuned@main")
        assert there and (there.mark, there.kind, there.uri) == (first, "model", f"org/tuned@{first}")
        about = json.dumps({"base_model_name_or_path": "org/base"}).encode()
        hub.put("models/org/tuned", {"adapter_config.json": about, "adapter_model.safetensors": b"x"})
        there, _ = newest("org/tuned")
        assert there and (there.kind, there.base) == ("adapter", "org/base") and there.mark != first
