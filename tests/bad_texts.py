"""Bad texts, token matrices, pipelines and words for `test_bad_inputs.py`: what each is, and what the one line must say."""

import gzip
import io
import lzma
from typing import Any

import numpy as np

GOOD = b'{"text": "a b c"}\n'


def npy(array: Any = None, header: bytes = b"", more: bytes = b"") -> bytes:
    """An .npy file, or one with another header."""
    file = io.BytesIO()
    np.save(file, np.zeros((2, 8), np.int32) if array is None else array)
    whole = file.getvalue()
    if header:
        whole = whole[:8] + len(header).to_bytes(2, "little") + header + whole[128:]
    return whole + more


def described(**changes: Any) -> bytes:
    """The header of a matrix of 2 x 8 tokens with other entries."""
    return repr({"descr": "<i4", "fortran_order": False, "shape": (2, 8)} | changes).encode().ljust(117) + b"\n"


PLANNED: list[tuple[str, bytes, tuple[str, ...]]] = [
    ("nothing.jsonl", b"", ("nothing.jsonl at", "is empty; name a text that holds some")),
    ("nothing.txt", b"", ("nothing.txt at", "is empty; name a text that holds some")),
    ("pickle.npy", b"\x80\x02}q\x00.", ("pickle.npy at", "is no .npy matrix")),
    ("nothing.npy", b"", ("nothing.npy at", "is no .npy matrix")),
    ("cut.npy", npy()[:40], ("cut.npy at", "is no .npy matrix")),
    ("short.npy", npy()[:-4], ("short.npy at", "has 188 bytes where (2, 8) needs 192")),
    ("long.npy", npy(more=b"1234"), ("long.npy at", "has 196 bytes where (2, 8) needs 192")),
    ("flat.npy", npy(np.zeros(16, np.int32)), ("flat.npy has shape (16,)", "a token matrix is [sequences, length] of integers")),
    ("floats.npy", npy(np.zeros((2, 8))), ("floats.npy has shape (2, 8) and type float64",)),
    ("objects.npy", npy(np.array([[None, 1]])), ("objects.npy has shape (1, 2) and type object",)),
    ("none.npy", npy(np.zeros((0, 8), np.int32)), ("none.npy has shape (0, 8)",)),
    ("huge.npy", npy(header=described(shape=(1 << 40, 1 << 40))), ("huge.npy at", "has 192 bytes where")),
    ("negative.npy", npy(header=described(shape=(-2, -8))), ("negative.npy has shape (-2, -8)",)),
    ("words.npy", npy(header=described(shape=("2", "8"))), ("words.npy at", "is no .npy matrix")),
    ("type.npy", npy(header=described(descr="nonsense")), ("type.npy at", "is no .npy matrix")),
    ("code.npy", npy(header=b"__import__('os').abort()\n"), ("code.npy at", "is no .npy matrix")),
    ("deep.npy", npy(header=b"(" * 2_000 + b"\n"), ("deep.npy at", "is no .npy matrix")),
    ("beyond.npy", npy(np.arange(2, 514).reshape(64, 8)), ("beyond.npy at", "the token id 512 in sequence 63", "ids 0 to 511")),
    ("columns.npy", npy(np.asfortranarray(np.eye(2, 8, 3) * -1).astype(np.int64)), ("columns.npy at", "id -1 in sequence 0")),
    ("bytes.npy", npy(np.array([[1, 2], [3, 4], [5, 513]], ">u2")), ("bytes.npy at", "has the token id 513 in sequence 2")),
    ("far.npy", npy(np.full((1, 2), 2**64 - 1, np.uint64)), ("far.npy at", "has the token id 18446744073709551615 in sequence 0")),
    ("odd.bin", b"x", ("odd.bin is no text that can be read; known endings",)),
    ("line.jsonl", GOOD * 3 + b'{"text": "a b\n' + GOOD, ("line.jsonl, line 4: no JSON (Unterminated string",)),
    ("first.jsonl", b'{"text": \n', ("first.jsonl, line 1: no JSON",)),
    ("latin.jsonl", GOOD + '{"text": "café"}\n'.encode("latin-1"), ("latin.jsonl, line 2: byte 0xe9 is not UTF-8",)),
    ("utf16.jsonl", '{"text": "a"}\n'.encode("utf-16"), ("utf16.jsonl, line 1: byte 0xff is not UTF-8",)),
    ("blank.jsonl", b"\n\n", ("blank.jsonl, which has no rows, is empty",)),
    ("empty.jsonl", b'{"text": ""}\n{"text": " "}\n', ("empty.jsonl has no text in column 'text': empty rows: 2 left out",)),
    ("null.json", b"null", ("null.json, line 1 begins with 'null', and a row is an object",)),
    ("nulls.jsonl", b"\nnull\nnull\n", ("nulls.jsonl, line 2 begins with 'null', and a row is an object",)),
    ("numbers.jsonl", b"1\n2\n", ("numbers.jsonl, line 1 begins with '1'",)),
    ("word.json", b'"abc"', ("word.json, line 1 begins with '\"abc\"'",)),
    ("page.jsonl", b"<html>\n", ("page.jsonl, line 1 begins with '<html>'",)),
    ("escape.jsonl", b"\x1b[31mred\n", (r"escape.jsonl, line 1 begins with '\x1b[31mred'",)),
    ("list.json", b"[]", ("list.json, which has no rows, is empty",)),
    ("cut.json", b'[\n{"text": "a"},\n{"te', ("cut.json, line 3: no JSON",)),
    ("deep.jsonl", b'{"text": ' + b"[" * 100_000 + b"\n", ("deep.jsonl, line 1: ",)),
    ("column.jsonl", b'{"txet": "a"}\n', ("column.jsonl has no column 'text'; it has: txet",)),
    ("values.jsonl", b'{"text": {"a": 1}}\n', ("column 'text' of values.jsonl holds a dict and no text; name another", "line 1")),
    ("latin.txt", "one\ncafé".encode("latin-1"), ("latin.txt, line 2: byte 0xe9 is not UTF-8",)),
    ("latin.csv", "text\ncafé\n".encode("latin-1"), ("latin.csv, line 2: byte 0xe9 is not UTF-8",)),
    ("fields.csv", b"text\na\nb,c,d\n", ("fields.csv, line 3: 3 fields where the header names 1",)),
    ("quote.csv", b'text\n"a\nb\n', ("quote.csv, line 3: unexpected end of data",)),
    ("blank.csv", b"\n", ("blank.csv, which has no rows, is empty",)),
    ("bad.parquet", b"PAR1xxxxPAR1", ("bad.parquet, which should be Parquet, is damaged",)),
    ("page.parquet", b"<html>", ("page.parquet, which should be Parquet, is damaged",)),
    ("bad.jsonl.gz", GOOD, ("bad.jsonl.gz, which is packed, cannot be unpacked",)),
    ("cut.jsonl.gz", gzip.compress(GOOD * 1000)[:40], ("cut.jsonl.gz, which is packed, cannot be unpacked",)),
    ("cut.jsonl.xz", lzma.compress(GOOD * 1000)[:60], ("cut.jsonl.xz, which is packed, cannot be unpacked",)),
    ("talk.jsonl", b'{"messages": "hello"}\n', ("talk.jsonl has no column 'text'; it has: messages (write URI#column)",)),
]  # fmt: skip

