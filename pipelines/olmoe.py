"""OLMoE-1B-7B with Compressed Experts (He et al., EMNLP Findings 2025, arXiv 2503.00634): four experts a token, not eight.

    ray job submit --working-dir . -- python pipelines/olmoe.py --store s3://bucket/prefix -p processes=8 -p device_memory=80e9

The constants are the paper's: half of a token's experts are computed, three vectors stand for each of the others, and everything is
trained together: AdamW at 2e-5 with a cosine and 3 % of warm-up, 128 sequences of 4,096 tokens a step, two epochs. The paper trains
on one text for each task; `-p text=magicoder` or `tulu3` are its others. Active parameters fall from 1.28 B to 879 M, counted from
the configuration; the paper prints 878 M.

What moeflow puts beside it: `-p train=compressed_experts` trains the vectors alone, `-p loss=kl` distils from the original.
"""

from typing import Literal

from mixtral import WIKITEXT2

from moeflow.cli import main
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data_
from moeflow.methods.fewer_active import steps as fewer_active
from moeflow.methods.finetune.recipe import Gang, Recipe
from moeflow.methods.graph import Pass, Sample
from moeflow.methods.recipes import compare, tune
from moeflow.sources import Source, Texts
from moeflow.step import Step


def build(
    model: Source = "allenai/OLMoE-1B-7B-0924",
    *,
    text: Texts = Texts("mathinstruct"),
    heldout: Texts = Texts(WIKITEXT2),
    computed: int | None = None,
    form: Literal["three", "one"] = "three",
    train: str = "full",
    loss: str = "lm",
    rows: int = 12_800,
    length: int = 4096,
    batch: int = 128,
    epochs: float = 2,
    rate: float = 2e-5,
    warmup: float = 0.03,
    bos: bool = False,
    heldout_sequences: int = 64,
    processes: int = 1,
    zero: int = 3,
    micro: int = 0,
    offload: bool = False,
    device_memory: float = 0,
    deepspeed: str = "",
    dtype: str = "auto",
    seed: int = 42,
) -> Step:
    original = checkpoint.pinned(model)
    data = data_.examples(text, original, data_.Examples(rows, length, seed=seed, bos=bos, repeat=True))
    attached = fewer_active.attach(original, fewer_active.CompressedExperts(computed, form))
    how = Recipe(mode=train, loss=loss, epochs=epochs, batch=batch, rate=rate, warmup=warmup, dtype=dtype, seed=seed)
    gang = Gang(processes, zero=zero, micro=micro, offload=offload, checkpointing=True, device_memory=device_memory)
    tuned = tune.tune(attached, data, how, teacher=original, passed=Pass(dtype=dtype), gang=gang, deepspeed=deepspeed or None)
    judged = Sample(heldout_sequences, length), Pass(8, 64, dtype=dtype)
    reports = compare.compare(original, tuned.model, heldout, *judged, tokens=data)
    return checkpoint.checkpoint_of(tuned.model).reporting(*tuned.reports, *reports)


if __name__ == "__main__":
    main(build)
