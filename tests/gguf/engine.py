"""A model.gguf in llama.cpp, in this process and in fp32, held against transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

PROMPTS = [[5, 17, 40, 8, 61], [9, 3, 77, 30, 22, 14, 50, 51, 52], [88, 12], [33, 34, 60, 7, 7, 7, 21]]
STEPS = 16
ALL = len(PROMPTS) * STEPS
FP32 = 0
"""llama.cpp's number for the type; it keeps keys and values in 16 bits otherwise."""


def opened(file: Path) -> Any:
    from llama_cpp import Llama

    return Llama(
        str(file), n_ctx=512, logits_all=True, n_threads=1, n_threads_batch=1, type_k=FP32, type_v=FP32, flash_attn=False,
        verbose=False,
    )  # fmt: skip


def greedy(model: Any, prompt: list[int]) -> tuple[list[int], np.ndarray]:
    """The tokens that llama.cpp writes behind a prompt, and the log-probabilities before each of them."""
    model.reset()
    written, logs = [], []
    model.eval(prompt)
    for _ in range(STEPS):
        logits = torch.from_numpy(model.scores[model.n_tokens - 1].copy())
        logs.append(logits.log_softmax(-1).numpy())
        written.append(int(logits.argmax()))
        model.eval(written[-1:])
    return written, np.stack(logs)


@torch.inference_mode()
def agreement(file: Path, reference: Path) -> tuple[int, float]:
    """How many of llama.cpp's greedy tokens are those of transformers, and how far apart log-probabilities are at most."""
    theirs, ours = opened(file), AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32).eval()
    same, worst = 0, 0.0
    for prompt in PROMPTS:
        written, logs = greedy(theirs, prompt)
        own = ours(torch.tensor([[*prompt, *written[:-1]]])).logits[0, len(prompt) - 1 :].log_softmax(-1)
        same += int((own.argmax(-1) == torch.tensor(written)).sum())
        worst = max(worst, float((own - torch.from_numpy(logs)).abs().max()))
    theirs.close()
    return same, worst
