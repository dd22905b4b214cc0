"""A recipe of fine-tuning for tests of its parts."""

from moeflow.methods.finetune.recipe import Recipe

RECIPE = Recipe(mode="full", steps=100, batch=16, rate=1e-4, warmup=0.03, dtype="float32", keep="last")
