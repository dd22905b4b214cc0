"""What engines other than transformers read in a config.json, and transformers does not write. No torch."""

from moeflow.arch.spec import ALIASES, COMPRESSED, Config

NOAUX = ("deepseek_v3", "deepseek_v32", "glm_moe_dsa")
"""Model types whose router has sigmoid scores and a bias for the choice, which vLLM reads only where `scoring_func` and
`topk_method` say so (vLLM 0.32, model_executor/models/deepseek_v2.py, DeepseekV2MoE)."""
SCORES = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}

PHI, BIASES = "PhiMoEForCausalLM", ("attention_bias", "lm_head_bias")
"""The name by which vLLM and llama.cpp know Phi-3.5-MoE, and the keys that say it has the biases which both take as given."""


def as_engines_read(config: Config) -> Config:
    """A config.json that says to vLLM, SGLang and llama.cpp, too, what it says to transformers; itself if nothing is missing."""
    model_type = str(config.get("model_type", "")).removeprefix(COMPRESSED)
    made = dict(config)
    if ALIASES.get(model_type, model_type) in NOAUX and config.get("topk_method") in (None, "noaux_tc"):
        made |= {key: value for key, value in SCORES.items() if not config.get(key)}
    names = config.get("architectures") or ()
    if model_type == "phimoe" and names and all(config.get(key) for key in BIASES):
        made["architectures"] = [str(name).replace("PhimoeForCausalLM", PHI) for name in names]
    return made if made != config else config
