"""Small random models of many families of architectures, for tests of what should hold for every model."""

from typing import Any

MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, **MOE}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
MLA = {
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "head_dim": 8,
}  # fmt: skip
TEXT = {
    "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
OLD = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 512, "bos_token_id": 0}

FAMILIES: dict[str, dict[str, Any]] = {
    # dense
    "llama": {}, "mistral": {"sliding_window": 16}, "qwen2": {}, "qwen3": {"head_dim": 8}, "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 30.0, "sliding_window": 16},
    "gemma3_text": {"head_dim": 8, "sliding_window": 16}, "phi": {}, "phi3": {}, "cohere": {}, "cohere2": {},
    "granite": {"logits_scaling": 8.0}, "olmo": {}, "olmo2": {}, "olmo3": {}, "stablelm": {}, "starcoder2": {},
    "nemotron": {}, "smollm3": {}, "seed_oss": {"head_dim": 8}, "glm": {"head_dim": 8}, "glm4": {"head_dim": 8},
    "exaone4": {}, "ernie4_5": {"head_dim": 8}, "helium": {"head_dim": 8}, "arcee": {}, "apertus": {}, "diffllama": {},
    "hunyuan_v1_dense": {"head_dim": 8}, "ministral": {"head_dim": 8}, "persimmon": {}, "falcon": {},
    # older: tables of positions, or ALiBi
    "gpt2": OLD, "gpt_bigcode": OLD, "gptj": {**OLD, "rotary_dim": 4}, "codegen": {**OLD, "rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4}, "gpt_neox": {},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48}, "bloom": {"n_layer": 2, "n_head": 4}, "biogpt": {},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
    # mixtures of experts
    "mixtral": LOCAL, "qwen2_moe": {"num_experts": 4, **MOE, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 4, **MOE, "head_dim": 8}, "olmoe": {"num_experts": 4, **MOE},
    "gpt_oss": {**LOCAL, "head_dim": 8}, "granitemoe": LOCAL, "phimoe": LOCAL,
    "deepseek_v3": {**ROUTED, **MLA}, "glm4_moe": {**ROUTED, "head_dim": 8},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16},
    "dots1": {**ROUTED, "n_shared_experts": 1, "head_dim": 8},
    # state spaces, linear attention and convolutions, alone and beside attention
    "mamba": {}, "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "falcon_h1": {"mamba_d_ssm": 64, **MAMBA}, "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "granitemoehybrid": {**LOCAL, **MAMBA, "layer_types": ["mamba", "attention"]},
    "jamba": {
        "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4,
    },
    "qwen3_next": {
        "num_experts": 4, **MOE, **LINEAR, "shared_expert_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {"head_dim": 8, "lru_width": 32, "block_types": ["recurrent", "attention"]},
    # around a text model
    "gemma3": {
        "text_config": {**TEXT, "head_dim": 8, "sliding_window": 16},
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14,
        },
        "mm_tokens_per_image": 4, "image_token_index": 263, "image_token_id": 263, "boi_token_index": 261,
        "eoi_token_index": 262,
    },
}  # fmt: skip
