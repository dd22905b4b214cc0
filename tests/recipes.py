"""A recipe of fine-tuning for tests of its parts."""

from moeflow.methods.finetune.recipe import Recipe

RECIPE = Recipe(
    mode="full", mix=0.0, targets=(), rank=0, alpha=0.0, steps=100, batch=16, rate=1e-4, warmup=3, floor=0.0, decay=0.0, clip=1.0,
    betas=(0.9, 0.999), epsilon=1e-8, dtype="float32", every=100, keep="last", seed=0,
)  # fmt: skip
