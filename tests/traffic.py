"""What a serving engine records of its requests, made for tests from transformers' own routing."""

import base64
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from moeflow.arch import Family
from moeflow.model.router import Router
from moeflow.model.skeleton import layers_of


@torch.inference_mode()
def routed(folder: Path, ids_NL: np.ndarray) -> np.ndarray:
    """The experts that transformers sends each token to, [N, L, layers, k], where the router is a softmax without a bias."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    family = Family.of(model.config.to_dict())
    chosen: dict[int, torch.Tensor] = {}
    for i in family.moe_layers:
        router = layers_of(model)[i].get_submodule(f"{family.arch.block}.{family.arch.block_router}")
        router.register_forward_hook(lambda _, args, out, i=i: chosen.__setitem__(i, Router.of(family, 8).choose(out[0])[1]))
    each = []
    for ids_L in torch.from_numpy(ids_NL.astype(np.int64)):
        model(ids_L[None])
        each.append(torch.stack([chosen[i] for i in family.moe_layers], 1).numpy())
    return np.stack(each)


def sglang(array: np.ndarray) -> str:
    return base64.b64encode(array.astype("<i4").tobytes()).decode()


def vllm(array: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, array.astype(np.uint8))
    return base64.b64encode(file.getvalue()).decode()


def generate(ids: Iterable[int], experts_TLk: np.ndarray, prompt: int = 3) -> dict[str, Any]:
    """A request of SGLang's /generate and its answer, as one object: the last token was never an input."""
    ids = [*map(int, ids)]
    about = {"prompt_tokens": prompt, "completion_tokens": len(ids) - prompt, "routed_experts": sglang(experts_TLk)}
    return {"input_ids": ids[:prompt], "output_ids": ids[prompt:], "meta_info": about, "text": "..."}


def completion(ids: Iterable[int], experts_TLk: np.ndarray, prompt: int = 3) -> dict[str, Any]:
    """An answer of vLLM's /v1/completions, with `return_token_ids`."""
    ids = [*map(int, ids)]
    choice = {"prompt_token_ids": ids[:prompt], "token_ids": ids[prompt:], "routed_experts": vllm(experts_TLk)}
    return {"object": "text_completion", "choices": [choice | {"index": 0, "text": "..."}]}


def sums(counts: dict[int, list[float]], tokens: int, **changes: Any) -> dict[str, Any]:
    """The file of sums of the small model that has these counts, of tokens that all have one expert more than the counted ones."""
    layers = {}
    for i, count in counts.items():
        together = np.diag(count)
        layers[str(i)] = {"tokens": tokens, "counts": count, "together": together.tolist(), "weights": [c / 2 for c in count]}
    own = {"moeflow_traffic": 1, "model_type": "mixtral", "top_k": 2, "hidden_size": 64, "vocab_size": 512}
    return own | {"layers": layers} | changes


def lines(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
