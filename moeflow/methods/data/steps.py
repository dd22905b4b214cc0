"""Turn text into token ids, `tokens.npy`, int32 [sequences, length]; for fine-tuning, with a mask of the learned tokens."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from moeflow.methods.data.chats import MESSAGES, chat_of, checked, kinds, prints_lists, rendered
from moeflow.methods.data.conversations import encoded, segments_of, tokenized
from moeflow.methods.data.looking import look
from moeflow.methods.data.matrices import matrix_of
from moeflow.methods.data.packing import LeftOut, Piece, Portion, Tally, edges, fill, words
from moeflow.methods.data.readers import Files, named, reader
from moeflow.methods.data.rows import Rows
from moeflow.methods.data.traffic import held, read, served
from moeflow.methods.data.traffic_rows import Served
from moeflow.methods.graph import LEARNED, TOKENS, Model, Sample
from moeflow.methods.rewrite import link_all
from moeflow.model.layout import read_config
from moeflow.model.spec import RestSpec, TokensSpec, TrafficSpec
from moeflow.options import check_choices
from moeflow.sources import Source, TextEntry, Texts
from moeflow.step import Artifact, Context, Spec, Step, step

CHATS = ("chat", "calls")  # formats that the chat template renders
CONFIG = "tokenizer_config.json"
PRINTED = "conversations whose content in parts the chat template prints as a list"
NO_TEMPLATE = (
    "the tokenizer has no chat template; put the chat_template.jinja of the model's chat version beside the checkpoint, or give "
    "prompts and responses (URI#prompt+response)"
)
LARGE = 64 << 20  # a file of at least this many bytes is fetched by its own step


@dataclass(frozen=True)
class Examples(Sample):
    """How much text is read for fine-tuning, and what its columns mean. Raises ValueError for invalid options.

    The formats are:

    - "text": columns joined by a space, every token learned;
    - "instruction": prompts, and last the response (`URI#query+response`, `URI#instruction+input+output`), in Alpaca's words
      (`conversations.instruction`); the response and the end-of-sequence token are learned;
    - "chat": one column of messages, "messages" if none is named, and maybe one of tools (`URI#messages+tools`), or prompts and
      last the response, as a question and its answer; in the tokenizer's own chat template, which alone decides about special
      tokens; the assistant's turns are learned;
    - "auto": what the name of a known data set says; else a column "messages" or "conversations" is a chat, several columns are an
      instruction, and one is text.
    """

    eos: bool = True
    """Put an end-of-sequence token after each document; it is learned."""
    format: Literal["auto", "text", "instruction", "chat"] = "auto"
    """What a text's columns mean; auto: follow the data set's name or its columns."""
    repeat: bool = False
    """Read a text that is too small again, each time in another order."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)


def tokens(texts: Texts, model: Model, sample: Sample) -> Step:
    """Build the token matrix of these texts with the model's own tokenizer. A ready-made `.npy` matrix is used unchanged.

    `traffic:FILE` is what an engine recorded of its requests: their token ids, if it has them, are the text, and how often it chose
    each expert goes with them.

    Documents are shuffled, tokenized one by one, joined, and cut into sequences. Conversations (`URI#messages`, with the tools that
    they call `URI#messages+tools`) are rendered by the model's chat template; what it refuses is left out and counted. Several
    texts are mixed by weight: each gives its share of the sequences, spread evenly over the matrix. Raises ValueError for texts
    that cannot be read, for a matrix with ids that the model lacks, and for sequences longer than the model's positions.
    """
    if texts.is_tokens:
        (entry,) = texts.entries()
        shape = matrix_of(entry.source, int(model.config["vocab_size"])).shape
        return matrix(entry.source.file(entry.source.files[0].name), shape=[*shape])
    if texts.is_traffic:
        (entry,) = texts.entries()
        of = served(model)
        what = held(entry.source, of)
        needed = sample.sequences * sample.length
        if what.ids and what.ids < needed:
            raise ValueError(
                f"{_where(entry.source)} has {what.ids:,} token ids, and {sample.sequences} sequences of {sample.length} need "
                f"{needed:,}; give fewer or shorter sequences, or more traffic"
            )
        cut = replace(sample, bos=False, eos=False) if what.ids else None
        return traffic(model.essential, _whole(entry.source), of=of, weighed=what.weighed, sample=cut)
    fetched, mix = _fetched(texts, model)
    return sample_tokens(model.essential, model.texts, fetched, mix=mix, sample=sample)