RUN: list[tuple[str, bytes, tuple[str, ...]]] = [
    ("late.jsonl", GOOD * 20_000 + b'{"text": ["a"]}\n', ("late.jsonl holds a list and no text;", "correct line 20001")),
    ("short.jsonl", GOOD, ("short.jsonl gives 0 of 1 sequences of 64 tokens",)),
]  # fmt: skip

PIPELINES: list[tuple[str, str, tuple[str, ...]]] = [
    ("exits.py", "raise SystemExit('no GPU')", ("exits.py does not load: it ends the program, SystemExit('no GPU')",)),
    ("quits.py", "import sys; sys.exit(0)", ("quits.py does not load: it ends the program, SystemExit(0)",)),
    ("exits_late.py", "def build(): raise SystemExit(3)", ("build ends the program, SystemExit(3)",)),
    ("divides.py", "def build(): 1 / 0", ("build raised ZeroDivisionError: division by zero",)),
    ("asserts.py", "def build(): assert False, 'never'", ("build raised AssertionError: never",)),
    ("recurses.py", "def build(): build()", ("build raised RecursionError",)),
    ("names.py", "def build(): nothing", ("build raised NameError: name 'nothing' is not defined",)),
    ("syntax.py", "def build(:", ("syntax.py does not load: SyntaxError",)),
    ("nul.py", "x = 1\0", ("nul.py does not load: ",)),
    ("imports.py", "import nonsense_that_is_not_there", ("imports.py does not load: ModuleNotFoundError",)),
    ("empty.py", "", ("empty.py defines no function `build`",)),
    ("number.py", "build = 7", ("number.py defines no function `build`",)),
    ("none.py", "def build(): pass", ("build returned NoneType, and a pipeline returns the Step to publish",)),
    ("escape.py", "raise ValueError('\\x1b[31mred')", (r"escape.py does not load: ValueError: \x1b[31mred",)),
    ("lines.py", "raise ValueError('a\\nb\\r\\x07c')", (r"ValueError: a b \x07c",)),
    ("long.py", "raise ValueError('x' * 9999)", ("long.py does not load: ValueError: xxx", "[...]")),
]  # fmt: skip

