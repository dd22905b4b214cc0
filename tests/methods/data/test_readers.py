"""Every row is read as its author wrote it, from whatever file it stands in, and what cannot be read is told by file and line."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moeflow.methods.data.readers import READERS, rows_of
from moeflow.methods.data.rows import Rows
from moeflow.text_files import DOCUMENTS, TABLES

CALLS: list[dict[str, Any]] = [
    {"text": "one", "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}], "name": None}]},
    {"text": "two", "messages": [{"role": "assistant", "content": "b", "call": {"x": 1, "list": [1, None], "deep": {"y": None}}}]},
    {"text": "three", "messages": [{"role": "assistant", "content": "c", "call": {"z": "s"}}], "more": 1},
]


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def lines(rows: list[dict[str, Any]], end: str = "\n") -> bytes:
    return "".join(json.dumps(row) + end for row in rows).encode()


def values(path: Path, *columns: str) -> list[dict[str, Any]]:
    return [row for _, row in rows_of(path.name, path, columns or ("text",), {})]


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:]),
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}
TEXTS = {
    "a.jsonl": lines(CALLS),
    "a.ndjson": lines(CALLS),
    "crlf.jsonl": lines(CALLS, "\r\n"),
    "bom.jsonl": b"\xef\xbb\xbf" + lines(CALLS),
    "blank.jsonl": b"\n \n" + lines(CALLS, "\n\n") + b"  ",
    "unended.jsonl": lines(CALLS).rstrip(),
    "lines.json": lines(CALLS),
    "list.json": json.dumps(CALLS).encode(),
    "pretty.json": b"\xef\xbb\xbf\r\n" + json.dumps(CALLS, indent=2).replace("\n", "\r\n").encode() + b"\n",
    "UPPER.JSONL": lines(CALLS),
}


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("name", TEXTS)
def test_json_is_read_as_python_reads_it_however_it_is_laid_out_and_packed(name: str, packing: str, tmp_path: Path) -> None:
    path = written(tmp_path / f"{name}{packing}", PACKERS[packing](TEXTS[name]))
    expected = [{k: v for k, v in row.items() if k != "more"} for row in CALLS]
    assert values(path, "text", "messages") == expected


def test_zst_of_several_frames_is_read_to_its_end(tmp_path: Path) -> None:
    for part in (lines(CALLS[:1]), lines(CALLS[1:])):
        with (tmp_path / "a.jsonl.zst").open("ab") as file, pa.CompressedOutputStream(file, "zstd") as out:
            out.write(part)
    assert [row["text"] for row in values(tmp_path / "a.jsonl.zst")] == ["one", "two", "three"]


def test_one_object_over_many_lines_is_one_row(tmp_path: Path) -> None:
    assert values(written(tmp_path / "a.json", json.dumps({"text": "a", "b": {"c": 1}}, indent=1).encode())) == [{"text": "a"}]


def test_of_a_table_with_a_header_every_value_is_text(tmp_path: Path) -> None:
    rows = 'id,text,note\r\n1,"two\r\nlines, ""quoted""",NA\r\n007,1.0,\r\n\r\n3\r\n'
    path = written(tmp_path / "a.csv", b"\xef\xbb\xbf" + rows.encode())
    assert values(path, "id", "text") == [{"id": "1", "text": 'two\r\nlines, "quoted"'}, {"id": "007", "text": "1.0"}, {"id": "3"}]
    assert values(written(tmp_path / "a.tsv", b"text\tb\n" + b"x" * 200_000 + b"\t2\n"), "text")[0]["text"] == "x" * 200_000


def test_a_document_is_one_row_without_its_byte_order_mark_and_with_plain_line_breaks(tmp_path: Path) -> None:
    assert values(written(tmp_path / "a.md", b"\xef\xbb\xbfone\r\ntwo\n")) == [{"text": "one\ntwo\n"}]


@pytest.mark.parametrize("form", ["parquet", "arrow stream", "arrow file"])
def test_the_nulls_that_arrow_adds_are_gone(form: str, tmp_path: Path) -> None:
    """Arrow gives every object of a column the fields of all."""
    content = [{"type": "text", "text": "a"}, {"type": "image"}]
    calls = [{"x": 1, "list": [1, None], "deep": {"y": True}}, {"z": "s"}]
    table = pa.Table.from_pylist([{"messages": [{"content": content}]}, *({"messages": [{"call": call}]} for call in calls)])
    assert table.to_pylist()[2]["messages"][0]["call"] == {"x": None, "list": None, "deep": None, "z": "s"}
    path = tmp_path / ("a.parquet" if form == "parquet" else "a.arrow")
    if form == "parquet":
        pq.write_table(table, path)
    else:
        new = pa.ipc.new_stream if form == "arrow stream" else pa.ipc.new_file
        with new(str(path), table.schema) as out:
            out.write_table(table)
    assert [row["messages"] for row in values(path, "messages")] == [[{"content": content}], *([{"call": call}] for call in calls)]