def examples(texts: Texts, model: Model, sample: Examples) -> Step:
    """Build the token matrix of these texts with the model's own tokenizer, and a mask of the learned tokens.

    Examples are shuffled, joined and cut; one that does not fit into a row continues in the next row, and so does its mask. Rows
    without learned tokens are skipped. Examples without a prompt or a response are left out, as are those that the chat template
    refuses; the artifact says how many. Several texts are mixed by weight, as in `tokens`. A ready-made `.npy` matrix is used
    whole, without a mask. Raises ValueError for columns that do not fit the format, and for rows that this model cannot read.
    """
    if texts.is_tokens:
        if sample.format in ("instruction", "chat"):
            raise ValueError(f"format={sample.format!r} needs text, and a ready-made matrix of tokens is none; leave format away")
        return tokens(texts, model, sample)
    if texts.is_traffic:
        made = tokens(texts, model, Sample(sample.sequences, sample.length, sample.seed))
        if not made.spec.output.sequences:
            raise ValueError(f"{made.spec.output.where}, and fine-tuning needs text; name one (tune.text=..., recover.text=...)")
        return made
    fetched, mix = _fetched(texts, model, sample.format)
    return sample_examples(model.essential, model.texts, fetched, mix=mix, sample=replace(sample, format="auto"))


def _fetched(texts: Texts, model: Model, format: str = "") -> tuple[tuple[Step, ...], tuple[Portion, ...]]:
    """For each text the step that has its files, and its portion of the mixture; `format` is one of `Examples`, or none.

    Raises ValueError if the model has no tokenizer, or no chat template where one is needed, if no reader knows a file, if
    conversations would be read as plain text, and for what a look at the text tells.
    """
    if not model.has_tokenizer:
        raise ValueError(f"{model.without_tokenizer}, so text cannot become tokens; pass a ready-made matrix (tokens=FILE.npy)")
    entries = texts.entries()
    total = sum(e.weight for e in entries)
    for entry in entries:
        for file in entry.source.files:
            reader(file.name)  # refuses files that no reader knows
        if not any(file.size for file in entry.source.files):
            raise ValueError(f"{_where(entry.source)} is empty; name a text that holds some")
        if entry.format in CHATS and format == "text":
            raise ValueError(f"{_where(entry.source)} holds conversations, not text; name a column of text (URI#column)")
    mix = tuple(_portion(e, e.weight / total, format) for e in entries)
    if any(part.format in CHATS for part in mix) and not model.has_template:
        raise ValueError(NO_TEMPLATE)
    for entry, part in zip(entries, mix, strict=True):
        look(entry.source, kinds(part.columns or ("text",), part.format), chat=part.format in CHATS)
    return tuple(_whole(e.source) for e in entries), mix


def _portion(entry: TextEntry, weight: float, format: str) -> Portion:
    """A text's portion; with a format, "auto" and absent columns are replaced by what they stand for."""
    columns = entry.columns
    by_columns = "chat" if columns and columns[0] in MESSAGES else "instruction" if columns[1:] else "text"
    if not format:  # for calibration, where columns of text are joined
        format = next((f for f in (entry.format, by_columns) if f in CHATS), "")
    elif format == "auto":
        format = entry.format or by_columns
    if format == "instruction" and len(columns) < 2:
        raise ValueError(
            f"{_where(entry.source)}: an instruction needs the column of a prompt and that of the response, but it names "
            f"{', '.join(columns) or 'none'}; write URI#query+response"
        )
    if format == "chat" and columns[2:] and columns[0] in MESSAGES:
        raise ValueError(f"{_where(entry.source)}: beside {columns[0]} there may be a column of tools, and not {columns[2]}")
    return Portion(weight, columns or (MESSAGES[0] if format == "chat" else "text",) * bool(format), format)


def _where(source: Source) -> str:
    """A text's first file and where it lies, for messages."""
    return f"{source.files[0].name} at {source.uri}"


def _whole(source: Source) -> Step:
    """The step with all files of a text: each large file is fetched by its own step, so that its download can resume."""
    large = [f.name for f in source.files if f.size > LARGE]
    small = [f.name for f in source.files if f.size <= LARGE]
    parts = [source.file(name) for name in large] + ([source.group(small)] if small else [])
    return parts[0] if len(parts) == 1 else text(tuple(parts))


def _text_spec(parts: tuple[Any, ...]) -> Spec:
    return Spec({"files": {name: size for part in parts for name, size in part["files"].items()}})