WORDS: list[tuple[tuple[str, ...], str]] = [
    (("nonsense",), "No such command 'nonsense'"),
    (("plan",), "Missing argument 'PIPELINE'"),
    (("plan", "x.py", "--nonsense"), "No such option: --nonsense"),
    (("plan", "x.py", "--runner", "slurm"), "Invalid value for '--runner'"),
    (("plan", "x.py", "--store"), "Option '--store' requires an argument"),
    (("run", "x.py", "--in-flight", "many"), "Invalid value for '--in-flight'"),
    (("run", "x.py", "--retries", "-1"), "Invalid value for '--retries'"),
    (("run", "mixtral", "FOLDER"), "; a parameter is given as -p model=FOLDER; see "),
    (("plan", "mixtral", "keep=6"), "; a parameter is given as -p keep=6; see "),
    (("fit", "FOLDER", "24GB"), "Got unexpected extra argument(s) (24GB); see "),
    (("--nonsense",), "No such option: --nonsense"),
    (("plan", "x.py"), "there is no pipeline x.py"),
    (("plan", "\x1b[31m.py"), r"there is no pipeline \x1b[31m.py"),
    (("show", "\x1b[31mred", "--store", "."), r"\x1b[31mred"),
]  # fmt: skip

PLACES = [
    ("", "the model is ''"), (".", "holds no *.safetensors"), ("..", "holds no *.safetensors"),
    ("nowhere", "there is no such file or folder"), ("nowhere/at/all", "there is no such file or folder"),
    ("~nobody-of-this-name/x", "Could not determine home directory"), ("x" * 5_000, "File name too long"),
    ("\x1b[31mred", r"\x1b[31mred: there are no such files"), ("file:///etc", "know folders, files, globs"),
    ("http://127.0.0.1/x", "know folders, files, globs"), ("s3://", "s3://"), ("hf://models/x", "write hf://datasets/"),
    ("a\nb", "there is no such file or folder"),
]  # fmt: skip

ABSENT = (
    "tokens=nowhere.jsonl", "tokens=alpaca,nowhere/*.parquet#text", "tokens=nowhere.npy", "tokens=nowhere/at.txt",
    "heldout=nowhere.jsonl", "heldout.texts=c4-en,nowhere.npy", "tune.text=nowhere.jsonl#messages", "tune.deepspeed=nowhere.json",
    "adapter=./nowhere/adapter", "tasks=nowhere.jsonl", "tasks=a,nowhere.yaml", "prompts=nowhere.jsonl",
)  # fmt: skip
"""Parameters that name a file which is not there."""
