"""A checkpoint in vLLM, in this process, and what transformers says of the same tokens."""

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import moeflow  # noqa: F401  transformers then loads compressed checkpoints

PROMPTS = [[5, 17, 40, 8, 61], [9, 3, 77, 30, 22, 14, 50, 51, 52], [88, 12], [33, 34, 60, 7, 7, 7, 21]]
STEPS = 16


@contextmanager
def served(folder: Path, **options: Any) -> Iterator[Any]:
    """vLLM with this checkpoint, in fp32."""
    from vllm import LLM

    small = dict(max_model_len=512, max_num_seqs=8, gpu_memory_utilization=0.1, enable_prefix_caching=False, enforce_eager=True)
    engine = LLM(model=str(folder), **(small | {"dtype": "float32", "skip_tokenizer_init": True} | options))
    try:
        yield engine
    finally:
        del engine
        gc.collect()


def greedy(engine: Any) -> list[Any]:
    """What vLLM writes after each prompt, with the log-probabilities of the five likeliest tokens at each step."""
    from vllm import SamplingParams

    how = SamplingParams(temperature=0, max_tokens=STEPS, logprobs=5, ignore_eos=True, detokenize=False)
    return [out.outputs[0] for out in engine.generate([{"prompt_token_ids": p} for p in PROMPTS], how, use_tqdm=False)]


@torch.inference_mode()
def agreement(engine: Any, folder: Path) -> tuple[int, float]:
    """How many of vLLM's greedy tokens are those of transformers, and how far apart log-probabilities are at most."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    same, worst = 0, 0.0
    for prompt, written in zip(PROMPTS, greedy(engine), strict=True):
        ids = [*prompt, *written.token_ids]
        logs = model(torch.tensor([ids[:-1]])).logits[0, len(prompt) - 1 :].log_softmax(-1)
        same += int((logs.argmax(-1) == torch.tensor(written.token_ids)).sum())
        for log, likeliest in zip(logs, written.logprobs, strict=True):
            worst = max(worst, *(abs(float(log[i]) - one.logprob) for i, one in likeliest.items()))
    return same, worst


def way(engine: Any) -> str:
    """The way that the engine's model runs: "general", "native", or "stock" for a class that is not moeflow's."""
    (name,) = engine.apply_model(lambda model: type(model).__module__)
    return {"moeflow.serve.models": "general", "moeflow.serve.native": "native"}.get(name, "stock")


@contextmanager
def told() -> Iterator[list[str]]:
    """The lines that the plug-in logs inside."""
    lines: list[str] = []

    def kept(record: logging.LogRecord) -> bool:
        lines.append(record.getMessage())
        return True

    log = logging.getLogger("vllm.moeflow")
    log.addFilter(kept)  # vLLM takes handlers away where it sets up its own
    try:
        yield lines
    finally:
        log.removeFilter(kept)
