"""The rows of `test_bad_inputs.py`: a config.json that is not what it should be, and tensors that are not those it asks for."""

from typing import Any

from tests.bad_inputs import NO_JSON, Row, row
from tests.spoiling import ESCAPE, OTHER, Q, Spoil, absent, added, both, config, entries, holds, renamed, reshaped

EXPERTS = "model.layers.0.block_sparse_moe.experts"
QWEN, DEEPSEEK = "qwen2_moe", "deepseek_v3"


def wrong(key: str, value: Any, shown: str, wanted: str, family: str = "mixtral") -> Row:
    """An entry of config.json has a value that it cannot have."""
    return row(
        f"{family}: {key} is {shown}", config(**{key: value}), "config.json at", f"{key} is {shown}, not {wanted}", family=family
    )


def counts(key: str, least: int = 1, family: str = "mixtral") -> list[Row]:
    """What may be wrong with any whole number of config.json."""
    bad = {
        "'8'": "8",
        "8.5": 8.5,
        "8.0": 8.0,
        "true": True,
        "a list": [8],
        "an object": {},
        str(least - 1): least - 1,
        "nan": float("nan"),
    }
    bad |= {"1180591620717411303424": 1 << 70, r"'\x1b[31mred\x1b[0m'": ESCAPE}
    return [wrong(key, value, shown, f"a whole number from {least} to", family) for shown, value in bad.items()]


def lacks(*keys: str) -> Spoil:
    return config(**dict.fromkeys(keys, ...))


CONFIGS = [
    *counts("num_hidden_layers"), *counts("num_local_experts"), *counts("num_experts_per_tok"), *counts("hidden_size"),
    *counts("first_k_dense_replace", 0, DEEPSEEK),
    *(wrong(key, 0, "0", "a whole number from 1 to") for key in ("vocab_size", "intermediate_size", "num_attention_heads",
      "num_key_value_heads", "head_dim", "max_position_embeddings")),
    *(wrong(key, -1, "-1", "a whole number from") for key in ("vocab_size", "intermediate_size", "num_attention_heads",
      "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window")),
    *(wrong(key, "x", "'x'", "a whole number from", DEEPSEEK) for key in ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim",
      "qk_rope_head_dim", "v_head_dim", "n_group", "topk_group", "n_shared_experts", "moe_intermediate_size", "n_routed_experts")),
    *(wrong(key, "yes", "'yes'", "true or false") for key in ("tie_word_embeddings", "norm_topk_prob", "attention_bias")),
    *(wrong(key, "x", "'x'", "a number from 0") for key in ("rms_norm_eps", "rope_theta", "router_jitter_noise")),
    *(wrong(key, float("inf"), "inf", "a number from 0") for key in ("rms_norm_eps", "routed_scaling_factor")),
    *(wrong(key, "x", "'x'", "an object") for key in ("rope_parameters", "rope_scaling", "quantization_config")),
    *(wrong(key, 5, "5", "a word") for key in ("hidden_act", "topk_method")),
    *(wrong(key, "float8", "'float8'", "one of float64, float32, float16, bfloat16") for key in ("dtype", "torch_dtype")),
    *(wrong(key, "</s>", "'</s>'", "the number of a token") for key in ("bos_token_id", "eos_token_id", "pad_token_id")),
    wrong("hidden_act", "mish", "'mish'", "one of silu, swish, gelu"),
    wrong("dtype", 16, "16", "a word"), wrong("eos_token_id", [1, "2"], "a list", "the number of a token"),
    wrong("architectures", "MixtralForCausalLM", "'MixtralForCausalLM'", "a list of names"),
    wrong("mlp_only_layers", "1", "'1'", "a list of layers' numbers", QWEN),
    wrong("mlp_only_layers", [-1], "a list", "a list of layers' numbers", QWEN),
    wrong("moeflow_layers", {}, "an object", "a list with an object for each layer"),
    *(row(f"model_type is {shown}", config(model_type=value), f"model_type is {shown}, not a word like 'mixtral'")
      for shown, value in (("null", None), ("7", 7), ("a list", ["mixtral"]), ("an object", {}), ("true", True))),
    row("a number that is none", config(anything={"deep": [float("nan")]}), "config.json at", "anything holds NaN or Infinity"),
    row("a number beyond all", holds("config.json", '{"model_type": "mixtral", "x": 1' + "0" * 5_000 + "}"), NO_JSON),
    row("model_type of another kind", config(model_type="gpt2"), "is a 'gpt2', which is not supported"),
    row("model_type is empty", config(model_type=""), "is a '', which is not supported"),
    row("model_type has escape codes", config(model_type=ESCAPE), r"is a '\x1b[31mred\x1b[0m', which is not supported"),
    row("model_type is very long", config(model_type="x" * 100_000), "is a 'xxx", "which is not supported", "lists what is"),
    row("no number of experts", lacks("num_local_experts"), "names no number of experts"),
    row("no number of layers", lacks("num_hidden_layers"), "config.json at", "lacks num_hidden_layers"),
    row("no sizes", lacks("hidden_size", "vocab_size"), "config.json at", "lacks hidden_size, vocab_size"),
    row("null for a size", config(hidden_size=None), "config.json at", "lacks hidden_size"),
    row("no size of an expert", lacks("intermediate_size"), "config.json at", "lacks moe_intermediate_size or intermediate_size"),
    row("more active experts than there are", config(num_experts_per_tok=9), "num_experts_per_tok=9 is more than num_local"),
    row("groups that do not divide", config(n_group=3), "n_group=3 and topk_group=1 do not divide 8 experts", family=DEEPSEEK),
    row("more groups chosen than there are", config(topk_group=3), "n_group=2 and topk_group=3", family=DEEPSEEK),
    row("groups too small", config(num_experts_per_tok=5), "n_group=2 and topk_group=1", "reaches its 5", family=DEEPSEEK),
    row("no layer with experts", config(first_k_dense_replace=2), "no layer has experts", family=DEEPSEEK),
    row("a dense layer that is not there", config(mlp_only_layers=[2]), "mlp_only_layers names layer 2", family=QWEN),
    row("heads that share unevenly", config(num_key_value_heads=3), "num_attention_heads=2 is no multiple of num_key_"),
    row("heads that do not divide the width", config(num_attention_heads=6, head_dim=None), "hidden_size=16 is no multiple of"),
    row("formats of another number of layers", config(model_type="moeflow_mixtral", moeflow_layers=[{"experts": 8}]),
        "config.json has 1 entries in 'moeflow_layers' for 2 layers"),
    row("a format that is a number", config(model_type="moeflow_mixtral", moeflow_layers=[8, 8]), "says 8 of layer 0"),
    row("a format without a count", config(model_type="moeflow_mixtral", moeflow_layers=[{"skip": ""}] * 2),
        "moeflow_layers cannot be read (KeyError: 'experts')"),
    row("a format of words", config(model_type="moeflow_mixtral", moeflow_layers=[{"experts": "all"}] * 2), "'all'"),
    row("ranks that are a list", config(model_type="moeflow_mixtral", moeflow_layers=[{"experts": 8, "ranks": []}] * 2),
        "moeflow_layers cannot be read (AttributeError"),
    row("packed in an unknown way", config(quantization_config={"quant_method": "gptq"}), "is packed (quantization_config: gptq"),
    row("packed without a method", config(quantization_config={"bits": 4}), "is packed (quantization_config: unknown"),
    row("FP8 without blocks", config(quantization_config={"quant_method": "fp8"}), "is in FP8 without square blocks"),
    row("FP8 of blocks that are words", config(quantization_config={"quant_method": "fp8", "weight_block_size": "128"}),
        "is in FP8 without square blocks (weight_block_size='128')"),
    row("FP8 of blocks of nothing", config(quantization_config={"quant_method": "fp8", "weight_block_size": [0, 0]}),
        "is in FP8 without square blocks (weight_block_size=[0, 0])"),
]  # fmt: skip

