"""What a config.json lists for each decoder layer where most have one number. No torch."""

from moeflow.arch.spec import EXPERT_COUNT_KEYS, Config

EXPERTS = (*EXPERT_COUNT_KEYS, "moe_num_experts")
"""The keys for the number of routed experts."""
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")
"""The keys for the experts of a token."""
SIZES = ("moe_intermediate_size", "num_shared_expert", "num_shared_experts", "n_shared_experts")


def as_numbers(config: Config) -> Config:
    """The configuration with a number where it lists the same one for every layer, as Hunyuan-A13B is published."""
    numbers = {}
    for key in (*EXPERTS, *CHOSEN, *SIZES):
        value = config.get(key)
        if isinstance(value, list) and value and type(value[0]) is int and all(one == value[0] for one in value):
            numbers[key] = value[0]
    return config | numbers