@step("data.text", version=1, spec=_text_spec)
def text(context: Context, parts: tuple[Artifact, ...]) -> None:
    """All files of one text, fetched by several steps, in one folder; no bytes are moved."""
    for part in parts:
        link_all(context, part)


def _files(text: Artifact) -> Files:
    """The files of a text in the order in which they are read: large ones first, then the small ones, each by name."""
    return [(name, text.file(name)) for name in sorted(text.names(), key=lambda name: (text.size(name) <= LARGE, name))]


def _matrix_spec(file: Any, *, shape: list[int]) -> Spec:
    size = shape[0] * shape[1]
    return Spec(TokensSpec(*shape), reads=size * 8, writes=size * 4 + 128, memory=size * 12)


@step("data.matrix", version=1, spec=_matrix_spec)
def matrix(context: Context, file: Artifact, *, shape: list[int]) -> None:
    """A ready-made matrix of token ids as int32. Raises ValueError if its shape has changed, and for ids outside int32."""
    ids = np.load(file.file(file.names()[0]), allow_pickle=False)
    if list(ids.shape) != shape:
        raise ValueError(f"the matrix has shape {ids.shape}, not {tuple(shape)}; it changed, run again")
    if ids.min() < 0 or ids.max() >= 2**31:
        raise ValueError(f"token ids reach from {ids.min()} to {ids.max()}; they must lie between 0 and 2**31")
    np.save(context.out / TOKENS, ids.astype(np.int32))


def _traffic_spec(rest: RestSpec, file: Any, *, of: Served, weighed: bool, sample: Sample | None) -> Spec:
    names = ("count_E", "tokens", "together_EE", *(["weight_E"] if weighed else []))
    shape = (sample.sequences, sample.length) if sample else (0, 0)
    _check_length(rest, shape[1])
    reads = sum(file["files"].values())
    writes = shape[0] * shape[1] * 4 + 500 + sum(500 + 8 * n * (n + 2) for _, n in of.experts)
    spec = TrafficSpec(*shape, names, of.experts, min(file["files"]))
    return Spec(spec, reads=reads, writes=writes, operations={"text": reads}, memory=6 * reads + writes + (1 << 27))


@step("data.traffic", version=1, spec=_traffic_spec)
def traffic(context: Context, config: Artifact, text: Artifact, *, of: Served, weighed: bool, sample: Sample | None) -> None:
    """For each MoE layer, how often an engine chose each expert, and each with each other: a file as a pass of the model has it.

    With `sample`, also the token matrix of its requests: each is a document, and they are shuffled, joined and cut as texts are.
    """
    files = _files(text)
    recorded = read(files, of)
    if recorded.weighed != weighed:
        raise ValueError(f"{named(files)} has changed; run again")
    recorded.write(context.out)
    if sample is None:
        return
    order = np.random.default_rng(sample.seed).permutation(len(recorded.documents))

    def documents(files: Files, part: Portion, tally: Tally) -> Iterator[list[Piece]]:
        for i in order:
            ids = list(recorded.documents[i])
            yield [(ids, [1] * len(ids))]

    fill(context, [files], (Portion(1.0),), documents, sample, "give fewer or shorter sequences, or more traffic")


def _check_length(rest: RestSpec, length: int) -> None:
    positions = rest.config.get("max_position_embeddings")
    if positions and length > positions:
        raise ValueError(f"length={length} is more than the model's {positions} positions; make sequences shorter")


def _rows_spec(
    rest: RestSpec, tokenizer: Any, texts: tuple[Any, ...], *, mix: Sequence[Portion], sample: Sample, masked: bool = False
) -> Spec:
    _check_length(rest, sample.length)
    reads = sum(sum(t["files"].values()) for t in (tokenizer, *texts))
    made = TokensSpec(sample.sequences, sample.length, masked=masked)
    return Spec(made, reads=reads, writes=made.nbytes + 300 * len(mix), operations={"text": reads}, memory=4 * reads)


