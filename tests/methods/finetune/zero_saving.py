"""A process that trains a model for a step with ZeRO, and saves its shards beside its config.json: MODEL, OUT, STAGE.

It prints the digest of each tensor that it has trained, as JSON. Run by `test_zero.py`.
"""

import hashlib
import json
import sys
from pathlib import Path

import deepspeed
import torch
from transformers import AutoModelForCausalLM

from moeflow.methods.finetune import extensions

torch.set_num_threads(1)
extensions.load(extensions.COMMUNICATION)
deepspeed.init_distributed("gloo")
source, out, stage = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(source)
config = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": stage},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "zero_allow_untested_optimizer": True,
}
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
ids = torch.arange(3, 35)[None]
engine.backward(engine(ids, labels=ids).loss)
engine.step()
engine.save_checkpoint(str(out))
model.config.save_pretrained(out)
with deepspeed.zero.GatheredParameters(list(model.parameters())):
    trained = {
        n: hashlib.sha256(p.detach().float().contiguous().numpy().tobytes()).hexdigest() for n, p in model.named_parameters()
    }
print(json.dumps(trained), flush=True)
torch.distributed.destroy_process_group()
