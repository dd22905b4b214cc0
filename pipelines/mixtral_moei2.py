"""Mixtral 8x7B by MoE-I² (Yang et al., EMNLP Findings 2024, arXiv 2411.01016): fewer experts, and then low-rank ones.

    ray job submit --working-dir . -- python pipelines/mixtral_moei2.py --store s3://bucket/prefix --gpus 1

The constants are the paper's: a quarter of the experts goes, layer by layer as their importance says, found by a genetic search
(population 100, 50 generations) and chosen in blocks of T=3 layers among K=3 sets each; what remains is cut to about half of the
experts' parameters by singular values, at ranks by importance with alpha 0.15. 2,048 sequences of 2,048 tokens of C4. Then LoRA on
Alpaca, of which the paper's rank, rate and epochs were not at hand: those here are usual ones; `-p tune=none` leaves it out.

What moeflow puts beside it: `-p counts=exact -p search=swap -p block=1 -p svd=whitened -p ranks=global`.
"""

from functools import partial
from typing import Literal

from mixtral import C4, MODEL, WIKITEXT2

from moeflow.cli import main
from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data_
from moeflow.methods.decompose.options import Decomposition
from moeflow.methods.finetune.recipe import Gang, Recipe
from moeflow.methods.graph import Pass, Sample
from moeflow.methods.prune.counts import Counts
from moeflow.methods.prune.searches import Search
from moeflow.methods.recipes import compare, moei2
from moeflow.methods.recipes import tune as tune_
from moeflow.sources import Source, Texts
from moeflow.step import Step


def build(
    model: Source = MODEL,
    *,
    tokens: Texts = Texts(C4),
    heldout: Texts = Texts(WIKITEXT2),
    dropped: float = 0.25,
    removed: float = 0.5,
    counts: Literal["uniform", "paper", "exact"] = "paper",
    search: str = "genetic",
    importance: Literal["recon", "lm_loss"] = "lm_loss",
    best: int = 3,
    block: int = 3,
    inputs: Literal["original", "progressive"] = "original",
    population: int = 100,
    generations: int = 50,
    legal: tuple[int, ...] = (),
    divisor: int = 1,
    svd: Literal["vanilla", "whitened"] = "vanilla",
    ranks: Literal["uniform", "paper", "global"] = "paper",
    alpha: float = 0.15,
    multiple: int = 1,
    least: int = 1,
    rare: Literal["weights", "keep"] = "weights",
    sequences: int = 2048,
    length: int = 2048,
    batch: int = 8,
    record: int = 65_536,
    measured: int = 16_384,
    per_expert: int = 64,
    bos: bool = True,
    tune: str = "lora",
    text: Texts = Texts("alpaca"),
    rows: int = 4096,
    rank: int = 8,
    rate: float = 1e-4,
    epochs: float = 2,
    tuned_batch: int = 64,
    processes: int = 1,
    zero: int = 3,
    offload: bool = False,
    device_memory: float = 0,
    heldout_sequences: int = 64,
    dtype: str = "auto",
    seed: int = 42,
) -> Step:
    original = checkpoint.pinned(model)
    matrix = data_.tokens(tokens, original, Sample(sequences, length, seed=seed, bos=bos, group=1000))
    recorded = Pass(batch=batch, stage=3, record=record, per_expert=per_expert, dtype=dtype)
    seen = calibrate.run(original, matrix, recorded)
    pruned = moei2.prune(
        seen,
        Counts(1 - dropped, rule=counts, importance=importance, legal=legal, divisor=divisor, measured=measured),
        Search(search, seed=seed, best=best, block=block, inputs=inputs, population=population, generations=generations),
    )
    again = calibrate.run(pruned, matrix, recorded)
    cut = Decomposition(
        ratio=moei2.ratio_left(removed, dropped), ranks=ranks, svd=svd, importance=importance, alpha=alpha,
        multiple=multiple, least=least, rare=rare, measured=measured,
    )  # fmt: skip
    small = moei2.decompose(again, cut)
    data = partial(data_.examples, text, original, data_.Examples(rows, length, seed=seed, bos=bos, repeat=True))
    how = None if tune == "none" else Recipe(
        mode=tune, rank=rank, epochs=epochs, batch=tuned_batch, rate=rate, dtype=dtype, seed=seed
    )  # fmt: skip
    gang = Gang(processes, zero=zero, offload=offload, checkpointing=True, device_memory=device_memory)
    tuned = tune_.tune(small, data, how, gang=gang)
    reports = compare.compare(
        original, tuned.model, heldout, Sample(heldout_sequences, length), Pass(batch, 8 * batch, dtype=dtype), tokens=matrix
    )
    return checkpoint.checkpoint_of(tuned.model).reporting(*tuned.reports, *reports)


if __name__ == "__main__":
    main(build)