def test_what_the_datasets_library_saves_is_read_with_its_columns_of_json(tmp_path: Path) -> None:
    rows = [{"messages": [{"call": {"x": 1, "y": None}}]}, {"messages": [{"call": {"x": "s"}}]}]
    made = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    made.to_parquet(tmp_path / "a.parquet")
    made.save_to_disk(str(tmp_path / "saved"))
    (saved,) = (tmp_path / "saved").glob("*.arrow")
    assert values(tmp_path / "a.parquet", "messages") == values(saved, "messages") == rows


def test_a_column_that_nobody_asked_for_may_hold_anything(tmp_path: Path) -> None:
    odd: list[dict[str, Any]] = [{"text": "x", "meta": i} for i in range(20_000)] + [{"text": "y", "meta": {"a": [1, "b"]}}]
    assert len(values(written(tmp_path / "a.jsonl", lines(odd)))) == 20_001
    files = [("a.jsonl", tmp_path / "a.jsonl"), ("b.parquet", tmp_path / "b.parquet"), ("c.csv", tmp_path / "c.csv")]
    pq.write_table(pa.table({"meta": pa.array([b"\xff"]), "text": ["z"]}), tmp_path / "b.parquet")
    written(tmp_path / "c.csv", b"meta,text\n?,w\n")
    assert len(Rows(files, ("text",), tmp_path / "rows")) == 20_003


