"""Texts are named by one string, taken apart at once and pinned when first used."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from moeflow.sources.texts import MIXTURES, NAMED, Texts
from moeflow.store import MissingSource
from tests import servers
from tests.making import folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[servers.Hub]:
    """A hub that has every data set known by name, each with files that are no text of it."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    with servers.hub_server() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        repositories: dict[str, dict[str, bytes]] = {}
        for known in NAMED.values():
            repo, _, file = known.uri.removeprefix("hf://").partition("@main/")
            files = repositories.setdefault(repo, {"README.md": b"x", "data/test.parquet": b"x"})
            files |= {file.replace("*", f"0000{i}-of-00002"): b"{}" for i in (0, 1)}
        for repo, files in repositories.items():
            hub.put(repo, files)
        yield hub


def test_each_entry_has_its_source_columns_and_weight(tmp_path: Path) -> None:
    at = folder(tmp_path / "d", **{"a.jsonl": "{}", "b.jsonl": "{}"})
    texts = Texts(f"{at}/a.jsonl#question+answer*2.5, {at}/*.jsonl#text ,python:stdlib*1e-1")
    entries = texts.entries()
    assert [(e.columns, e.weight) for e in entries] == [(("question", "answer"), 2.5), (("text",), 1.0), ((), 0.1)]
    assert [e.source.names()[:2] for e in entries[:2]] == [["a.jsonl"], ["a.jsonl", "b.jsonl"]]
    assert entries[2].source.uri == "python:stdlib"


def test_nothing_is_looked_at_before_it_is_asked_for(tmp_path: Path) -> None:
    texts = Texts(str(tmp_path / "later.jsonl"))
    with pytest.raises(MissingSource, match="there is no such file or folder"):
        texts.entries()
    folder(tmp_path, **{"later.jsonl": "{}"})
    first = texts.entries()
    os.unlink(tmp_path / "later.jsonl")
    assert texts.entries() is first


