"""Text into a matrix of token ids, `tokens.npy`, int32 [sequences, length]: sampled from texts and packed, or given ready-made."""

import io
import json
import os
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moeflow.methods.fetch import Model
from moeflow.model.layout import read_config
from moeflow.model.spec import RestSpec, TokensSpec
from moeflow.step import Artifact, Context, Spec, Step, step

TOKENS = "tokens.npy"
LARGE = 64 << 20  # bytes from which a file is fetched by a step of its own
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text", ".py": "text", ".md": "text", ".csv": "csv"}
"""Which reader of `datasets` a file needs, by its ending (before .gz, .zst and the like)."""


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
    if not model.has_tokenizer:
        raise ValueError("the model has no tokenizer, so text cannot become tokens; pass a ready-made matrix (tokens=FILE.npy)")
    entries = texts.entries()
    total = sum(e.weight for e in entries)
    if total <= 0:
        raise ValueError("the weights of the texts must sum to more than 0")
    for name in (f.name for e in entries for f in e.source.files):
        _reader(name)  # refuse here what no reader knows
    parts = [_fetched(e.source) for e in entries]
    mix = [
        {"columns": list(e.columns), "weight": e.weight / total, "inputs": len(steps)}  # not where it lies: that is no recipe
        for e, steps in zip(entries, parts, strict=True)
    ]
    return sample(
        model.essential,
        model.texts,
        *(s for steps in parts for s in steps),
        mix=mix,
        sequences=sequences,
        length=length,
        seed=seed,
        bos=bos,
        eos=eos,
        group=group,
    )


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
    if sequences < 1 or length < 2:
        raise ValueError(f"sequences={sequences} of length={length}: there must be at least one, of at least two tokens")
    positions = rest.config.get("max_position_embeddings")
    if positions and length > positions:
        raise ValueError(f"length={length} is more than the model's {positions} positions; make sequences shorter")
    reads = sum(sum(f["files"].values()) for f in (tokenizer, *files))
    return Spec(TokensSpec(sequences, length), reads=reads, writes=sequences * length * 4 + 128 + 300 * len(mix), memory=4 * reads)


@step("tokens.sample", version=1, spec=_sample_spec)
def sample(
    context: Context, config: Artifact, tokenizer_from: Artifact, *texts: Artifact,
    mix: list[dict[str, Any]], sequences: int, length: int, seed: int, bos: bool, eos: bool, group: int,
) -> None:  # fmt: skip
    """`tokens.npy`, and `tokens.json`, which says how many sequences and documents each text gave.

    Raises ValueError where a column is missing or there is too little text, saying how much is missing.
    """
    tokenizer = _tokenizer(context, config, tokenizer_from)
    shares = _shares([m["weight"] for m in mix], sequences)
    parts, about, done, inputs = [], [], 0, iter(texts)
    for part, share in zip(mix, shares, strict=True):
        files = [(name, text.file(name)) for text in islice(inputs, part["inputs"]) for name in text.names()]
        rows: list[list[int]] = []
        documents = 0
        for block, used in _packed(_documents(context, files, part, seed), tokenizer, length, bos=bos, eos=eos, group=group):
            if len(rows) == share:
                break
            rows.append(block)
            documents = used
            context.progress(done + len(rows), sequences, "sequences")
        if len(rows) < share:
            raise ValueError(
                f"{_named(files)} gives {len(rows)} of {share} sequences of {length} tokens: "
                f"{(share - len(rows)) * length:,} tokens are missing; give more text, fewer sequences or another weight"
            )
        done += len(rows)
        parts.append(rows)
        names = [os.path.basename(n) for n, _ in files]
        about.append({"files": names, "columns": part["columns"], "sequences": share, "documents": documents})
    np.save(context.out / TOKENS, np.array(_interleaved(parts), dtype=np.int32).reshape(sequences, length))
    (context.out / "tokens.json").write_text(json.dumps(about, indent=1) + "\n")


def _named(files: list[tuple[str, Path]]) -> str:
    """A text in a message: its files, or the first of them."""
    return files[0][0] + (f" and {len(files) - 1} more files" if files[1:] else "")


def _tokenizer(context: Context, config: Artifact, files: Artifact) -> Any:
    from transformers import AutoTokenizer

    folder = context.scratch / "tokenizer"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(read_config(config)))
    for name in files.names():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(files.read(name, 0, files.size(name)))
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _documents(context: Context, files: list[tuple[str, Path]], part: dict[str, Any], seed: int) -> Iterator[str]:
    """The documents of one text, in an order that depends on the seed alone."""
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")  # the files are here already
    from datasets import concatenate_datasets, load_dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    by_reader: dict[str, list[str]] = {}
    folder = Path(tempfile.mkdtemp(dir=context.scratch))
    for i, (name, path) in enumerate(files):  # readers go by a file's ending, and blobs have none
        link = folder / f"{i:05d}-{os.path.basename(name)}"
        link.symlink_to(path)
        by_reader.setdefault(_reader(name), []).append(str(link))
    sets = []
    for reader, named in by_reader.items():
        options: dict[str, Any] = {"sample_by": "document"} if reader == "text" else {}
        found = load_dataset(reader, data_files=named, split="train", cache_dir=str(context.scratch), **options)
        columns = part["columns"] or ["text"]
        if missing := [c for c in columns if c not in found.column_names]:
            has = ", ".join(found.column_names)
            raise ValueError(f"{_named(files)} has no column {missing[0]!r}; it has: {has} (write URI#column)")
        sets.append(found.select_columns(columns))
    for row in concatenate_datasets(sets).shuffle(seed=seed):
        yield " ".join(str(v) for v in row.values() if v is not None)


def _reader(name: str) -> str:
    stem = name
    for packed in (".gz", ".zst", ".xz", ".bz2"):
        stem = stem.removesuffix(packed)
    ending = os.path.splitext(stem)[1]
    if ending not in READERS:
        raise ValueError(f"{name} is no text that can be read; known endings: {', '.join(READERS)}")
    return READERS[ending]


def _packed(
    documents: Iterator[str], tokenizer: Any, length: int, *, bos: bool, eos: bool, group: int
) -> Iterator[tuple[list[int], int]]:
    """Rows of `length` tokens, each with the number of documents read so far."""
    if bos and tokenizer.bos_token_id is None:
        raise ValueError("the tokenizer has no beginning-of-sequence token; pass bos=False")
    if eos and tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-sequence token; pass eos=False")
    held: list[int] = []
    for count, document in enumerate(documents, 1):
        ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        held += [tokenizer.bos_token_id] * bos + ids + [tokenizer.eos_token_id] * eos
        while len(held) >= length:
            yield held[:length], count
            held = held[length:]
        if group and count % group == 0:
            held = []


def _shares(weights: list[float], total: int) -> list[int]:
    """Whole numbers in proportion to the weights that sum to `total` (largest remainders)."""
    exact = [w * total for w in weights]
    shares = [int(e) for e in exact]
    for i in sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])[: total - sum(shares)]:
        shares[i] += 1
    return shares


def _interleaved(parts: list[list[list[int]]]) -> list[list[int]]:
    """All rows, those of each part spread evenly, so that any run of rows holds the mixture."""
    placed = [((i + 0.5) / len(rows), p, row) for p, rows in enumerate(parts) for i, row in enumerate(rows)]
    return [row for _, _, row in sorted(placed, key=lambda at: at[:2])]
