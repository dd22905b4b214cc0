"""Text for fine-tuning: a matrix of token ids with a mask of those that are learned, sampled from texts of several formats."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from moeflow.methods import tokens
from moeflow.methods.fetch import Model
from moeflow.model.spec import RestSpec
from moeflow.step import Artifact, Context, Spec, Step, step

LEARNED = "learned.npy"
FORMATS = ("auto", "text", "instruction", "chat")
MESSAGES = ("messages", "conversations")  # columns that hold a conversation


def of(
    texts: tokens.Texts, model: Model, *, sequences: int, length: int, seed: int = 0, format: str = "auto", bos: bool = True,
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
        return tokens.of(texts, model, sequences=sequences, length=length)
    files, mix = tokens.gathered(texts, model, chat=format != "text")
    return sample(
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


def _sample_spec(
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
    return tokens.rows_spec(rest, tokenizer, *files, sequences=sequences, length=length, texts=len(mix), marked=True)


@step("examples.sample", version=1, spec=_sample_spec)
def sample(
    context: Context, config: Artifact, tokenizer_from: Artifact, *texts: Artifact,
    mix: list[dict[str, Any]], sequences: int, length: int, seed: int, bos: bool, eos: bool, repeat: bool,
) -> None:  # fmt: skip
    """`tokens.npy` int32 [sequences, length]; `learned.npy` uint8, 1 where that token counts in the loss; `tokens.json`.

    The mask stands at the token's own position: whoever trains shifts both. `tokens.json` says how many sequences and examples
    each text gave, and what was left out. Raises ValueError where a column is missing or of another kind, where the tokenizer
    lacks a chat template that a text needs, and where there is too little text, saying how much is missing.
    """
    from moeflow.methods.conversations import LeftOut, encoded, segments_of
    from moeflow.methods.packing import Files, Piece, Reading, edges, fill, named, table

    tokenizer = tokens.tokenizer_in(context, config, tokenizer_from)
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
    np.save(context.out / tokens.TOKENS, tokens_NL)
    np.save(context.out / LEARNED, learned_NL)
    (context.out / "tokens.json").write_text(json.dumps(about, indent=1) + "\n")
