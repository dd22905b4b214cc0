"""What Compressed Experts cost beside the layers that they stand between: plain top-4 below, top-8 above.

Layer: transformers' `OlmoeSparseMoeBlock`, d=2048, F=1024, 64 experts, fp32, one thread, prefill of 2,048 tokens; its default
implementation of experts against ours with 4 of 8 experts computed, in both forms. Medians of alternating rounds.
"""

from functools import partial

import torch
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

from benchmarks.lowrank import medians
from benchmarks.rows import Row
from moeflow.arch import MAIN
from moeflow.model.formats import FORMS, Format
from moeflow.model.routed_experts import experts_of

D, F, E, TOP_K, COMPUTED = 2048, 1024, 64, 8, 4
TOKENS, ROUNDS = 2048, 5


def block(top_k: int, form: str = "") -> OlmoeSparseMoeBlock:
    """OLMoE's block, or the same with Compressed Experts of this form, all weights random."""
    torch.manual_seed(0)
    config = OlmoeConfig(hidden_size=D, intermediate_size=F, num_experts=E, num_experts_per_tok=top_k)
    config._experts_implementation = "grouped_mm"  # what transformers chooses by itself
    made = OlmoeSparseMoeBlock(config)
    made.experts = experts_of(made.experts, Format(E, compressed=form), config.to_dict() | {MAIN: COMPUTED})
    for parameter in made.parameters():
        parameter.data.normal_(std=0.02)
    return made.eval()


@torch.inference_mode()
def main(threads: int = 1) -> list[Row]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    x_1TD = torch.randn(1, TOKENS, D)
    blocks = {"top-4": block(COMPUTED), "top-8": block(TOP_K)} | {form: block(TOP_K, form) for form in FORMS}
    took = medians({name: partial(made, x_1TD) for name, made in blocks.items()}, ROUNDS)
    torch.set_num_threads(before)
    words = {"one": "one vector", "three": "three vectors"}
    return [
        Row(f"forward with {words[form]} an expert, against plain {other}", took[form] / took[other], "at most", most, "times")
        for form in FORMS
        for other, most in (("top-4", 1.1), ("top-8", 0.8))
    ]