def test_one_local_matrix_of_numbers_is_tokens() -> None:
    assert Texts("x/tokens.npy").is_tokens
    assert not any(Texts(t).is_tokens for t in ("x.jsonl", "a.npy,b.npy", "s3://bucket/x.npy", "python:stdlib"))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("", "an entry names no source; write URI"),
        ("a.jsonl,,b.jsonl", "an entry names no source"),
        ("#text", "an entry names no source"),
        ("a.jsonl*0", "the weight of a.jsonl is 0; weights are numbers above 0"),
        ("a.jsonl#", "a.jsonl# names no column; write a.jsonl#text"),
        ("a.jsonl#*2", "a.jsonl# names no column"),
    ],
)
def test_a_string_that_names_no_texts_is_refused_at_once(spec: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Texts(spec)


def test_a_known_data_set_is_its_files_on_the_hub_with_their_columns_and_format(hub: servers.Hub) -> None:
    entries = {name: Texts(f"{name}*2").entries() for name in NAMED}
    assert {name: (len(e.source.files), e.columns, e.format, e.weight) for name, (e,) in entries.items()} == {
        "alpaca": (2, ("instruction", "input", "output"), "instruction", 2.0),
        "metamathqa": (1, ("query", "response"), "instruction", 2.0),
        "mathinstruct": (1, ("instruction", "output"), "instruction", 2.0),
        "magicoder": (1, ("instruction", "response"), "instruction", 2.0),
        "tulu3": (2, ("messages",), "chat", 2.0),
        "evol-codealpaca": (1, ("instruction", "output"), "chat", 2.0),
        "xlam": (1, ("query", "tools", "answers"), "calls", 2.0),
        "swe-smith": (2, ("messages",), "chat", 2.0),
        "thoughts-code": (2, ("messages",), "chat", 2.0),
        "thoughts-math": (2, ("messages",), "chat", 2.0),
        "thoughts-science": (2, ("messages",), "chat", 2.0),
        "c4-en": (1, ("text",), "text", 2.0),
    }
    for name, (entry,) in entries.items():
        assert entry.source.uri == f"{NAMED[name].uri.partition('@')[0]}@{entry.source.revision}", "pinned to a commit"
        assert not {"README.md", "data/test.parquet"} & set(entry.source.names())


def test_columns_that_are_named_go_before_those_that_a_name_stands_for(hub: servers.Hub) -> None:
    own, spelled = Texts("alpaca#output"), Texts(f"{NAMED['alpaca'].uri}#output")
    assert own.entries() == spelled.entries() and own.entries()[0].format == ""


def test_a_local_file_called_like_a_known_data_set_is_had_by_its_path(hub: servers.Hub, tmp_path: Path) -> None:
    folder(tmp_path, alpaca="text")
    (entry,) = Texts("./alpaca").entries()
    assert (entry.source.uri, entry.format) == (tmp_path.as_posix(), "") and hub.asked == []


def test_the_name_of_a_mixture_stands_for_its_data_sets_whose_weights_sum_to_its_own(hub: servers.Hub, tmp_path: Path) -> None:
    folder(tmp_path, **{"own.jsonl": "{}"})
    for name, mixture in MIXTURES.items():
        texts = Texts(f"{name}*3, own.jsonl*0.5")
        *mixed, own = texts.entries()
        known = [Texts(one).entries()[0] for one in mixture]
        assert [(e.source, e.columns, e.format) for e in mixed] == [(e.source, e.columns, e.format) for e in known]
        total = sum(mixture.values())
        assert [e.weight for e in mixed] == pytest.approx([3 * w / total for w in mixture.values()]) and own.weight == 0.5
        assert [one.entries()[0].source for one in texts.each()] == [e.source for e in texts.entries()]


def test_a_path_that_does_not_exist_says_so_before_the_hub_is_asked(hub: servers.Hub, tmp_path: Path) -> None:
    with pytest.raises(MissingSource, match="nowhere.jsonl: there is no such file or folder; check the path"):
        Texts("alpaca,xlam,nowhere.jsonl").entries()
    assert hub.asked == []


CLONE = {
    ".gitattributes": "*.parquet filter=lfs", ".git__config": "x", "README.md": "# Data", "LICENSE.txt": "MIT", "own.py": "1",
    "dataset_infos.json": "{}", "data__train-00000-of-00001.parquet": "x" * 999, "data__notes.md": "x", "images__a.png": "x",
    "config.json": "{}", "extra.jsonl.zst": "y" * 999, "state.json": "{}", "cache-1234.arrow": "z",
}  # fmt: skip


def test_a_data_set_s_folder_as_it_is_cloned_is_its_data_files(tmp_path: Path) -> None:
    (entry,) = Texts(str(folder(tmp_path / "clone", **CLONE))).entries()
    assert entry.source.names() == ["data/train-00000-of-00001.parquet", "extra.jsonl.zst"]
    (pages,) = Texts(str(folder(tmp_path / "pages", **{"README.md": "x", "a.md": "x", "b.py": "x", "c.txt": "x"}))).entries()
    assert pages.source.names() == ["a.md", "b.py", "c.txt"], "without tables documents are the text"
    with pytest.raises(MissingSource, match="holds no text; know .jsonl, .*, and these packed as .gz, .zst"):
        Texts(str(folder(tmp_path / "about", **{"README.md": "x", "dataset_infos.json": "{}", "a.png": "x"}))).entries()


def test_a_clone_whose_data_was_not_fetched_is_refused_by_name_with_the_way_out(tmp_path: Path) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 123456789\n"
    at = folder(tmp_path / "clone", **CLONE | {"data__train-00001-of-00002.parquet": pointer, "matrix.npy": pointer})
    for spec in (at, f"{at}/data/*.parquet", at / "matrix.npy"):
        with pytest.raises(MissingSource, match=r"(parquet|npy) at .*clone.* is a Git LFS pointer, .*; run `git lfs pull` there"):
            Texts(str(spec)).entries()
