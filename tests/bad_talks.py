"""The rows of `test_bad_inputs.py` whose text is bad: conversations, columns, packed files and a data set's folder."""

import gzip
import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.bad_inputs import LFS, Row
from tests.spoiling import Spoil, both, entries, holds, without

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
GOOD: list[dict[str, Any]] = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "text": "c"}]


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zst(data: bytes) -> bytes:
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as stream:
        stream.write(data)
    return bytes(out.getvalue())


def parquet(**columns: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out)
    return out.getvalue()


def text(name: str, file: str, content: bytes, columns: str, *says: str, spoil: Spoil | None = None) -> Row:
    """A row whose text is a file beside the model."""
    made = holds(f"../{file}", content)
    return Row(name, both(made, spoil) if spoil else made, says, words=(f"tokens={file}{columns}",))


def talk(name: str, messages: Any, *says: str, **more: Any) -> Row:
    """A row whose text has a good conversation on its first line, and this on its second."""
    columns = "#messages" + "".join(f"+{column}" for column in more)
    rows = [*({**row, **dict.fromkeys(more)} for row in GOOD), {"messages": messages, **more}]
    return text(name, "a.jsonl", lines(*rows), columns, *says)


def alone(name: str, messages: Any, *says: str) -> Row:
    """A row whose text has this conversation and no other."""
    return text(name, "a.jsonl", lines({"messages": messages}), "#messages", "a.jsonl has no conversation in", *says)


BAD = b'{"text": "a"}\n' * 6 + b'{"text": "a" "b"}\n'
BY_LINE = "in line 2; name another"
TALKS: list[Row] = [
    alone("messages are null", None, "rows without messages: 1 left out"),
    alone("messages are empty", [], "rows without messages: 1 left out"),
    alone("messages without roles", [{"content": "a"}], "conversations with a message that has no role: 1 left out"),
    talk("messages are a word", "hello", "column 'messages' of a.jsonl holds no messages", BY_LINE),
    talk("messages are a number", 7, "column 'messages' of a.jsonl holds no messages", BY_LINE),
    talk("messages are an object", {"role": "user", "content": "a"}, "column 'messages' of a.jsonl holds no messages", BY_LINE),
    talk("messages are words in a list", ["hello"], "column 'messages' of a.jsonl holds no messages", BY_LINE),
    talk("messages are half a JSON text", '[{"role": ', "column 'messages' of a.jsonl holds no messages", BY_LINE),
    talk("tools are a word", [], "column 'tools' of a.jsonl holds no tools (JSON schemas)", BY_LINE, tools="find"),
    talk("tools are an object", [], "column 'tools' of a.jsonl holds no tools (JSON schemas)", BY_LINE, tools={"name": "find"}),
    text("no column of messages", "a.jsonl", lines({"text": "a"}), "#messages", "a.jsonl has no column 'messages'; it has: text"),
    text("no column of tools", "a.jsonl", lines(*GOOD), "#messages+tools", "a.jsonl has no column 'tools'; it has: messages, text"),
    text(
        "a third column beside messages",
        "a.jsonl",
        lines(*GOOD),
        "#messages+tools+text",
        "a.jsonl at",
        "beside messages there may be a column",
    ),
    text("no such column in Parquet", "a.parquet", parquet(body=["a"]), "#text", "a.parquet has no column 'text'; it has: body"),
    text("a column of lists in Parquet", "a.parquet", parquet(text=[["a"]]), "", "column 'text' of a.parquet holds a list"),
    text(
        "no chat template",
        "a.jsonl",
        lines(*GOOD),
        "#messages",
        "the tokenizer has no chat template; put the chat_template.jinja",
        spoil=without("chat_template.jinja"),
    ),
    text(
        "a chat template of nothing in tokenizer_config.json",
        "a.jsonl",
        lines(*GOOD),
        "#messages",
        "has no chat template",
        spoil=both(without("chat_template.jinja"), entries("tokenizer_config.json", chat_template="")),
    ),
    text("a .zst file that is cut", "a.jsonl.zst", zst(lines(*GOOD * 999))[:60], "", "a.jsonl.zst, which is packed, cannot be unp"),
    text("a .zst file that is none", "a.jsonl.zst", lines(*GOOD), "", "a.jsonl.zst, which is packed, cannot be unpacked"),
    text("a .gz file that is none", "a.jsonl.gz", lines(*GOOD), "", "a.jsonl.gz, which is packed, cannot be unpacked"),
    text("a packed file in Latin-1", "a.txt.gz", gzip.compress("a\ncafé".encode("latin-1")), "", "a.txt.gz, line 2: byte 0xe9"),
    text("JSON that is wrong on line 7", "a.jsonl", BAD, "", "a.jsonl, line 7: no JSON (Expecting ',' delimiter, column 14)"),
    text("an LFS pointer as data", "a.jsonl", LFS.encode(), "", "a.jsonl at", "is a Git LFS pointer", "git lfs pull"),
    text("an LFS pointer as a matrix", "a.npy", LFS.encode(), "", "a.npy at", "is a Git LFS pointer", "git lfs pull"),
    Row(
        "an LFS pointer in a data set's folder",
        both(holds("../a.jsonl", lines(*GOOD)), holds("../b.parquet", LFS)),
        ("b.parquet at", "is a Git LFS pointer"),
        words=("tokens=.",),
    ),
    Row("two matrices as one text", holds("../a.npy", b"x"), ("a.npy is no text that can be read",), words=("tokens=a.npy,a.npy",)),
    text(
        "text for a model without a tokenizer",
        "a.jsonl",
        lines(*GOOD),
        "",
        "the model has no tokenizer, so text cannot become",
        spoil=both(without("tokenizer.json"), without("tokenizer_config.json")),
    ),
    text(
        "text for a tokenizer that is code",
        "a.jsonl",
        lines(*GOOD),
        "",
        "is code of its own (own.Tokenizer)",
        "tokens=FILE.npy",
        spoil=both(
            without("tokenizer.json"), entries("tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Tokenizer", None]})
        ),
    ),
]