TENSORS = [
    row("fewer experts in config.json", config(num_local_experts=6), "says that layer 0 has 6 experts, its tensors say 8"),
    row("more layers in config.json", config(num_hidden_layers=3), "config.json says 3 layers, but the checkpoint has no tensor"),
    row("as many layers as can be", config(num_hidden_layers=10_000), "config.json says 10000 layers, but the checkpoint has no"),
    row("fewer layers in config.json", config(num_hidden_layers=1), "tensors of layer 1, but config.json says 1 layers"),
    row("another width", config(hidden_size=32), "model.embed_tokens.weight has shape (512, 16)", "asks for (512, 32)"),
    row("another vocabulary", config(vocab_size=513), "model.embed_tokens.weight has shape (512, 16)", "asks for (513, 16)"),
    row("another size of experts", config(intermediate_size=40), f"{EXPERTS}.0.w1.weight has shape (48, 16)", "asks for (40, 16)"),
    row("more heads", config(num_attention_heads=4), "self_attn.k_proj.weight has shape (8, 16)", "asks for (4, 16)"),
    row("wider heads", config(head_dim=4), f"{Q} has shape (16, 16) where config.json asks for (8, 16)"),
    row("more heads of keys", config(num_key_value_heads=2), "self_attn.k_proj.weight has shape (8, 16)", "asks for (16, 16)"),
    row("a matrix on its side", reshaped(f"{EXPERTS}.0.w1.weight", [16, 48]), f"{EXPERTS}.0.w1.weight has shape (16, 48)"),
    row("a matrix that is flat", reshaped(Q, [256]), f"{Q} has shape (256,) where config.json asks for (16, 16)"),
    row("a norm that is a matrix", reshaped("model.norm.weight", [4, 4]), "model.norm.weight has shape (4, 4)"),
    row("no query", absent(Q), f"layer 0 has no tensor {Q}, which config.json asks for"),
    row("no router", absent("model.layers.1.block_sparse_moe.gate.weight"), "model.layers.1.block_sparse_moe.gate.weight"),
    row("no embedding", absent("model.embed_tokens.weight"), "the checkpoint has no tensor model.embed_tokens.weight"),
    row("no final norm", absent("model.norm.weight"), "the checkpoint has no tensor model.norm.weight"),
    row("no head", absent("lm_head.weight"), "no tensor lm_head.weight", "or tie_word_embeddings is wrong"),
    row("no matrix of an expert", absent(f"{EXPERTS}.3.w2.weight"), f"the checkpoint has no tensor {EXPERTS}.3.w2.weight"),
    row("no expert in the middle", both(*(absent(f"{EXPERTS}.3.{w}.weight") for w in ("w1", "w2", "w3"))), "no expert 3"),
    row("a bias that nobody reads", added("model.layers.1.self_attn.q_proj.bias", (16,)), "layer 1 has model.layers.1.self"),
    row("cosines that nobody reads", added("model.layers.1.self_attn.rotary_emb.cos_cached"), "leaves no place for"),
    row("a head that nobody reads", added("score.weight", (2, 16)), "the checkpoint has score.weight, which config.json"),
    row("a layer without a number", renamed(Q, "model.layers.x.q.weight"), "'model.layers.x.q.weight'", "tells no layer"),
    row("a negative layer", renamed(Q, "model.layers.-1.q.weight"), "'model.layers.-1.q.weight'", "tells no layer"),
    row("a layer of another script", renamed(Q, "model.layers.\u0663.q.weight"), "tells no layer"),
    row("a layer with a zero before it", renamed(Q, "model.layers.00.q.weight"), "'model.layers.00.q.weight'", "tells no layer"),
    row("a layer and nothing else", renamed(Q, "model.layers.0"), "'model.layers.0'", "tells no layer"),
    row("a layer far away", added("model.layers.999999.x"), "tensors of layer 999999, but config.json says 2 layers"),
    row("an expert far away", added("model.layers.1.block_sparse_moe.experts.99.w1.weight", (48, 16)), "layer 1 has no expert 8"),
    row("an expert of another script", added("model.layers.1.block_sparse_moe.experts.\u00b2.w1.weight", (48, 16)), "no place for"),
    row("a factor beside its matrix", added("model.layers.1.block_sparse_moe.experts.0.w1.factor_in", (4, 16)), "no place for"),
    row("one factor without the other", both(absent(f"{EXPERTS}.0.w1.weight"), added(f"{EXPERTS}.0.w1.factor_in", (4, 16))),
        f"has no tensor {EXPERTS}.0.w1.factor_out"),
    row("factors of no rank", both(absent(f"{EXPERTS}.0.w1.weight"), added(f"{EXPERTS}.0.w1.factor_in", (0, 16)),
        added(f"{EXPERTS}.0.w1.factor_out", (48, 0))), "do not multiply"),
    row("packed, but config.json says nothing", added(f"{EXPERTS}.0.w1.weight_packed", (48, 2), OTHER), "no quantization_config"),
    row("packed without scales", both(renamed(f"{EXPERTS}.0.w1.weight", f"{EXPERTS}.0.w1.weight_packed"),
        config(quantization_config={"quant_method": "compressed-tensors", "format": "pack-quantized"})),
        f"{EXPERTS}.0.w1.weight_scale is missing"),
    row("another shared expert", config(shared_expert_intermediate_size=41), "shared_expert.gate_proj.weight", family=QWEN),
    row("no biases though config.json has them", config(qkv_bias=False), "k_proj.bias", "leaves no place for", family=QWEN),
    row("another size of dense layers", config(intermediate_size=40), "mlp.gate_proj.weight has shape (48, 16)", family=QWEN),
    row("dense layers elsewhere", config(mlp_only_layers=[0]), "says that layer 0 has 0 experts", family=QWEN),
    row("another rank of queries", config(q_lora_rank=25), "q_a_proj.weight has shape (24, 16)", family=DEEPSEEK),
    row("no rank of queries", config(q_lora_rank=None), "self_attn.q_proj.weight", "which config.json asks for", family=DEEPSEEK),
    row("another rank of keys", config(kv_lora_rank=17), "kv_a_proj_with_mqa.weight has shape (24, 16)", family=DEEPSEEK),
    row("other heads of values", config(v_head_dim=9), "has shape", "where config.json asks for", family=DEEPSEEK),
    row("other rotated heads", config(qk_rope_head_dim=10), "q_b_proj.weight has shape (32, 24)", family=DEEPSEEK),
    row("more shared experts", config(n_shared_experts=2), "shared_experts.gate_proj.weight has shape (24, 16)", family=DEEPSEEK),
    row("generation of words", entries("generation_config.json", top_k="many"), "generation_config.json", "'top_k' is 'many'"),
]  # fmt: skip
