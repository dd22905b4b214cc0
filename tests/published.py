"""What published config.json files say differently from those that transformers writes: names, lists, entries that are left out.

Only what structure has to understand is here; the sizes are those of the models.
"""

from typing import Any

Config = dict[str, Any]

_MLA: Config = {
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "num_attention_heads": 64, "num_key_value_heads": 64, "hidden_size": 7168, "intermediate_size": 18432, "vocab_size": 163840,
    "first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 2048,
    "num_hidden_layers": 61, "num_experts_per_tok": 8, "n_routed_experts": 384, "norm_topk_prob": True,
    "routed_scaling_factor": 2.827,
}  # fmt: skip

PUBLISHED: dict[str, Config] = {
    "MiniMax-M2": {  # part of a head is rotated, under a name of its own
        "architectures": ["MiniMaxM2ForCausalLM"], "model_type": "minimax_m2", "head_dim": 128, "rotary_dim": 64,
        "hidden_size": 3072, "intermediate_size": 1536, "num_attention_heads": 48, "num_key_value_heads": 8,
        "num_hidden_layers": 62, "num_local_experts": 256, "num_experts_per_tok": 8, "vocab_size": 200064,
        "attn_type_list": [1] * 62, "use_qk_norm": True, "qk_norm_type": "per_layer", "scoring_func": "sigmoid",
        "use_routing_bias": True, "rope_theta": 5000000, "tie_word_embeddings": False, "mtp_transformer_layers": 1,
        "num_mtp_modules": 3, "use_mtp": True, "bos_token_id": None, "eos_token_id": None, "shared_intermediate_size": 0,
    },
    "Hunyuan-A13B": {  # a number for each layer, and they are the same
        "architectures": ["HunYuanMoEV1ForCausalLM"], "model_type": "hunyuan_v1_moe", "hidden_size": 4096, "head_dim": 128,
        "attention_head_dim": 128, "intermediate_size": 3072, "moe_intermediate_size": [3072] * 32, "moe_topk": [8] * 32,
        "num_shared_expert": [1] * 32, "num_experts": 64, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128167, "use_qk_norm": True, "routed_scaling_factor": False,
        "tie_word_embeddings": True, "rope_theta": 10000.0, "pad_token_id": 127961, "eos_token_id": 127960,
        "rope_scaling": {"alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0, "type": "dynamic"},
        "group_limited_greedy": False, "use_cla": False, "use_mixed_mlp_moe": True,
    },
    "Kimi-K2.5": {  # a vision tower's sizes under names of its own, and a text model of a type that transformers lacks
        "architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25",
        "text_config": {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "kimi_k2", **_MLA},
        "vision_config": {
            "merge_kernel_size": [2, 2], "patch_size": 14, "vt_hidden_size": 1152, "vt_intermediate_size": 4304,
            "vt_num_attention_heads": 16, "vt_num_hidden_layers": 27, "mm_hidden_size": 1152, "text_hidden_size": 7168,
            "init_pos_emb_height": 64, "init_pos_emb_width": 64, "init_pos_emb_time": 4,
        },
    },
    "Aria": {  # a text model's type that transformers does not know by this name
        "architectures": ["AriaForConditionalGeneration"], "model_type": "aria", "image_token_index": 9,
        "projector_patch_to_query_dict": {"1225": 128, "4900": 256},
        "text_config": {
            "model_type": "aria_moe_lm", "hidden_size": 2560, "intermediate_size": 1664, "moe_intermediate_size": 1664,
            "moe_num_experts": 64, "moe_topk": 6, "moe_num_shared_experts": 2, "num_attention_heads": 20,
            "num_key_value_heads": 20, "num_hidden_layers": 28, "vocab_size": 100352, "rope_theta": 5000000,
        },
        "vision_config": {
            "model_type": "idefics3_vision", "hidden_size": 1152, "intermediate_size": 4304, "image_size": 980,
            "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14,
        },
    },
    "Phi-3.5-MoE": {  # a factor for each pair of a head's dimensions
        "architectures": ["PhiMoEForCausalLM"], "model_type": "phimoe", "attention_bias": True, "lm_head_bias": True,
        "hidden_size": 4096, "intermediate_size": 6400, "num_attention_heads": 32, "num_key_value_heads": 8,
        "num_hidden_layers": 32, "num_local_experts": 16, "num_experts_per_tok": 2, "vocab_size": 32064,
        "max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "sliding_window": 131072,
        "router_jitter_noise": 0.01, "input_jitter_noise": 0.01,
        "rope_scaling": {
            "type": "longrope", "long_factor": [1.5] * 64, "short_factor": [1.0] * 64, "long_mscale": 1.24, "short_mscale": 1.24,
            "original_max_position_embeddings": 4096,
        },
    },
}  # fmt: skip
KIMI_LINEAR: Config = {
    "architectures": ["KimiLinearForCausalLM"], "model_type": "kimi_linear", "head_dim": 72, "hidden_size": 2304,
    "intermediate_size": 9216, "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "mla_use_nope": True, "moe_intermediate_size": 1024, "moe_layer_freq": 1, "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid", "num_attention_heads": 32, "num_key_value_heads": 32, "num_expert_group": 1,
    "num_experts": 256, "num_experts_per_token": 8, "num_hidden_layers": 27, "num_shared_experts": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "routed_scaling_factor": 2.446, "use_grouped_topk": True, "vocab_size": 163840,
    "linear_attn_config": {
        "full_attn_layers": [4, 8, 12, 16, 20, 24, 27], "head_dim": 128, "num_heads": 32, "short_conv_kernel_size": 4,
        "kda_layers": [i for i in range(1, 27) if i % 4],
    },
}  # fmt: skip
"""Layers' numbers and heads in an entry that is no configuration, and weights that transformers joins when it loads them."""
