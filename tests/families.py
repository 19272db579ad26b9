"""Small random models of every family, made with transformers."""

import torch
import transformers

torch.set_num_threads(1)

SMALL = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
    "rope_theta": 500000.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "rope_theta": 1e5}
LONGROPE = {  # of the first 12 of 16 features
    "original_max_position_embeddings": 1024,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0, 1.02, 1.1, 1.2, 1.3, 1.5],
        "long_factor": [1.1, 1.4, 2.0, 3.0, 5.0, 8.0],
    },
}
DYNAMIC = {
    "max_position_embeddings": 1024,
    "rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e4},
}
GRANITE = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.0156,
    "logits_scaling": 8.0,
    "tie_word_embeddings": True,
}
GEMMA3 = {
    "num_hidden_layers": 3,
    "head_dim": 32,
    "query_pre_attn_scalar": 24,
    "sliding_window": 40,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "pad_token_id": 0,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    },
}
GEMMA2 = {
    "num_hidden_layers": 3,
    "head_dim": 32,
    "query_pre_attn_scalar": 24,
    "sliding_window": 40,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
GEMMA4 = {  # keys and values of layers 2 and 3 are read by the last two
    "num_hidden_layers": 6,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 40,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "vocab_size_per_layer_input": 256,
    "hidden_size_per_layer_input": 16,
    "final_logit_softcapping": 3.0,
    "pad_token_id": 0,
}
GEMMA4_EXPERTS = {
    "num_hidden_layers": 5,
    "num_key_value_heads": 4,
    "num_global_key_value_heads": 2,
    "attention_k_eq_v": True,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 40,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 0,
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 3,
    "moe_intermediate_size": 48,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48}
MODELS = {  # configuration class, and what differs from `SMALL`
    "llama-tied": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "llama-untied": (transformers.LlamaConfig, {"tie_word_embeddings": False, "num_key_value_heads": 4}),
    "llama-3.1-rope": (transformers.LlamaConfig, {"rope_parameters": LLAMA31_ROPE}),
    "mistral": (transformers.MistralConfig, {"sliding_window": None, "head_dim": 16}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 32}),
    "olmo2": (transformers.Olmo2Config, {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "granite": (transformers.GraniteConfig, GRANITE),
    "smollm3": (transformers.SmolLM3Config, {"no_rope_layers": [1, 0], "pad_token_id": 0}),
    "phi3": (transformers.Phi3Config, {"sliding_window": None, "pad_token_id": 0}),
    "mistral-window": (transformers.MistralConfig, {"sliding_window": 50, "head_dim": 16}),
    "qwen2-window": (
        transformers.Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 70, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "gemma3": (transformers.Gemma3TextConfig, GEMMA3),
    "gemma2": (transformers.Gemma2Config, GEMMA2),
    "mixtral": (transformers.MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": (transformers.Qwen2MoeConfig, EXPERTS | {"shared_expert_intermediate_size": 80}),
    "qwen3-moe": (transformers.Qwen3MoeConfig, EXPERTS | {"head_dim": 32, "norm_topk_prob": True}),
    "qwen3-moe-dense": (transformers.Qwen3MoeConfig, EXPERTS | {"num_hidden_layers": 3, "mlp_only_layers": [1]}),
    "gemma4": (transformers.Gemma4TextConfig, GEMMA4),
    "gemma4-experts": (transformers.Gemma4TextConfig, GEMMA4_EXPERTS),
    "phi3-longrope": (transformers.Phi3Config, LONGROPE | {"sliding_window": None, "pad_token_id": 0}),
    "dynamic": (
        transformers.LlamaConfig,
        {
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e4},
        },
    ),
    "yarn": (transformers.Qwen2Config, {"rope_parameters": YARN}),
    "yarn-of-deepseek": (transformers.LlamaConfig, {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}}),
}


def random_model(name, directory, **changes):
    """A random transformers model of `MODELS`, saved to a directory."""
    cls, extra = MODELS[name]
    if "vocab_size" in changes and extra.get("vocab_size_per_layer_input"):
        changes["vocab_size_per_layer_input"] = changes["vocab_size"]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(cls(**SMALL | extra | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, which start at 0 and 1
            parameter.add_(0.05 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():  # starts at 1, and is not trained
            if name.endswith("layer_scalar"):
                buffer.add_(0.2 * torch.randn_like(buffer))
    model.save_pretrained(directory)
    return model
