"""Sources on the hub: a branch is pinned to its commit; offline, the hub's cache on this machine counts."""

import hashlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moeflow.sources import SourceFile, network, pin
from moeflow.sources.referred import NOTE, Note, Referred
from moeflow.store import MissingSource
from moeflow.store.errors import NoNetwork, SourceUnavailable
from tests import servers
from tests.sources.running import Running, run

WEIGHTS = b"weights" * 1000
FILES = {
    "config.json": b'{"model_type": "mixtral"}',
    "model.safetensors": WEIGHTS,
    "modeling_own.py": b"import os",
    "pytorch_model.bin": b"pickle",
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("MOEFLOW_CACHE", str(tmp_path / "own"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[servers.Hub]:
    with servers.hub_server() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


@pytest.fixture
def offline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, and no hub: nothing listens there any more."""
    with servers.hub_server() as gone:
        url = gone.url
    monkeypatch.setenv("HF_ENDPOINT", url)
    return cache


def cached(cache: Path, folder: str, files: dict[str, bytes], commit: str, ref: str = "main") -> None:
    """Lay files out as the hub's cache does: named by digest, with links under the commit."""
    at = cache / folder
    for name, data in files.items():
        blob = at / "blobs" / hashlib.sha256(data).hexdigest()
        if not name.endswith(".safetensors"):
            blob = at / "blobs" / hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        link = at / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    (at / "refs").mkdir(exist_ok=True)
    (at / "refs" / ref).write_text(commit)


def test_a_branch_is_pinned_to_its_commit_without_reading_a_file(hub: servers.Hub) -> None:
    commit = hub.put("models/org/tiny", FILES)
    source = pin("org/tiny", kind="model")
    assert (source.uri, source.revision) == (f"hf://models/org/tiny@{commit}", commit)
    assert source.names() == ["config.json", "model.safetensors", "modeling_own.py"]
    assert {f.pin for f in source.files} == {commit} and source.find("model.safetensors").size == 7000
    assert len(hub.asked) == 1
    assert source == pin("org/tiny@main", kind="model") == pin(f"org/tiny@{commit}", kind="model")
    assert source == pin(source.uri, kind="model") == pin("hf://models/org/tiny", kind="model")


def test_a_moved_branch_is_another_source_and_a_tag_stays(hub: servers.Hub) -> None:
    first = hub.put("models/org/tiny", FILES, branch="v1.0")
    second = hub.put("models/org/tiny", FILES | {"config.json": b"{}"})
    assert pin("org/tiny@v1.0", kind="model").revision == first
    assert pin("org/tiny", kind="model").revision == second


def test_files_arrive_as_they_were_at_the_commit_and_no_second_copy_stays(hub: servers.Hub, tmp_path: Path) -> None:
    hub.put("models/org/tiny", FILES)
    source = pin("org/tiny", kind="model")
    hub.put("models/org/tiny", FILES | {"config.json": b"changed"})
    fetched = run(source.file("model.safetensors"), tmp_path / "1")
    assert (fetched.out / "model.safetensors").read_bytes() == WEIGHTS
    assert fetched.reported[-1] == (7000, 7000, "bytes")
    small = run(source.group(["config.json"]), tmp_path / "2")
    assert (small.out / "config.json").read_bytes() == FILES["config.json"]
    kept = [p for p in (tmp_path / "own").rglob("*") if p.is_file() and p.stat().st_size > 1000]
    assert kept == [] and not (tmp_path / "hub").exists()
    assert hub.asked and not any("own.py" in a or ".bin" in a for a in hub.asked)


def test_headers_are_read_by_range(hub: servers.Hub) -> None:
    hub.put("models/org/tiny", FILES)
    source = pin("org/tiny", kind="model")
    assert source.read("model.safetensors", 7, 14) == b"weights"
    assert source.text("config.json") == '{"model_type": "mixtral"}'


def test_a_download_that_breaks_off_is_taken_up_again(hub: servers.Hub, tmp_path: Path) -> None:
    hub.put("models/org/tiny", FILES)
    source = pin("org/tiny", kind="model")
    hub.cut = 1
    fetched = run(source.file("model.safetensors"), tmp_path / "1")
    assert (fetched.out / "model.safetensors").read_bytes() == WEIGHTS and hub.cut == 0


def test_weights_are_copied_from_the_hub_and_referred_to_in_its_cache(hub: servers.Hub, cache: Path, tmp_path: Path) -> None:
    commit = hub.put("models/org/tiny", FILES)
    assert pin("org/tiny", kind="model").weights("model.safetensors").name == "sources.file"
    cached(cache, "models--org--tiny", FILES, commit)
    asked = len(hub.asked)
    note = run(pin("org/tiny", kind="model").weights("model.safetensors"), tmp_path / "1")
    assert note.stands_for == {"model.safetensors": hashlib.sha256(WEIGHTS).hexdigest()}
    file = Referred(Note.load((note.out / NOTE).read_bytes()), note)
    assert file.read("model.safetensors", 7, 14) == b"weights" and note.reads == 7
    assert len(hub.asked) == asked + 1, "only to pin it"
    blob = cache / "models--org--tiny" / "blobs" / hashlib.sha256(WEIGHTS).hexdigest()
    blob.write_bytes(WEIGHTS[:-1] + b"x")
    with pytest.raises(MissingSource, match="has changed since it was pinned: .*; with -p source=copy"):
        file.read("model.safetensors", 0, 7)
    with pytest.raises(MissingSource, match="holds other bytes than it should; delete it and run again"):
        pin("org/tiny", kind="model").weights("model.safetensors")


def test_weights_on_the_hub_can_be_referred_to(hub: servers.Hub, tmp_path: Path) -> None:
    hub.put("models/org/tiny", FILES)
    note = run(pin("org/tiny", kind="model", how="refer").weights("model.safetensors"), tmp_path / "1")
    hub.put("models/org/tiny", FILES | {"model.safetensors": b"changed" * 1000})
    file = Referred(Note.load((note.out / NOTE).read_bytes()), note)
    assert file.read("model.safetensors", 7, 14) == b"weights" and not note.stands_for


def test_an_outage_where_weights_are_referred_to_is_no_change_and_may_pass(offline: Path, tmp_path: Path) -> None:
    file = Referred(Note(f"hf://models/org/tiny@{'0' * 40}", SourceFile("model.safetensors", 7000, "0" * 40)), Running(tmp_path))
    with pytest.raises(SourceUnavailable, match="the hub cannot be asked") as failed:
        file.read("model.safetensors", 0, 8)
    assert "-p source=copy" not in str(failed.value)


def test_a_data_set_is_chosen_by_glob(hub: servers.Hub, tmp_path: Path) -> None:
    commit = hub.put("datasets/org/text", {"data/train-0.parquet": b"0", "data/test.parquet": b"1", "load.py": b"x"})
    some = pin("hf://datasets/org/text@main/data/train-*", kind="data")
    assert (some.uri, some.names()) == (f"hf://datasets/org/text@{commit}", ["data/train-0.parquet"])
    assert (run(some.file("data/train-0.parquet"), tmp_path).out / "data/train-0.parquet").read_bytes() == b"0"
    with pytest.raises(MissingSource, match=r"no file matches 'none\*'; there are data/test.parquet"):
        pin("hf://datasets/org/text/none*", kind="data")


def test_one_file_of_a_large_data_set_costs_one_question(hub: servers.Hub) -> None:
    commit = hub.put("datasets/org/text", {"data/a.jsonl": b"{}", "data/b.jsonl": b"{}", "other.jsonl": b"{}"})
    one = pin("hf://datasets/org/text@main/data/a.jsonl", kind="data")
    assert (one.uri, one.names(), one.files[0].size) == (f"hf://datasets/org/text@{commit}", ["data/a.jsonl"], 2)
    assert hub.asked == ["HEAD /datasets/org/text/resolve/main/data/a.jsonl"]
    assert pin("hf://datasets/org/text/data", kind="data").names() == ["data/a.jsonl", "data/b.jsonl"]


def test_sizes_that_the_hub_leaves_out_are_asked_for(hub: servers.Hub) -> None:
    hub.put("models/org/tiny", FILES)
    hub.sizes = False
    assert [f.size for f in pin("org/tiny", kind="model").files] == [25, 7000, 9]


def test_what_the_hub_refuses_is_one_line_with_the_way_out(hub: servers.Hub) -> None:
    hub.put("models/org/tiny", FILES)
    hub.put("models/org/pickle", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    hub.put("models/org/gated", FILES)
    hub.gated.add("models/org/gated")
    for name, says in {
        "org/none": "no such folder here and no such repository on the hub, or a private one; .*HF_TOKEN",
        "org/tiny@none": "the repository has no such revision; name a branch, a tag or a commit",
        "org/gated": "accept on its page and set HF_TOKEN",
        "org/pickle": r"only as a pickle \(pytorch_model.bin\)",
        "hf://models/tiny": "write hf://datasets/org/name",
    }.items():
        with pytest.raises(ValueError, match=says) as caught:
            pin(name, kind="model")
        assert "\n" not in str(caught.value)


def test_offline_the_cache_knows_the_branch_and_holds_the_files(offline: Path, tmp_path: Path) -> None:
    commit = "ab" * 20
    cached(offline, "models--org--tiny", FILES, commit)
    source = pin("org/tiny", kind="model")
    assert (source.uri, source.revision) == (f"hf://models/org/tiny@{commit}", commit)
    assert source == pin(f"org/tiny@{commit}", kind="model")
    assert source.names() == ["config.json", "model.safetensors", "modeling_own.py"]
    assert source.read("model.safetensors", 0, 7) == b"weights"
    fetched = run(source.file("model.safetensors"), tmp_path / "1")
    assert (fetched.out / "model.safetensors").read_bytes() == WEIGHTS
    assert (run(source.group(["config.json"]), tmp_path / "2").out / "config.json").is_file()
    assert (offline / "models--org--tiny" / "snapshots" / commit / "model.safetensors").is_file()


def test_offline_a_data_set_is_found_by_file_folder_and_glob(offline: Path) -> None:
    commit = "cd" * 20
    cached(offline, "datasets--org--text", {"data/a.jsonl": b"{}", "data/b.jsonl": b"{}"}, commit)
    for at, names in {"data/a.jsonl": ["a"], "data": ["a", "b"], "data/*": ["a", "b"]}.items():
        source = pin(f"hf://datasets/org/text@main/{at}", kind="data")
        assert (source.revision, source.names()) == (commit, [f"data/{n}.jsonl" for n in names])


def test_told_to_stay_offline_nothing_is_asked(hub: servers.Hub, cache: Path, tmp_path: Path) -> None:
    cached(cache, "models--org--tiny", FILES, "ab" * 20)
    code = "from moeflow.sources import pin; print(pin('org/tiny', kind='model').revision)"
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": root}
    ask = [sys.executable, "-c", code]
    done = subprocess.run(ask, env=env, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "ab" * 20 and hub.asked == []


def test_offline_and_online_give_the_same_keys(hub: servers.Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {n: FILES[n] for n in ("config.json", "model.safetensors")}
    online = pin(f"org/tiny@{hub.put('models/org/tiny', wanted)}", kind="model")
    cached(cache, "models--org--tiny", wanted, online.revision)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert pin("org/tiny", kind="model").file("model.safetensors").key == online.file("model.safetensors").key


def test_what_lies_in_the_cache_is_not_downloaded_again(hub: servers.Hub, cache: Path, tmp_path: Path) -> None:
    source = pin(f"org/tiny@{hub.put('models/org/tiny', FILES)}", kind="model")
    cached(cache, "models--org--tiny", FILES, source.revision)
    hub.asked.clear()
    run(source.file("model.safetensors"), tmp_path)
    assert hub.asked == []


def test_rotten_bytes_in_the_cache_are_refused(offline: Path, tmp_path: Path) -> None:
    cached(offline, "models--org--tiny", FILES, "ab" * 20)
    source = pin("org/tiny", kind="model")
    for i, name in enumerate(("model.safetensors", "config.json")):
        path = offline / "models--org--tiny" / "snapshots" / ("ab" * 20) / name
        path.write_bytes(path.read_bytes()[::-1])
        with pytest.raises(MissingSource, match="holds other bytes than it should; delete it and run again"):
            run(source.file(name), tmp_path / str(i))


def test_offline_and_not_in_the_cache_says_both(offline: Path) -> None:
    with pytest.raises(MissingSource, match=r"the hub cannot be asked .*, and the hub's cache holds no main of it"):
        pin("org/tiny", kind="model")


@pytest.mark.parametrize("slow", [False, True])
def test_a_hub_without_a_name_is_no_network_however_long_that_takes_to_say(
    slow: bool, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*asked: object, **options: object) -> None:
        time.sleep(20 if slow else 0)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(network, "BOUND", 0.2)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    began = time.monotonic()
    with pytest.raises(NoNetwork, match="was not resolved in 0.2 s" if slow else "not known"):
        pin("org/tiny", kind="model")
    assert time.monotonic() - began < 10
    cached(cache, "models--org--tiny", FILES, "ab" * 20)
    assert pin("org/tiny", kind="model").revision == "ab" * 20


def test_a_hub_that_refuses_is_a_hub_and_one_behind_a_proxy_needs_no_name_here(
    offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SourceUnavailable) as refused:
        pin("org/tiny", kind="model")
    assert not isinstance(refused.value, NoNetwork)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *asked: pytest.fail("the proxy resolves it"))
    network.check_name("http://hub.invalid")
