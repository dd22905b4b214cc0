"""Text into a matrix of token ids, `tokens.npy`, int32 [sequences, length]; for fine-tuning with a mask of what is learned."""

import io
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from moeflow.methods import graph
from moeflow.methods.data.conversations import LeftOut, encoded, segments_of
from moeflow.methods.data.packing import Files, Piece, Reading, edges, fill, named, reader, table, words
from moeflow.methods.graph import LEARNED, TOKENS, Model
from moeflow.model.layout import read_config
from moeflow.model.spec import RestSpec, TokensSpec
from moeflow.sources import Texts
from moeflow.step import Artifact, Context, Spec, Step, step

FORMATS = ("auto", "text", "instruction", "chat")
MESSAGES = ("messages", "conversations")  # columns that hold a conversation


def examples(
    texts: Texts, model: Model, *, sequences: int, length: int, seed: int = 0, format: str = "auto", bos: bool = True,
    eos: bool = True, repeat: bool = False,
) -> Step:  # fmt: skip
    """`sequences` of `length` tokens of these texts in the model's own tokens, and which of them are learned.

    `format` says what the columns of a text are:

    - "text": joined by a space, every token learned;
    - "instruction": prompts, and last the response (`URI#query+response`, `URI#instruction+input+output`), in Alpaca's words
      (`conversations.instruction`); the response and the end-of-sequence token are learned;
    - "chat": one column of messages, "messages" where none is named (or prompts and last the response, as a question and its
      answer), in the tokenizer's own chat template, which alone decides about special tokens; the assistant's turns are learned;
    - "auto": what the name of a known data set says; else a column "messages" or "conversations" is a chat, several columns are an
      instruction, and one is text.

    Examples are shuffled by `seed`, joined and cut: one that does not fit into a row goes on in the next, its mask too. Rows in
    which nothing is learned are skipped. Examples without a prompt or a response are left out, as are those that the chat template
    refuses; the artifact says how many. Several texts are mixed by weight: each gives its share of the rows, spread evenly.
    `repeat` reads a text that is too small again, in another order. A ready-made `.npy` matrix is taken whole, as by `tokens.of`,
    without a mask.

    Raises ValueError for an unknown format, for columns that do not go with it, and for rows that no model of this kind can read.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is not known; choose one of {', '.join(FORMATS)}")
    if texts.is_tokens:
        if format in ("instruction", "chat"):
            raise ValueError(f"format={format!r} needs text, and a ready-made matrix of tokens is none; leave format away")
        return tokens(texts, model, sequences=sequences, length=length)
    files, mix = gathered(texts, model, chat=format != "text")
    return sample_examples(
        model.essential,
        model.texts,
        *files,
        mix=[part | _kind(entry, format) for part, entry in zip(mix, texts.entries(), strict=True)],
        sequences=sequences,
        length=length,
        seed=seed,
        bos=bos,
        eos=eos,
        repeat=repeat,
    )


def _kind(entry: Any, format: str) -> dict[str, Any]:
    """The format and the columns of one text, spelled out."""
    columns = list(entry.columns)
    if format == "auto":
        by_columns = "chat" if len(columns) == 1 and columns[0] in MESSAGES else "instruction" if columns[1:] else "text"
        format = entry.format or by_columns
    if format == "instruction" and len(columns) < 2:
        raise ValueError(
            f"{entry.source.uri}: an instruction needs the column of a prompt and that of the response, but it names "
            f"{', '.join(columns) or 'none'}; write URI#query+response"
        )
    return {"format": format, "columns": columns or [MESSAGES[0] if format == "chat" else "text"]}


def _examples_spec(
    rest: RestSpec,
    tokenizer: Any,
    *files: Any,
    mix: Any,
    sequences: int,
    length: int,
    seed: int,
    bos: bool,
    eos: bool,
    repeat: bool,
) -> Spec:
    return rows_spec(rest, tokenizer, *files, sequences=sequences, length=length, texts=len(mix), marked=True)


@step("data.examples", version=1, spec=_examples_spec)
def sample_examples(
    context: Context, config: Artifact, tokenizer_from: Artifact, *texts: Artifact,
    mix: list[dict[str, Any]], sequences: int, length: int, seed: int, bos: bool, eos: bool, repeat: bool,
) -> None:  # fmt: skip
    """`tokens.npy` int32 [sequences, length]; `learned.npy` uint8, 1 where that token counts in the loss; `tokens.json`.

    The mask stands at the token's own position: whoever trains shifts both. `tokens.json` says how many sequences and examples
    each text gave, and what was left out. Raises ValueError where a column is missing or of another kind, where the tokenizer
    lacks a chat template that a text needs, and where there is too little text, saying how much is missing.
    """
    from moeflow.methods.data.packing import Files, Piece, Reading, edges, fill, named, table

    tokenizer = tokenizer_in(context, config, tokenizer_from)
    formats = {part["format"] for part in mix}
    if "chat" in formats and not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template; put the chat_template.jinja of the model's chat version beside the checkpoint, "
            "or give prompts and responses (URI#prompt+response)"
        )
    first, last = edges(tokenizer, bos=bos, eos=eos) if formats - {"chat"} else ([], [])

    def pieces(files: Files, part: dict[str, Any], left_out: Counter[str]) -> Iterator[list[Piece]]:
        found = table(context, files, part["columns"])
        for turn in range(sequences * length if repeat else 1):  # a turn gives a token at least
            given = 0
            for row in found.shuffle(seed=seed + turn):
                try:
                    made = segments_of(tokenizer, row, part["format"], named(files))
                except LeftOut as why:
                    left_out[str(why)] += turn == 0  # each once, however often the text is read
                    continue
                given += 1
                yield [framed(*encoded(tokenizer, text), part["format"]) for text in made]
            if not given:
                break

    def framed(ids: list[int], learned: list[int], format: str) -> Piece:
        if format == "chat":
            return ids, learned
        return [*first, *ids, *last], [int(format == "text")] * len(first) + learned + [1] * len(last)

    def read(files: Files, part: dict[str, Any]) -> Reading:
        left_out: Counter[str] = Counter()
        return Reading(pieces(files, part, left_out), left_out)

    otherwise = "give more text, fewer sequences or another weight, or read it again (repeat=True)"
    tokens_NL, learned_NL, about = fill(context, texts, mix, read, sequences=sequences, length=length, otherwise=otherwise)
    np.save(context.out / graph.TOKENS, tokens_NL)
    np.save(context.out / LEARNED, learned_NL)
    (context.out / "tokens.json").write_text(json.dumps(about, indent=1) + "\n")


LARGE = 64 << 20  # bytes from which a file is fetched by a step of its own


def tokens(
    texts: Texts, model: Model, *, sequences: int, length: int, seed: int = 0, bos: bool = True, eos: bool = False, group: int = 0
) -> Step:
    """The token matrix of these texts in the model's own tokens; a ready-made `.npy` matrix is taken whole, as it is.

    `sequences` of `length` tokens: documents are shuffled by `seed`, tokenized one by one (with a beginning-of-sequence token each
    where `bos`, and an end where `eos`), joined, and cut. `group`: documents are joined in groups of so many, and what does not
    fill a sequence at the end of a group is dropped (NAEE's code: 1000); 0 joins them all. Several texts are mixed by weight: each
    gives its share of the sequences, spread evenly over the matrix.
    """
    if texts.is_tokens:
        (entry,) = texts.entries()
        return matrix(entry.source.file(entry.source.files[0].name), shape=_npy_shape(entry.source))
    files, mix = gathered(texts, model)
    return sample_tokens(
        model.essential,
        model.texts,
        *files,
        mix=mix,
        sequences=sequences,
        length=length,
        seed=seed,
        bos=bos,
        eos=eos,
        group=group,
    )


def gathered(texts: Texts, model: Model, *, chat: bool = False) -> tuple[list[Step], list[dict[str, Any]]]:
    """The steps that bring the texts, and for each text its columns, its weight (they sum to one) and how many steps are its.

    Raises ValueError where the model has no tokenizer, no reader knows a file, or a text holds conversations without being a
    `chat`.
    """
    if not model.has_tokenizer:
        raise ValueError("the model has no tokenizer, so text cannot become tokens; pass a ready-made matrix (tokens=FILE.npy)")
    entries = texts.entries()
    total = sum(e.weight for e in entries)
    if total <= 0:
        raise ValueError("the weights of the texts must sum to more than 0")
    for entry in entries:
        for file in entry.source.files:
            reader(file.name)  # refuse here what no reader knows
        if entry.format == "chat" and not chat:
            raise ValueError(f"{entry.source.uri} holds conversations, not text; name a column of text (URI#column)")
    parts = [_fetched(e.source) for e in entries]
    mix = [
        {"columns": list(e.columns), "weight": e.weight / total, "inputs": len(steps)}  # not where it lies: that is no recipe
        for e, steps in zip(entries, parts, strict=True)
    ]
    return [s for steps in parts for s in steps], mix


def _fetched(source: Any) -> list[Step]:
    """The steps that bring a text: one per large file, so that its download resumes, and one for all small ones."""
    large = [f.name for f in source.files if f.size > LARGE]
    small = [f.name for f in source.files if f.size <= LARGE]
    return [source.file(name) for name in large] + ([source.group(small)] if small else [])


def _npy_shape(source: Any) -> list[int]:
    name = source.files[0].name
    try:
        head = io.BytesIO(source.read(name, 0, min(source.files[0].size, 4096)))
        version = np.lib.format.read_magic(head)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(head)
    except ValueError as error:
        raise ValueError(f"{name} is no .npy matrix: {error}") from None
    if len(shape) != 2 or 0 in shape or shape[1] < 2 or dtype.kind not in "iu":
        raise ValueError(f"{name} has shape {shape} and type {dtype}; a token matrix is [sequences, length] of integers")
    return list(shape)


def _matrix_spec(given: Any, *, shape: list[int]) -> Spec:
    size = shape[0] * shape[1]
    return Spec(TokensSpec(*shape), reads=size * 8, writes=size * 4 + 128, memory=size * 12)


@step("data.matrix", version=1, spec=_matrix_spec)
def matrix(context: Context, given: Artifact, *, shape: list[int]) -> None:
    """A ready-made matrix of token ids."""
    ids = np.load(given.file(given.names()[0]), allow_pickle=False)
    if list(ids.shape) != shape:
        raise ValueError(f"the matrix has shape {ids.shape}, not {tuple(shape)}; it changed, run again")
    if ids.min() < 0 or ids.max() >= 2**31:
        raise ValueError(f"token ids reach from {ids.min()} to {ids.max()}; they must lie between 0 and 2**31")
    np.save(context.out / TOKENS, ids.astype(np.int32))


def _tokens_spec(
    rest: RestSpec, tokenizer: Any, *files: Any, mix: Any, sequences: int, length: int, seed: int, bos: bool, eos: bool, group: int
) -> Spec:
    return rows_spec(rest, tokenizer, *files, sequences=sequences, length=length, texts=len(mix))


def rows_spec(rest: RestSpec, *files: Any, sequences: int, length: int, texts: int, marked: bool = False) -> Spec:
    """What is known of `sequences` rows of `length` tokens, `marked` with what is learned, from `files`; raises ValueError."""
    if sequences < 1 or length < 2:
        raise ValueError(f"sequences={sequences} of length={length}: there must be at least one, of at least two tokens")
    positions = rest.config.get("max_position_embeddings")
    if positions and length > positions:
        raise ValueError(f"length={length} is more than the model's {positions} positions; make sequences shorter")
    reads = sum(sum(f["files"].values()) for f in files)
    writes = sequences * length * (4 + marked) + 128 * (1 + marked) + 300 * texts
    return Spec(TokensSpec(sequences, length), reads=reads, writes=writes, memory=4 * reads)


@step("data.tokens", version=1, spec=_tokens_spec)
def sample_tokens(
    context: Context, config: Artifact, tokenizer_from: Artifact, *texts: Artifact,
    mix: list[dict[str, Any]], sequences: int, length: int, seed: int, bos: bool, eos: bool, group: int,
) -> None:  # fmt: skip
    """`tokens.npy`, and `tokens.json`, which says how many sequences and documents each text gave.

    Raises ValueError where a column is missing or there is too little text, saying how much is missing.
    """

    tokenizer = tokenizer_in(context, config, tokenizer_from)
    first, last = edges(tokenizer, bos=bos, eos=eos)

    def pieces(files: Files, columns: list[str]) -> Iterator[list[Piece]]:
        for row in table(context, files, columns).shuffle(seed=seed):
            text = " ".join(words(v, c, named(files)) for c, v in row.items() if v is not None)
            ids = [*first, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], *last]
            yield [(ids, [1] * len(ids))]

    def read(files: Files, part: dict[str, Any]) -> Reading:
        return Reading(pieces(files, part["columns"] or ["text"]))

    tokens_NL, _, about = fill(context, texts, mix, read, sequences=sequences, length=length, group=group)
    np.save(context.out / TOKENS, tokens_NL)
    (context.out / "tokens.json").write_text(json.dumps(about, indent=1) + "\n")


def tokenizer_in(context: Context, config: Artifact, files: Artifact) -> Any:
    """The tokenizer, with its chat template, among the files that travel with a checkpoint."""
    from transformers import AutoTokenizer

    folder = context.scratch / "tokenizer"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(read_config(config)))
    for name in files.names():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(files.read(name, 0, files.size(name)))
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
