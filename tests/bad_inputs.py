"""The rows of `test_bad_inputs.py`: bad checkpoints. What each spoils is told by `spoiling.py`."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.spoiling import (
    ESCAPE,
    INDEX,
    OTHER,
    SHARD,
    Q,
    Spoil,
    added,
    both,
    cut,
    directory,
    entries,
    header,
    holds,
    index,
    join,
    linked,
    longer,
    moved,
    pipe,
    renamed,
    split,
    tensor,
    without,
)


@dataclass(frozen=True)
class Row:
    """One bad input, and the texts that its one line must contain."""

    name: str
    spoil: Spoil
    says: tuple[str, ...]
    family: str = "mixtral"
    words: tuple[str, ...] = ()
    """Parameters of the command beside the model."""


EXPERT, OTHER_EXPERT = (f"model.layers.0.block_sparse_moe.experts.{e}.w1.weight" for e in (1, 2))
DEEP: bytes = b'{"a":' + b"[" * 100_000
HUGE = 1 << 70
LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0123456789abcdef' * 4}\nsize 123456\n"
BPE = {"type": "BPE", "vocab": {"a": "b"}, "merges": []}


def row(name: str, spoil: Spoil, *says: str, family: str = "mixtral") -> Row:
    return Row(name, spoil, says, family)


def raw(content: bytes) -> Spoil:
    """The first shard has this header before its data."""
    return header(lambda _: content)


def length(n: int) -> Spoil:
    """The first eight bytes of the first shard promise a header of so many bytes."""
    return lambda folder: holds(SHARD, struct.pack("<Q", n) + (folder / SHARD).read_bytes()[8:])(folder)


def whole(folder: Path) -> None:
    length((folder / SHARD).stat().st_size)(folder)


def sparse(n: int) -> Spoil:
    """The first shard begins with a header of so many bytes, nearly all of them a hole on the disk."""

    def spoil(folder: Path) -> None:
        with (folder / SHARD).open("wb") as file:
            file.write(struct.pack("<Q", n) + b"{")
            file.truncate(n + 100)

    return spoil


def same(a: str, b: str) -> Spoil:
    """Two tensors of a shard claim the same bytes."""

    def change(entries: dict[str, Any]) -> None:
        entries[b]["data_offsets"] = entries[a]["data_offsets"]

    return header(change)


def twice(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("{", '{"hidden_size": 64,', 1))


def tensor_twice(folder: Path) -> None:
    old, data = split(folder / SHARD)
    join(folder / SHARD, json.dumps(old).replace("{", f'{{"{Q}": {json.dumps(old[Q])},', 1).encode(), data)


NO_JSON = "is cut short or no JSON"


def of_json(name: str, prefix: str = "") -> list[Row]:
    """What may be wrong with any JSON file of a checkpoint."""
    told = prefix or name
    return [
        row(f"{name} is empty", holds(name, ""), f"{told}", "is empty"),
        row(f"{name} is blank", holds(name, " \n\t"), told, "is empty"),
        row(f"{name} is a list", holds(name, "[]"), told, "holds a list where an object belongs"),
        row(f"{name} is null", holds(name, "null"), told, "holds null where an object belongs"),
        row(f"{name} is a number", holds(name, "12"), told, "holds 12 where"),
        row(f"{name} is a word", holds(name, '"word"'), told, "holds 'word' where"),
        row(f"{name} is cut", cut(name), told, NO_JSON),
        row(f"{name} ends with more", longer(name, b"}"), told, NO_JSON, "Extra data"),
        row(f"{name} is binary", holds(name, bytes(range(256))), told, "is not UTF-8 (byte 0x80"),
        row(f"{name} is UTF-16", holds(name, '{"a": 1}'.encode("utf-16")), told, "is not UTF-8 (byte 0xff at 0"),
        row(f"{name} is a page of a proxy", holds(name, "<html><body>404</body></html>"), told, NO_JSON),
        row(f"{name} is nested too deeply", holds(name, DEEP), told, "is nested too deeply"),
        row(f"{name} has half a character", holds(name, '{"a": "\\ud800"}'), told, "has an escape that is no character"),
        row(f"{name} is a pipe", pipe(name), name, "is no file but a pipe"),
        row(f"{name} is a link to nothing", linked(name, "nowhere"), name, "is a link to 'nowhere', which is not there"),
        row(f"{name} is a link out", linked(name, "../elsewhere/x.json"), name, "is a link out of the model's folder"),
    ]


FILES = [
    *of_json("config.json"), *of_json(INDEX), *of_json("tokenizer.json"), *of_json("tokenizer_config.json"),
    *of_json("generation_config.json"),
    row("config.json is absent", without("config.json"), "has no file 'config.json'"),
    row("config.json is a folder", directory("config.json"), "has no file 'config.json'"),
    row("a shard is a folder", directory(SHARD), INDEX, SHARD, "does not hold"),
    row("a shard is absent", without(OTHER), INDEX, OTHER, "does not hold"),
    row("a shard is a pipe", pipe(SHARD), SHARD, "is no file but a pipe"),
    row("a shard is a link to itself", both(without(SHARD), lambda f: (f / SHARD).symlink_to(SHARD)), SHARD, "which is not there"),
    row("a shard is a link out", linked(SHARD, "../elsewhere/s.safetensors"), SHARD, "is a link out of the model's folder"),
    row("a file's name has escape codes", holds(f"{ESCAPE}.json", "{}"), r"a file named '\x1b[31mred", "rename"),
    row("a file's name has a line break", holds("a\nb.json", "{}"), r"a file named 'a\nb.json'", "rename"),
    row("the chat template is empty", holds("chat_template.jinja", ""), "chat_template.jinja", "is empty"),
    row("the tokenizer's model is empty", holds("tokenizer.model", ""), "tokenizer.model", "is empty"),
    row("added_tokens.json has words", holds("added_tokens.json", '{"<x>": "7"}'), "'<x>' is '7', not of type int"),
    row("vocab.json has lists", holds("vocab.json", '{"a": [1]}'), "vocab.json", "'a' is a list, not of type int"),
    row("tokenizer.json has no model", entries("tokenizer.json", model=...), "tokenizer.json", "describes no tokenizer", "model"),
    row("tokenizer.json has null as model", entries("tokenizer.json", model=None), "tokenizer.json", "describes no tokenizer"),
    row("tokenizer.json has an unknown model", entries("tokenizer.json", model={"type": "X"}), "tokenizer.json", "no tokenizer"),
    row("tokenizer.json has an odd model", entries("tokenizer.json", model=BPE), "tokenizer.json", "describes no tokenizer"),
    row("temperature is a word", entries("generation_config.json", temperature="hot"), "'temperature' is 'hot'"),
    row("do_sample is a number", entries("generation_config.json", do_sample=3), "generation_config.json", "'do_sample' is 3"),
]  # fmt: skip

HEADERS = [
    row("a shard is empty", holds(SHARD, b""), SHARD, "(0 bytes) is truncated or no safetensors file"),
    row("a shard has seven bytes", holds(SHARD, b"1234567"), SHARD, "(7 bytes) is truncated or no safetensors file"),
    row("a shard is a web page", holds(SHARD, b"<html>" * 99), SHARD, "is truncated or no safetensors file"),
    row("a shard is a pickle", holds(SHARD, b"\x80\x02}q\x00" * 99), SHARD, "is truncated or no safetensors file"),
    *(row(f"{name} is an LFS pointer", holds(name, LFS), f"{name} at", "is a Git LFS pointer", "run `git lfs pull` there")
      for name in (SHARD, OTHER, INDEX, "config.json", "tokenizer.json")),
    row("a header of no bytes", length(0), SHARD, "is truncated or no safetensors file"),
    row("a header of 2**63 bytes", length(2**63), SHARD, "is truncated or no safetensors file"),
    row("a header of 2**64-1 bytes", length(2**64 - 1), SHARD, "is truncated or no safetensors file"),
    row("a header one byte too large", sparse(100_000_001), SHARD, "larger than the 100,000,000"),
    row("a header as long as the file", whole, SHARD, "is truncated or no safetensors file"),
    row("a header that ends early", length(100), f"the header of {SHARD}", NO_JSON),
    row("a header that is a list", raw(b"[]"), f"the header of {SHARD}", "holds a list"),
    row("a header that is null", raw(b"null"), f"the header of {SHARD}", "holds null"),
    row("a header that is no UTF-8", raw(b'{"\xff": 1}'), f"the header of {SHARD}", "is not UTF-8 (byte 0xff at 2)"),
    row("a header with half a character", raw(b'{"\\udc00": {}}'), f"the header of {SHARD}", "an escape that is no character"),
    row("a header nested too deeply", raw(DEEP), f"the header of {SHARD}", "is nested too deeply"),
    row("a header of blanks", raw(b"  "), f"the header of {SHARD}", "is empty"),
    row("a tensor twice in a header", tensor_twice, f"the header of {SHARD} names '{Q}' twice"),
    row("metadata is a list", header(lambda h: h.update(__metadata__=[])), SHARD, "__metadata__ of its header is no object"),
    row("metadata has a number", header(lambda h: h.update(__metadata__={"a": 1})), SHARD, "__metadata__ of its header"),
    row("an entry is null", header(lambda h: h.update({Q: None})), SHARD, f"tensor '{Q}' has null where its header needs"),
    row("an entry is a number", header(lambda h: h.update({Q: 7})), f"tensor '{Q}' has 7 where its header needs"),
    row("an entry is a list", header(lambda h: h.update({Q: [1]})), f"tensor '{Q}' has a list where its header needs"),
    row("an entry is empty", header(lambda h: h.update({Q: {}})), f"tensor '{Q}' has the fields none where"),
    row("an entry has one field more", tensor(more=1), f"tensor '{Q}' has the fields data_offsets, dtype, more, shape where"),
    row("no dtype", tensor(dtype=...), f"tensor '{Q}' has the fields data_offsets, shape where"),
    row("no shape", tensor(shape=...), f"tensor '{Q}' has the fields data_offsets, dtype where"),
    row("no offsets", tensor(data_offsets=...), f"tensor '{Q}' has the fields dtype, shape where"),
    row("dtype F6_E2M3", tensor(dtype="F6_E2M3"), f"tensor '{Q}' has dtype 'F6_E2M3', which is not known; convert it to one of"),
    row("dtype F4 of another size", tensor(dtype="F4"), f"tensor '{Q}' has 1,024 bytes (data_offsets) where F4 [16, 16] needs 128"),
    row("dtype F4 of an odd row", tensor(dtype="F4", shape=[2048, 1]), "has shape [2048, 1] in F4, which has two numbers in a"),
    row("dtype C64", tensor(dtype="C64"), "has dtype 'C64', which is not known"),
    row("dtype in lower case", tensor(dtype="bf16"), "has dtype 'bf16', which is not known"),
    row("dtype of torch", tensor(dtype="float32"), "has dtype 'float32', which is not known"),
    row("dtype is a number", tensor(dtype=32), "has dtype 32, which is not known"),
    row("dtype is null", tensor(dtype=None), "has dtype null, which is not known"),
    row("dtype is a list", tensor(dtype=["F32"]), "has dtype a list, which is not known"),
    row("dtype with escape codes", tensor(dtype=ESCAPE), r"has dtype '\x1b[31mred\x1b[0m', which is not known"),
    row("dtype of half the size", tensor(dtype="F16"), f"tensor '{Q}' has", "bytes (data_offsets) where F16", "needs"),
    row("dtype of twice the size", tensor(dtype="F64"), f"tensor '{Q}' has", "bytes (data_offsets) where F64", "needs"),
    row("shape is a number", tensor(shape=4), "has shape 4, which is no list of whole numbers"),
    row("shape is null", tensor(shape=None), "has shape None, which is no list of whole numbers"),
    row("shape has a word", tensor(shape=[16, "16"]), "has shape [16, '16'], which is no list of whole numbers"),
    row("shape is negative", tensor(shape=[-16, -16]), "has shape [-16, -16], which is no list of whole numbers"),
    row("shape has a fraction", tensor(shape=[16.0, 16]), "has shape [16.0, 16], which is no list of whole numbers"),
    row("shape has a truth", tensor(shape=[True, 256]), "has shape [True, 256], which is no list of whole numbers"),
    row("shape has NaN", tensor(shape=[float("nan"), 1]), "has shape [nan, 1], which is no list of whole numbers"),
    row("shape is huge", tensor(shape=[HUGE, 2]), "which is no list of whole numbers"),
    row("shape is a product beyond 64 bits", tensor(shape=[2**40, 2**40]), "bytes (data_offsets) where F32"),
    row("shape is too large", tensor(shape=[17, 16]), "has 1,024 bytes (data_offsets) where F32 [17, 16] needs 1088"),
    row("shape is empty", tensor(shape=[]), "has 1,024 bytes (data_offsets) where F32 [] needs 4"),
    row("shape has a zero", tensor(shape=[0, 16]), "has 1,024 bytes (data_offsets) where F32 [0, 16] needs 0"),
    row("offsets are one", tensor(data_offsets=[0]), "has data_offsets [0], which are no begin and end"),
    row("offsets are three", tensor(data_offsets=[0, 1, 2]), "has data_offsets [0, 1, 2], which are no begin and end"),
    row("offsets are null", tensor(data_offsets=None), "has data_offsets None, which are no begin and end"),
    row("offsets are words", tensor(data_offsets=["0", "4"]), "has data_offsets ['0', '4'], which are no begin and end"),
    row("offsets are negative", tensor(data_offsets=[-1024, 0]), "has data_offsets [-1024, 0], which are no begin and end"),
    row("offsets are fractions", tensor(data_offsets=[0.0, 1024.0]), "has data_offsets [0.0, 1024.0], which are no begin and end"),
    row("offsets are turned round", tensor(data_offsets=[2048, 1024]), "has data_offsets [2048, 1024], which are no begin and end"),
    row("offsets are huge", tensor(data_offsets=[HUGE, HUGE + 1024]), "which are no begin and end"),
    row("offsets lie behind the file", moved((1 << 40, 1 << 40)), f"{SHARD} is truncated: it holds"),
    row("offsets are four bytes too far", moved((4, 4)), SHARD, "(data_offsets of its header)"),
    row("offsets cover too little", moved((0, -4)), f"tensor '{Q}' has 1,020 bytes (data_offsets) where F32 [16, 16] needs 1024"),
    row("offsets overlap", same(EXPERT, OTHER_EXPERT), SHARD, "overlaps", "data_offsets"),
    row("a hole between tensors", header(lambda h: h.pop(Q) and None), SHARD, "leaves a hole behind", "data_offsets"),
    row("bytes behind the last tensor", longer(SHARD, b"12345678"), SHARD, "has 8 bytes behind its last tensor"),
    row("a shard is cut in its data", cut(SHARD, 0.9), SHARD, "is truncated: it holds", "fetch it again"),
    row("a shard is cut in its header", cut(SHARD, 0.01), SHARD, "is truncated or no safetensors file"),
    row("no tensors at all", raw(b"{}"), SHARD, "bytes behind its last tensor"),
    row("a tensor without a name", header(lambda h: h.update({"": h.pop(Q)})), SHARD, "a tensor is named ''"),
    row("a tensor's name has escape codes", renamed(Q, ESCAPE), SHARD, r"a tensor is named '\x1b[31mred"),
    row("a tensor's name has a line break", renamed(Q, "a\nb"), SHARD, r"a tensor is named 'a\nb'"),
    row("a tensor's name turns the text round", renamed(Q, "a\u202eb"), SHARD, r"a tensor is named 'a\u202eb'"),
    row("a tensor's name is very long", renamed(Q, "x" * 10_000), SHARD, "a tensor is named 'xxx", "printable characters"),
]  # fmt: skip

INDEXES = [
    row("no weight_map", entries(INDEX, weight_map=...), INDEX, "has no weight_map"),
    row("weight_map is empty", entries(INDEX, weight_map={}), INDEX, "has no weight_map"),
    row("weight_map is null", entries(INDEX, weight_map=None), INDEX, "has no weight_map"),
    row("weight_map is a list", entries(INDEX, weight_map=[SHARD]), INDEX, "has a list as weight_map"),
    row("weight_map is a word", entries(INDEX, weight_map=SHARD), INDEX, f"has '{SHARD}' as weight_map"),
    row("metadata of the index is a list", entries(INDEX, metadata=[]), INDEX, "has a list as metadata"),
    row("total_size is a word", entries(INDEX, metadata={"total_size": "9"}), INDEX, "total_size is '9', not a number of bytes"),
    row("total_size is negative", entries(INDEX, metadata={"total_size": -1}), INDEX, "total_size is -1, not a number of bytes"),
    row("total_size is a truth", entries(INDEX, metadata={"total_size": True}), INDEX, "total_size is true, not a number"),
    row("total_size is null", entries(INDEX, metadata={"total_size": None}), INDEX, "total_size is null, not a number of bytes"),
    row("total_size is a fraction", entries(INDEX, metadata={"total_size": 1.5}), "total_size is 1.5, not a number of bytes"),
    row("total_size is infinite", entries(INDEX, metadata={"total_size": float("inf")}), INDEX, "total_size is inf, not a number"),
    row("a file is null", index(lambda m: m.update({Q: None})), INDEX, f"has null as the file of '{Q}', not a name"),
    row("a file is a number", index(lambda m: m.update({Q: 1})), INDEX, f"has 1 as the file of '{Q}', not a name"),
    row("a file is a list", index(lambda m: m.update({Q: [SHARD]})), INDEX, f"has a list as the file of '{Q}', not a name"),
    row("a file without a name", index(lambda m: m.update({Q: ""})), INDEX, f"has '' as the file of '{Q}', not a name"),
    row("a file named .", index(lambda m: m.update({Q: "."})), INDEX, f"has '.' as the file of '{Q}', not a name"),
    row("a file named ..", index(lambda m: m.update({Q: ".."})), INDEX, f"has '..' as the file of '{Q}', not a name"),
    row("a file above the folder", index(lambda m: m.update({Q: f"../{SHARD}"})), INDEX, f"names '../{SHARD}', which leads out"),
    row("a file by its whole path", index(lambda m: m.update({Q: f"/tmp/{SHARD}"})), INDEX, "which leads out of the folder"),
    row("a file by a path of Windows", index(lambda m: m.update({Q: f"..\\{SHARD}"})), INDEX, "which leads out of the folder"),
    row("a file that is a pickle", index(lambda m: m.update({Q: "pytorch_model.bin"})), INDEX, "as the file of", "not a name"),
    row("a file with escape codes", index(lambda m: m.update({Q: f"{ESCAPE}.safetensors"})), r"\x1b[31mred", "does not hold"),
    row("a file with a very long name", index(lambda m: m.update({Q: "x" * 9999 + ".safetensors"})), INDEX, "does not hold"),
    row("a file that is not there", index(lambda m: m.update({Q: "model-3.safetensors"})), INDEX, "model-3.safetensors, which"),
    row("a tensor in the other file", index(lambda m: m.update({Q: OTHER})), f"names {Q} in {OTHER}, which does not hold it"),
    row("a tensor that is nowhere", index(lambda m: m.update(ghost=SHARD)), f"names ghost in {SHARD}, which does not hold it"),
    row("a tensor that is not listed", index(lambda m: m.pop(Q)), f"{SHARD} holds {Q}, which {INDEX} does not name"),
    row("a tensor in both files", added(Q, (16, 16), OTHER, listed=False), f"{SHARD} and {OTHER}", f"both hold {Q}"),
    row("a tensor in both files, without an index", both(added(Q, (16, 16), OTHER), without(INDEX)), f"both hold {Q}"),
    row("a shard less, without an index", both(without(INDEX), without(OTHER)), "no tensor of layer 1"),
]  # fmt: skip
