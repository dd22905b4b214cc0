"""llm-compressor on one model, in an environment of its own: `peer_llmcompressor.py METHOD MODEL TOKENS OUT`.

METHOD is reap, reap-basic, gptq or awq, MODEL and OUT are folders of checkpoints, TOKENS is a .npy of token ids, [sequences,
length]. It takes sequence by sequence, as llm-compressor's examples do; an expert sees the tokens that are routed to it and no
others, which llm-compressor advises for REAP, and which the other peers do. All run in its default pipeline, layer by layer behind
the compressed ones, but reap-basic, which runs the whole model: with these versions the default one leaves out the attention's
causal mask.
"""

import sys

import numpy as np
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import load_quantizable_moe
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from transformers import AutoModelForCausalLM

WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
EXPERTS = {"experts": {"targets": [r"re:.*experts\.\d+\.(gate|up|down)_proj$"], "weights": WEIGHTS}}
RECIPES = {
    "reap": lambda: [REAPPruningModifier(sparsity=0.25)],
    "reap-basic": lambda: [REAPPruningModifier(sparsity=0.25)],
    "gptq": lambda: [GPTQModifier(config_groups=EXPERTS)],
    "awq": lambda: [AWQModifier(), QuantizationModifier(config_groups=EXPERTS)],
}


def main(method: str, model: str, tokens: str, out: str) -> None:
    """Compress the model, and save it."""
    matrix_BL = np.load(tokens)
    with load_quantizable_moe():
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    oneshot(
        model=loaded,
        dataset=Dataset.from_dict({"input_ids": matrix_BL.tolist()}),
        recipe=RECIPES[method](),
        num_calibration_samples=matrix_BL.shape[0],
        max_seq_length=matrix_BL.shape[1],
        shuffle_calibration_samples=False,
        pipeline="basic" if method == "reap-basic" else "independent",
        moe_calibrate_all_experts=False,
    )
    loaded.save_pretrained(out, save_compressed=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
