"""What lies in folders is pinned by digest, and arrives as what was pinned or not at all."""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import pytest

from moeflow.sources import Source, pin, steps
from moeflow.store import MissingSource
from tests.making import folder, read
from tests.sources.running import Running, run


def old(path: Path, seconds: float = 3600) -> Path:
    """The same, an hour old: digests of what has just been written are not remembered."""
    for p in [path, *path.rglob("*")]:
        os.utime(p, (time.time() - seconds,) * 2)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    at = folder(
        tmp_path / "model",
        **{
            "config.json": '{"model_type": "mixtral"}',
            "model-00001-of-00001.safetensors": b"weights" * 1000,
            "model.safetensors.index.json": "{}",
            "tokenizer.json": "{}",
            "tokenizer.model": b"sp",
            "chat_template.jinja": "{{ x }}",
            "additional_chat_templates__tool.jinja": "{{ y }}",
            "LICENSE": "MIT",
            "pytorch_model.bin": b"pickle",
            "modeling_own.py": "import os",
            "original__consolidated.safetensors": b"twice",
            ".gitattributes": "",
        },
    )
    return old(at)


TAKEN = [
    "LICENSE", "additional_chat_templates/tool.jinja", "chat_template.jinja", "config.json",
    "model-00001-of-00001.safetensors", "model.safetensors.index.json", "modeling_own.py", "tokenizer.json", "tokenizer.model",
]  # fmt: skip


def test_a_model_is_its_weights_configuration_tokenizer_code_and_licence_and_the_rest_is_named(model: Path) -> None:
    source = pin(str(model), kind="model")
    assert source.names() == TAKEN
    assert source.left == ("pytorch_model.bin", "original/ (1 file)"), "hidden files are nobody's"
    assert (source.uri, source.revision) == (model.as_posix(), "")
    file = source.find("config.json")
    assert file.pin == f"sha256:{hashlib.sha256((model / 'config.json').read_bytes()).hexdigest()}"
    assert source.text("config.json") == '{"model_type": "mixtral"}'
    assert source.read("model-00001-of-00001.safetensors", 7, 10) == b"wei"
    with pytest.raises(MissingSource, match="has no file 'x'; it has: LICENSE, "):
        source.read("x", 0, 1)


