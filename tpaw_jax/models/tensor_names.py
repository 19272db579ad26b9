"""The names of parameters in Hugging Face checkpoints, and matrices that some families' checkpoints join."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

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
    return TENSOR_NAMES | (POST_NORM_NAMES if config.post_norm else {}) | (FUSED_NAMES if config.fused else {})


FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
"""Matrices of checkpoints, and ours that they hold."""

FUSED_NAMES = {
    "layers/qkv/kernel": "*model.layers.{}.self_attn.qkv_proj.weight",
    "layers/gate_up/kernel": "*model.layers.{}.mlp.gate_up_proj.weight",
}


class SplitSource:
    """A source of tensors whose joined matrices have the names of their parts."""

    def __init__(self, source: Any, config: ModelConfig):
        heads = [count * config.head_dim for count in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
        rows = {"qkv": heads, "gate_up": [config.intermediate_size] * 2}
        self._source = source
        self._places: dict[str, tuple[str, int, int]] = {}  # name of a part: joined matrix, first row, end
        for joined, parts in FUSED.items():
            ends = np.cumsum(rows[joined]).tolist()
            for layer in range(config.num_layers):
                name = _name(FUSED_NAMES[f"layers/{joined}/kernel"], layer)
                if name in source.names():
                    for part, first, end in zip(parts, [0, *ends], ends, strict=False):
                        self._places[_name(TENSOR_NAMES[f"layers/{part}/kernel"], layer)] = name, first, end

    def names(self) -> set[str]:
        joined = {name for name, _, _ in self._places.values()}
        return (self._source.names() - joined) | self._places.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._places:
            return self._source.shape(name)
        joined, first, end = self._places[name]
        rows, columns = self._source.shape(joined)
        return min(end, rows) - min(first, rows), columns

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        if name not in self._places:
            return self._source.read(name, index)
        joined, first, end = self._places[name]
        start, stop, _ = index[0].indices(end - first)
        return self._source.read(joined, (slice(first + start, first + stop), *index[1:]))


def fuse(flat: Mapping[str, Array]) -> dict[str, Array]:
    """Parameters with the matrices of `FUSED` joined."""
    parts = {f"layers/{part}/kernel" for names in FUSED.values() for part in names}
    joined = {
        f"layers/{name}/kernel": jnp.concatenate([flat[f"layers/{part}/kernel"] for part in names], axis=-1)
        for name, names in FUSED.items()
    }
    return {name: value for name, value in flat.items() if name not in parts} | joined


def _name(hf: str, layer: int) -> str:
    return hf.lstrip("*").format(layer)
