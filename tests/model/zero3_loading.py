"""One of several processes that load checkpoints partitioned by ZeRO-3, say whether each is what one process loads, and train it.

Run by `test_compressed.py`; for each the folder of a good checkpoint and that of one with a tensor too many.
"""

import sys
from typing import Any

import deepspeed
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

import moeflow  # noqa: F401
from moeflow.methods.finetune import extensions

ZERO3 = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "zero_allow_untested_optimizer": True,
}


def check(plain: Any, good: str, surplus: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(good)
    assert all(hasattr(p, "ds_shape") for p in model.parameters()), "the model must be partitioned"
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        whole = {n: p.detach().clone() for n, p in model.named_parameters()}
    expected = dict(plain.named_parameters())
    assert whole.keys() == expected.keys()
    assert all(torch.equal(whole[n], expected[n]) for n in whole)
    assert all(torch.equal(b, dict(plain.named_buffers())[n]) for n, b in model.named_buffers())
    print("equal", flush=True)
    try:
        AutoModelForCausalLM.from_pretrained(surplus)
    except ValueError as error:
        assert "model.surprise, which its config.json leaves no place for" in str(error)
        print("refused", flush=True)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=ZERO3)
    torch.manual_seed(torch.distributed.get_rank())  # so that the processes route differently
    for _ in range(2):
        ids = torch.randint(3, 96, (1, 3))
        loss = engine(ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        changed = {n: not torch.equal(p, expected[n]) for n, p in model.named_parameters()}
        assert all(hit for n, hit in changed.items() if "experts" in n)
        assert all((p == 0)[expected[n] == 0].all() for n, p in model.named_parameters() if "experts" in n), "padding"
    print("trained", flush=True)


torch.set_num_threads(1)
extensions.load(extensions.COMMUNICATION)
deepspeed.init_distributed("gloo")
folders = list(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
plains = [AutoModelForCausalLM.from_pretrained(good) for good, _ in folders]
keep = HfDeepSpeedConfig(ZERO3)
for plain, (good, surplus) in zip(plains, folders, strict=True):
    check(plain, good, surplus)
torch.distributed.destroy_process_group()