def test_the_same_folder_is_the_same_source_however_it_is_spelled(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    assert pin("model", kind="model") == pin(f"{model}/", kind="model") == pin("./model", kind="model")


def test_one_large_file_and_several_small_ones_are_steps(model: Path, tmp_path: Path) -> None:
    source = pin(str(model), kind="model")
    large = source.file("model-00001-of-00001.safetensors")
    small = source.group(["tokenizer.json", "config.json", "additional_chat_templates/tool.jinja"])
    assert (large.name, small.name) == ("sources.file", "sources.files")
    assert large.spec.output == {"files": {"model-00001-of-00001.safetensors": 7000}}
    assert (large.spec.reads, large.spec.writes) == (7000, 7000)
    assert small.key == source.group(["config.json", "additional_chat_templates/tool.jinja", "tokenizer.json"]).key
    fetched = run(large, tmp_path / "1")
    assert (fetched.out / "model-00001-of-00001.safetensors").read_bytes() == b"weights" * 1000
    assert fetched.reported[-1] == (7000, 7000, "bytes")
    fetched = run(small, tmp_path / "2")
    assert {*read(fetched.out)} == {"tokenizer.json", "config.json", "additional_chat_templates/tool.jinja"}
    total = small.spec.writes
    assert fetched.reported[-1] == (total, total, "bytes")


def test_a_pickle_checkpoint_is_refused_with_the_way_to_convert_it(tmp_path: Path) -> None:
    at = folder(tmp_path / "m", **{"config.json": "{}", "pytorch_model.bin": b"x"})
    with pytest.raises(MissingSource, match=r"only as a pickle \(pytorch_model.bin\).*save_pretrained\(NEW\)"):
        pin(str(at), kind="model")
    with pytest.raises(MissingSource, match=r"holds no \*.safetensors; give the folder of a checkpoint"):
        pin(str(folder(tmp_path / "n", **{"config.json": "{}"})), kind="model")
    with pytest.raises(MissingSource, match="is a file; a model is the folder that holds it"):
        pin(str(at / "config.json"), kind="model")


def test_a_changed_file_is_another_pin_and_another_key(model: Path) -> None:
    before = pin(str(model), kind="model")
    (model / "config.json").write_text('{"model_type": "olmoe"}')
    after = pin(str(model), kind="model")
    assert before.group(["config.json"]).key != after.group(["config.json"]).key
    assert before.group(["LICENSE"]).key == after.group(["LICENSE"]).key


def test_a_folder_that_did_not_change_is_pinned_without_being_read(model: Path) -> None:
    first = pin(str(model), kind="model")
    weights = model / "model-00001-of-00001.safetensors"
    about = weights.stat()
    weights.write_bytes(b"WEIGHTS" * 1000)  # what only reading could tell
    os.utime(weights, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert pin(str(model), kind="model") == first
    old(model)
    assert pin(str(model), kind="model") != first


def test_what_was_written_a_moment_ago_is_read_again(tmp_path: Path) -> None:
    at = old(folder(tmp_path / "d", **{"x.txt": "one"}), seconds=-3600)  # young, however long this takes
    first = pin(str(at), kind="data")
    about = (at / "x.txt").stat()
    (at / "x.txt").write_text("two")
    os.utime(at / "x.txt", ns=(about.st_atime_ns, about.st_mtime_ns))  # as a coarse clock would have it
    assert pin(str(at), kind="data") != first


def test_a_source_that_changed_since_it_was_pinned_asks_for_another_run(model: Path, tmp_path: Path) -> None:
    source = pin(str(model), kind="model")
    (model / "config.json").write_text("{}")
    (model / "tokenizer.json").unlink()
    says = r"config\.json has changed since it was pinned .*run again to pin it anew"
    for ask in (lambda: source.text("config.json"), lambda: run(source.group(["config.json"]), tmp_path / "1")):
        with pytest.raises(MissingSource, match=says):
            ask()
    for ask in (lambda: source.text("tokenizer.json"), lambda: run(source.file("tokenizer.json"), tmp_path / "2")):
        with pytest.raises(MissingSource, match="is not on this machine; put it on a disk that all machines share"):
            ask()


def test_texts_are_a_file_a_folder_or_a_glob(tmp_path: Path) -> None:
    at = folder(tmp_path / "d", **{"a.jsonl": "{}", "b.jsonl": "{}", "sub__c.parquet": "x", "image.png": "x"})
    one = pin(str(at / "a.jsonl"), kind="data")
    assert (one.uri, one.names()) == (at.as_posix(), ["a.jsonl"])
    assert pin(str(at), kind="data").names() == ["a.jsonl", "b.jsonl", "sub/c.parquet"]
    some = pin(f"{at}/*.jsonl", kind="data")
    assert (some.uri, some.names()) == (at.as_posix(), ["a.jsonl", "b.jsonl"])
    assert pin(f"{at}/**/*.parquet", kind="data").names() == ["sub/c.parquet"]
    assert some.find("a.jsonl") == one.find("a.jsonl") and some.text("b.jsonl") == "{}"


@pytest.mark.parametrize(
    ("uri", "kind", "says"),
    [
        ("", "model", "the model is ''; give a folder"),
        ("no/such/folder", "model", "there is no such file or folder; check the path"),
        ("no/such", "data", "a text on the hub is hf://datasets/no/such"),
        ("none*.jsonl", "data", "there are no such files; check the path"),
        ("http://host/x", "data", "know folders, files, globs, s3://"),
    ],
)
def test_what_is_no_source_is_answered_with_what_is_one(
    uri: str, kind: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=says):
        pin(uri, kind="model" if kind == "model" else "data")


ABSENT = {
    "./modle": "did you mean .*/model\\?",
    "{here}/modle": "did you mean .*/model\\?",
    "{here}/model/x/y": "/model/x/y: there is no such file or folder; .*/model holds LICENSE, additional_chat_templates",
    "models/mixtral-smal": "the folder models is here and holds no mixtral-smal; did you mean .*/models/mixtral-small\\?, or write "
    "hf://models/models/mixtral-smal for the hub's",
    "modle/": "there is no such file or folder; did you mean .*/model\\?",
    "../nowhere": "there is no such file or folder",
    "~/no-such-model": "/no-such-model: there is no such file or folder",
    "C:\\\\models\\\\mixtral": "this is a path of Windows, and on this machine paths are written with /",
    "D:/models/mixtral": "this is a path of Windows",
    "models\\\\mixtral-small": "this is a path of Windows",
    "nomodel": "there is no such file or folder",
    "org/name/": "there is no such file or folder",
    "a/b/c": "there is no such file or folder",
    "https://huggingface.co/org/name": "is the page of a repository; write org/name$",
    "https://huggingface.co/org/name/tree/v1": "is the page of a repository; write org/name@v1$",
    "https://huggingface.co/datasets/org/name": "is the page of a repository; write hf://datasets/org/name$",
}


@pytest.mark.parametrize("uri", ABSENT)
def test_a_path_to_nothing_says_so_before_the_hub_is_asked(
    uri: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "moeflow.sources.hub", None)  # whoever asked the hub would import it
    folder(tmp_path / "models", **{"mixtral-small__config.json": "{}"})
    for kind in ("model", "data"):
        with pytest.raises(MissingSource, match=ABSENT[uri].replace("hf://models", "hf://(models|datasets)")) as told:
            pin(uri.format(here=tmp_path), kind="model" if kind == "model" else "data")
        assert "\n" not in str(told.value)


def test_a_folder_goes_before_the_hub_and_the_hub_can_be_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent.parent)
    assert pin(f"{model.parent.name}/model", kind="model").uri == model.as_posix()


def test_the_standard_library_is_a_text_that_every_machine_has(tmp_path: Path) -> None:
    source = pin("python:stdlib", kind="data")
    assert source.uri == "python:stdlib" and {"os.py", "typing.py", "abc.py"} <= {*source.names()}
    assert not any("/" in n or n.startswith("_sysconfigdata") for n in source.names())
    fetched = run(source.group(["abc.py"]), tmp_path)
    assert (fetched.out / "abc.py").read_bytes() == Path(sys.modules["abc"].__file__ or "").read_bytes()


def test_a_large_file_comes_in_parts_that_an_interrupted_run_leaves_to_the_next(tmp_path: Path) -> None:
    data = b"0123456789"
    asked: list[tuple[int, int]] = []

    def bring(start: int, stop: int, to: Path) -> None:
        asked.append((start, stop))
        if len(asked) == 3:
            raise ConnectionError
        to.write_bytes(data[start:stop])

    first = Running(tmp_path / "1")
    with pytest.raises(ConnectionError):
        steps.in_parts(first, 10, 3, first.out / "x", bring, lambda n: None)
    assert first.saved == [["00000"], ["00000", "00001"]]
    again = Running(tmp_path / "2", kept=first.scratch / "parts")
    grown: list[int] = []
    steps.in_parts(again, 10, 3, again.out / "x", bring, grown.append)
    assert (again.out / "x").read_bytes() == data
    assert asked == [(0, 3), (3, 6), (6, 9), (6, 9), (9, 10)] and grown == [3, 3]


def test_a_name_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    step = steps.file(uri=str(tmp_path), name="../x", size=1, pin="sha256:0")
    with pytest.raises(ValueError, match="leaves the folder"):
        run(step, tmp_path / "1")


def test_a_source_is_a_plain_value(model: Path) -> None:
    source = pin(str(model), kind="model")
    assert source == Source(source.uri, source.revision, source.files, refer=True) and hash(source) == hash(source)


def test_the_hub_s_own_cache_is_a_folder_whose_files_are_links_to_its_blobs(tmp_path: Path) -> None:
    """`models--org--name/snapshots/COMMIT/file -> ../../blobs/SHA`, as huggingface_hub lays it out."""
    repository = tmp_path / "models--org--name"
    blobs = folder(repository / "blobs", aa="{}", bb=b"weights")
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for name, blob in (("config.json", "aa"), ("model.safetensors", "bb")):
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    assert pin(str(snapshot), kind="model").names() == ["config.json", "model.safetensors"]
    (blobs / "aa").unlink()
    (blobs / "aa").symlink_to("../../elsewhere")
    (tmp_path / "elsewhere").write_text("{}")
    with pytest.raises(MissingSource, match="config.json is a link out of the model's folder"):
        pin(str(snapshot), kind="model")


def test_a_link_inside_the_folder_and_a_folder_that_is_a_link_are_what_they_lead_to(model: Path, tmp_path: Path) -> None:
    (model / "vocab.json").symlink_to("config.json")
    (tmp_path / "other").symlink_to(model)
    assert "vocab.json" in pin(str(tmp_path / "other"), kind="model").names()


def test_a_text_may_be_links_to_anywhere_and_is_no_pipe(tmp_path: Path) -> None:
    texts = folder(tmp_path / "texts", **{"a.txt": "one"})
    elsewhere = folder(tmp_path / "elsewhere", **{"b.txt": "two"})
    (texts / "b.txt").symlink_to(elsewhere / "b.txt")
    assert pin(str(texts), kind="data").names() == ["a.txt", "b.txt"]
    os.mkfifo(texts / "c.txt")
    with pytest.raises(MissingSource, match="c.txt is no file but a pipe"):
        pin(str(texts), kind="data")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_told(model: Path) -> None:
    (model / "config.json").chmod(0)
    with pytest.raises(MissingSource, match="config.json: no permission to read it; make it readable"):
        pin(str(model), kind="model")


@pytest.mark.parametrize("noted", ["[]", "null", '{"x', "[" * 100_000, "wrong"])
def test_notes_of_digests_that_are_damaged_are_computed_again(model: Path, noted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEFLOW_CACHE", str(model.parent / "home"))
    pinned = pin(str(model), kind="model")
    notes = next((model.parent / "home").rglob("digests.json"))
    known = json.loads(notes.read_text())
    assert known
    notes.write_text(noted if noted != "wrong" else json.dumps(dict.fromkeys(known, "0") | dict.fromkeys([*known][:2], 7)))
    assert pin(str(model), kind="model") == pinned