@step("data.tokens", version=2, spec=_rows_spec)
def sample_tokens(
    context: Context, config: Artifact, tokenizer_from: Artifact, texts: tuple[Artifact, ...],
    *, mix: tuple[Portion, ...], sample: Sample,
) -> None:  # fmt: skip
    """Write `tokens.npy`, and `tokens.json`, which says how many sequences and documents came from each text.

    Raises ValueError if a column is missing, or if there is too little text; the message says how much is missing.
    """
    tokenizer = tokenizer_in(context, config, tokenizer_from)
    _check_template(tokenizer, mix)
    first, last = _edges(tokenizer, tokenizer_from, mix, sample)

    def documents(files: Files, part: Portion, tally: Tally) -> Iterator[list[Piece]]:
        columns = kinds(part.columns or ("text",), part.format)
        for row in _read(context, files, columns).shuffled(sample.seed):
            try:
                if part.format in CHATS:
                    chat = chat_of(row, columns)
                    text = rendered(tokenizer, chat)
                    ids = tokenized(tokenizer, text)
                    if prints_lists(chat, text):
                        tally.remarks[PRINTED] += 1
                else:
                    text = " ".join(words(value) for value in row.values() if value is not None)
                    ids = [*first, *tokenized(tokenizer, text), *last]
            except LeftOut as why:
                tally.leave_out(why)
                continue
            yield [(ids, [1] * len(ids))]

    fill(context, [_files(t) for t in texts], mix, documents, sample)


@step("data.examples", version=2, spec=partial(_rows_spec, masked=True))
def sample_examples(
    context: Context, config: Artifact, tokenizer_from: Artifact, texts: tuple[Artifact, ...],
    *, mix: tuple[Portion, ...], sample: Examples,
) -> None:  # fmt: skip
    """`tokens.npy` int32 [sequences, length]; `learned.npy` uint8, 1 where that token counts in the loss; `tokens.json`.

    The mask is at the token's own position; training shifts both by one. `tokens.json` says how many sequences and examples came
    from each text, and what was left out. Raises ValueError if a column is missing or has the wrong type, if the tokenizer lacks a
    chat template that a text needs, and if there is too little text.
    """
    tokenizer = tokenizer_in(context, config, tokenizer_from)
    _check_template(tokenizer, mix)
    first, last = _edges(tokenizer, tokenizer_from, mix, sample)

    def documents(files: Files, part: Portion, tally: Tally) -> Iterator[list[Piece]]:
        columns = kinds(part.columns, part.format)
        rows = _read(context, files, columns)
        for turn in range(sample.sequences * sample.length if sample.repeat else 1):  # every turn yields at least one token
            used = 0
            for row in rows.shuffled(sample.seed + turn):
                try:
                    segments = segments_of(tokenizer, row, columns, part.format)
                    pieces = [framed(*encoded(tokenizer, text), part.format) for text in segments]
                except LeftOut as why:
                    if turn == 0:  # counted once, however often the text is read
                        tally.leave_out(why)
                    continue
                used += 1
                yield pieces
            if not used:
                break

    def framed(ids: list[int], learned: list[int], format: str) -> Piece:
        if format in CHATS:
            return ids, learned
        return [*first, *ids, *last], [int(format == "text")] * len(first) + learned + [1] * len(last)

    otherwise = "give more text, fewer sequences or another weight, or read it again (repeat=True)"
    np.save(context.out / LEARNED, fill(context, [_files(t) for t in texts], mix, documents, sample, otherwise))


def _read(context: Context, files: Files, columns: dict[str, str]) -> Rows:
    """The rows of a text; `columns`: what each holds. A file may lack the column of tools."""
    path = context.scratch / f"rows-{len([*context.scratch.iterdir()])}"
    tools = tuple(c for c, kind in columns.items() if kind == "tools")
    return Rows(files, tuple(columns), path, partial(checked, columns), optional=tools)


def _check_template(tokenizer: Any, mix: Sequence[Portion]) -> None:
    if any(part.format in CHATS for part in mix) and not tokenizer.chat_template:
        raise ValueError(NO_TEMPLATE)


def _edges(tokenizer: Any, files: Artifact, mix: Sequence[Portion], sample: Sample) -> tuple[list[int], list[int]]:
    """The tokens before and after every document that no chat template renders; see `Sample.bos`."""
    if all(part.format in CHATS for part in mix):
        return [], []
    bos = sample.bos
    if bos is None:
        config = json.loads(bytes(files.read(CONFIG, 0, files.size(CONFIG)))) if CONFIG in files.names() else {}
        bos = tokenizer.bos_token_id is not None and config.get("add_bos_token") is not False
    return edges(tokenizer, bos=bos, eos=sample.eos)


def tokenizer_in(context: Context, config: Artifact, files: Artifact) -> Any:
    """Load the tokenizer, with its chat template, from a checkpoint's small files."""
    from transformers import AutoTokenizer

    folder = context.scratch / "tokenizer"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(read_config(config)))
    for name in files.names():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(files.read(name, 0, files.size(name)))
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