def test_of_parquet_only_the_columns_that_are_asked_for_are_read(tmp_path: Path) -> None:
    """Damage in another column's bytes goes unseen."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"other": ["o" * 5000], "text": ["t"]}), path, compression="none", use_dictionary=False)
    path.write_bytes(path.read_bytes().replace(b"o" * 5000, b"\xff" * 5000))
    assert values(path) == [{"text": "t"}]


def test_rows_come_in_an_order_that_the_seed_decides_as_often_as_asked(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", lines([{"text": i} for i in range(99)]))
    rows = Rows([("a.jsonl", path)], ("text",), tmp_path / "rows")
    one, same, other = ([row["text"] for row in rows.shuffled(seed)] for seed in (1, 1, 2))
    assert one == same != other and sorted(one) == sorted(other) == [*range(99)]


def test_a_file_without_rows_among_others_is_no_damage(tmp_path: Path) -> None:
    files = [(n, written(tmp_path / n, data)) for n, data in (("a.jsonl", b""), ("b.jsonl", b'{"text": "x"}'), ("c.json", b"[]"))]
    assert len(Rows(files, ("text",), tmp_path / "rows")) == 1


def test_a_file_that_lacks_a_column_is_named_and_one_that_is_optional_may_be_missing_in_some(tmp_path: Path) -> None:
    a, b = ((n, written(tmp_path / n, lines([row]))) for n, row in (("a.jsonl", {"x": 1, "y": 2}), ("b.jsonl", {"x": 3, "z": 4})))
    with pytest.raises(ValueError, match=r"b.jsonl has no column 'y'; it has: x, z \(write URI#column\)"):
        Rows([a, b], ("x", "y"), tmp_path / "rows")
    rows = Rows([a, b], ("x", "y"), tmp_path / "rows", optional=("y",))
    assert sorted((r["x"], r["y"]) for r in rows.shuffled(0)) == [(1, 2), (3, None)]
    with pytest.raises(ValueError, match=r"a.jsonl and 1 more files has no column 'w'"):
        Rows([a, b], ("x", "w"), tmp_path / "rows", optional=("w",))


GOOD = b'{"text": "a"}\n'
DAMAGED: list[tuple[str, bytes, str]] = [
    ("cut.jsonl", GOOD * 2 + b'{"text": "a', "cut.jsonl, line 3: no JSON (Unterminated string starting at, column 10)"),
    ("middle.jsonl", GOOD + b'{"text": 3\n' + GOOD, "middle.jsonl, line 2: no JSON (Expecting ',' delimiter, column 11)"),
    ("first.jsonl", b'{"text": \n' + GOOD, "first.jsonl, line 1: no JSON (Expecting value, column 9)"),
    ("two.jsonl", GOOD.strip() + GOOD, "two.jsonl, line 1: no JSON (Extra data, column 14)"),
    ("latin.jsonl", GOOD + '{"text": "é"}'.encode("latin-1"), "latin.jsonl, line 2: byte 0xe9 is not UTF-8"),
    ("wide.jsonl", GOOD.decode().encode("utf-16"), "wide.jsonl, line 1: byte 0xff is not UTF-8"),
    ("latin.json", b"[\n" + '{"text": "é"}]'.encode("latin-1"), "latin.json, line 2: byte 0xe9 is not UTF-8"),
    ("number.jsonl", GOOD + b"7\n", "number.jsonl, line 2 begins with '7', and a row is an object"),
    ("lists.jsonl", GOOD + b'["a"]\n', "lists.jsonl, line 2 begins with '[\"a\"]', and a row is an object"),
    ("strings.json", b'[{"text": "a"},\n"b"]', "strings.json, line 2 begins with '\"b\"]', and a row is an object"),
    ("cut.json", b'[\n{"text": "a"},\n{"te', "cut.json, line 3: no JSON (Unterminated string"),
    ("open.json", b'[\n{"text": "a"},\n', "open.json, line 3: no JSON (Expecting value"),
    ("comma.json", b'[{"text": "a"}\n{"text": "b"}]', "comma.json, line 2: no JSON (Expecting ',' delimiter, column 1)"),
    ("more.json", b'[{"text": "a"}]\n]', "more.json, line 2: no JSON (Extra data, column 1)"),
    ("pretty.json", b'{\n"text": "a",\n}', "pretty.json, line 3: no JSON"),
    ("deep.jsonl", GOOD + b'{"text": ' + b"[" * 100_000, "deep.jsonl, line 2: nested too deeply"),
    ("digits.jsonl", GOOD + b'{"text": ' + b"9" * 9_999 + b"}", "digits.jsonl, line 2: Exceeds the limit"),
    ("fields.csv", b"text\na\nb,c,d\n", "fields.csv, line 3: 3 fields where the header names 1"),
    ("quote.csv", b'text\nb\n"a\nb\n', "quote.csv, line 4: unexpected end of data"),
    ("latin.csv", "text\na\ncafé\n".encode("latin-1"), "latin.csv, line 3: byte 0xe9 is not UTF-8"),
    ("latin.txt", "a\nb\né".encode("latin-1"), "latin.txt, line 3: byte 0xe9 is not UTF-8"),
    ("cut.txt", "é".encode()[:1], "cut.txt, line 1: byte 0xc3 is not UTF-8"),
    ("cut.parquet", b"PAR1" + bytes(99), "cut.parquet, which should be Parquet, is damaged"),
    ("cut.arrow", b"ARROW1", "cut.arrow, which should be Arrow, is damaged"),
    ("plain.jsonl.gz", GOOD, "plain.jsonl.gz, which is packed, cannot be unpacked (Not a gzipped file"),
    ("plain.jsonl.zst", GOOD, "plain.jsonl.zst, which is packed, cannot be unpacked"),
    ("cut.jsonl.gz", gzip.compress(GOOD * 999)[:40], "cut.jsonl.gz, which is packed, cannot be unpacked"),
    ("cut.jsonl.xz", lzma.compress(GOOD * 999)[:60], "cut.jsonl.xz, which is packed, cannot be unpacked"),
    ("latin.txt.gz", gzip.compress(b"a\n\xe9"), "latin.txt.gz, line 2: byte 0xe9 is not UTF-8"),
]  # fmt: skip


@pytest.mark.parametrize("name, data, says", DAMAGED, ids=[name for name, *_ in DAMAGED])
def test_what_cannot_be_read_is_told_with_its_file_and_line(name: str, data: bytes, says: str, tmp_path: Path) -> None:
    good = written(tmp_path / "good.jsonl", GOOD)
    with pytest.raises(ValueError) as caught:
        Rows([("good.jsonl", good), (name, written(tmp_path / name, data))], ("text",), tmp_path / "rows")
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


def test_zst_that_is_cut_short_is_told(tmp_path: Path) -> None:
    with (tmp_path / "a.jsonl.zst").open("wb") as file, pa.CompressedOutputStream(file, "zstd") as out:
        out.write(GOOD * 9_999)
    whole = (tmp_path / "a.jsonl.zst").read_bytes()
    with pytest.raises(ValueError, match=r"cut.jsonl.zst, which is packed, cannot be unpacked \(Truncated"):
        values(written(tmp_path / "cut.jsonl.zst", whole[: len(whole) // 2]))


def test_every_ending_that_makes_a_file_a_text_has_a_reader() -> None:
    assert {*TABLES, *DOCUMENTS} == set(READERS)
