"""What a config.json lists for each decoder layer where most have one number. No torch."""

from moeflow.arch.spec import EXPERT_COUNT_KEYS, Config

EXPERTS = (*EXPERT_COUNT_KEYS, "moe_num_experts")
"""The keys for the number of routed experts."""
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")
"""The keys for the experts of a token."""
SIZES = ("moe_intermediate_size", "num_shared_expert", "num_shared_experts", "n_shared_experts")


def listed(config: Config) -> list[str]:
    """The keys for which a config.json may list a number for each layer, and does."""
    count = config.get("num_hidden_layers")
    return [k for k in (*EXPERTS, *CHOSEN, *SIZES) if isinstance(v := config.get(k), list) and v and len(v) == count]


def as_numbers(config: Config) -> Config:
    """The configuration with a number where it lists the same one for every layer, as Hunyuan-A13B is published."""
    alike = ((k, config[k]) for k in listed(config) if type(config[k][0]) is int and len({*map(str, config[k])}) == 1)
    return config | {k: value[0] for k, value in alike}
