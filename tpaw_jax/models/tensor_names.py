"""The names of parameters in Hugging Face checkpoints."""

from tpaw_jax.models.transformer import ModelConfig

TENSOR_NAMES = {  # flax path: Hugging Face name; {} is the layer, * marks kernels stored transposed, [out, in]
    "embed/embedding": "model.embed_tokens.weight",
    "layers/attention_norm/scale": "model.layers.{}.input_layernorm.weight",
    "layers/q/kernel": "*model.layers.{}.self_attn.q_proj.weight",
    "layers/k/kernel": "*model.layers.{}.self_attn.k_proj.weight",
    "layers/v/kernel": "*model.layers.{}.self_attn.v_proj.weight",
    "layers/o/kernel": "*model.layers.{}.self_attn.o_proj.weight",
    "layers/q/bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers/k/bias": "model.layers.{}.self_attn.k_proj.bias",
    "layers/v/bias": "model.layers.{}.self_attn.v_proj.bias",
    "layers/q_norm/scale": "model.layers.{}.self_attn.q_norm.weight",
    "layers/k_norm/scale": "model.layers.{}.self_attn.k_norm.weight",
    "layers/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/gate/kernel": "*model.layers.{}.mlp.gate_proj.weight",
    "layers/up/kernel": "*model.layers.{}.mlp.up_proj.weight",
    "layers/down/kernel": "*model.layers.{}.mlp.down_proj.weight",
    "final_norm/scale": "model.norm.weight",
    "head/embedding": "lm_head.weight",
}
POST_NORM_NAMES = {
    "layers/attention_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/mlp_norm/scale": "model.layers.{}.post_feedforward_layernorm.weight",
}
"""The names of the same norms where they follow attention and feed-forward."""


def tensor_names(config: ModelConfig) -> dict[str, str]:
    """The Hugging Face names of a model's parameters, as in `TENSOR_NAMES`."""
    return TENSOR_NAMES | (POST_NORM_NAMES if config.post_norm else {})
