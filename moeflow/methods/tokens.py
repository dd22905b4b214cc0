"""Text into a matrix of token ids, `tokens.npy`, int32 [sequences, length]: sampled from texts and packed, or given ready-made."""

import io
import json
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from moeflow.methods.fetch import Model
from moeflow.methods.packing import reader
from moeflow.model.layout import read_config
from moeflow.model.spec import RestSpec, TokensSpec
from moeflow.step import Artifact, Context, Spec, Step, step

TOKENS = "tokens.npy"
LARGE = 64 << 20  # bytes from which a file is fetched by a step of its own


class Texts(Protocol):
    """Sources of text with their columns and weights, pinned on first use, as `moeflow.store` makes them."""

    @property
    def is_tokens(self) -> bool: ...
    def entries(self) -> Any: ...


def of(
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
    return sample(
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


@step("tokens.matrix", version=1, spec=_matrix_spec)
def matrix(context: Context, given: Artifact, *, shape: list[int]) -> None:
    """A ready-made matrix of token ids."""
    ids = np.load(given.file(given.names()[0]), allow_pickle=False)
    if list(ids.shape) != shape:
        raise ValueError(f"the matrix has shape {ids.shape}, not {tuple(shape)}; it changed, run again")
    if ids.min() < 0 or ids.max() >= 2**31:
        raise ValueError(f"token ids reach from {ids.min()} to {ids.max()}; they must lie between 0 and 2**31")
    np.save(context.out / TOKENS, ids.astype(np.int32))


def _sample_spec(
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


@step("tokens.sample", version=1, spec=_sample_spec)
def sample(
    context: Context, config: Artifact, tokenizer_from: Artifact, *texts: Artifact,
    mix: list[dict[str, Any]], sequences: int, length: int, seed: int, bos: bool, eos: bool, group: int,
) -> None:  # fmt: skip
    """`tokens.npy`, and `tokens.json`, which says how many sequences and documents each text gave.

    Raises ValueError where a column is missing or there is too little text, saying how much is missing.
    """
    from moeflow.methods.packing import Files, Piece, Reading, edges, fill, named, table, words

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
