"""GPTQModel on one model, in an environment of its own: `peer_gptqmodel.py METHOD MODEL TOKENS OUT`.

METHOD is gptq, or dense, which unpacks what gptq has written to MODEL; MODEL and OUT are folders of checkpoints, TOKENS is a .npy
of token ids, [sequences, length]. The experts alone are quantized, to 4 bits in groups of 64. Written after GPTQModel's own pages;
7.7 asks for a newer torch than the one that all peers share, so nothing here has run it.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.utils.model_dequant import dequantize_model

BATCH = 8
WHOLE: dict[str, dict[str, int]] = {r"-:.*self_attn.*": {}}


def main(method: str, model: str, tokens: str, out: str) -> None:
    """Quantize the model's experts and save it, or unpack it."""
    if method == "dense":
        dequantize_model(Path(model), Path(out), target_dtype=torch.float32, device="cpu")
        return
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in np.load(tokens).tolist()]
    loaded = GPTQModel.load(model, QuantizeConfig(bits=4, group_size=64, sym=True, dynamic=WHOLE))
    loaded.quantize(rows, batch_size=BATCH)
    loaded.save(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
