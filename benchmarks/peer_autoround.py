"""auto-round on one model, in an environment of its own: `peer_autoround.py METHOD MODEL TOKENS OUT`.

METHOD is signround, with auto-round's own 200 iterations, MODEL and OUT are folders of checkpoints, TOKENS is a .npy of token ids,
[sequences, length]. The experts alone are quantized, to 4 bits in groups of 64; OUT is packed as llm-compressor packs.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 8
WHOLE = "self_attn,mlp.gate,lm_head"


def main(method: str, model: str, tokens: str, out: str) -> None:
    """Quantize the model's experts, and save it."""
    if method != "signround":
        raise ValueError(f"METHOD is {method}; auto-round has signround here")
    matrix_BL = torch.from_numpy(np.load(tokens)).long()
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    rounding = AutoRound(
        loaded,
        AutoTokenizer.from_pretrained(model),
        scheme="W4A16",
        group_size=64,
        ignore_layers=WHOLE,
        dataset=list(matrix_BL.split(BATCH)),
        seqlen=matrix_BL.shape[1],
        nsamples=matrix_BL.shape[0],
        batch_size=BATCH,
        device_map="cpu",
        amp=False,
    )
    parent = Path(f"{out}-named")  # auto-round makes a folder inside, named after the model and the scheme
    rounding.quantize_and_save(str(parent), format="llm_compressor")
    (made,) = parent.iterdir()
    made.rename(out)
    parent.rmdir()


if __name__ == "__main__":
    main(*sys.argv[1:])
