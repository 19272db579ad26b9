"""The names of parameters in Hugging Face checkpoints, and matrices that some families' checkpoints join."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array

from tpaw_jax.models.model_config import ModelConfig

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
    "layers/attention_post_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/mlp_post_norm/scale": "model.layers.{}.post_feedforward_layernorm.weight",
    "layers/gate/kernel": "*model.layers.{}.mlp.gate_proj.weight",
    "layers/up/kernel": "*model.layers.{}.mlp.up_proj.weight",
    "layers/down/kernel": "*model.layers.{}.mlp.down_proj.weight",
    "final_norm/scale": "model.norm.weight",
    "head/embedding": "lm_head.weight",
}


def tensor_names(config: ModelConfig) -> dict[str, str]:
    """The Hugging Face names of a model's parameters, as in `TENSOR_NAMES`."""
    names = TENSOR_NAMES | (FUSED_NAMES if config.fused else {})
    if config.post_norm:
        names["layers/mlp_norm/scale"] = "model.layers.{}.pre_feedforward_layernorm.weight"
    return names


VISION = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
"""Prefixes of tensors of a vision tower, which are not loaded."""

TEXT = {"language_model.lm_head.": "lm_head.", "language_model.model.": "model.", "model.language_model.": "model."}
"""Prefixes of the language model beside a vision tower, and without one."""


def text_name(name: str) -> str | None:
    """The name of a tensor in a checkpoint without a vision tower; None for tensors of the tower."""
    if name.startswith(VISION):
        return None
    return next((own + name.removeprefix(prefix) for prefix, own in TEXT.items() if name.startswith(prefix)), name)


FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
"""Matrices of checkpoints, and ours that they hold."""

FUSED_NAMES = {
    "layers/qkv/kernel": "*model.layers.{}.self_attn.qkv_proj.weight",
    "layers/gate_up/kernel": "*model.layers.{}.mlp.gate_up_proj.weight",
}


class SplitSource:
    """A source of tensors whose joined matrices have the names of their parts.

    Raises:
        ValueError: a joined matrix has the wrong shape. Names `path` and the matrix.
    """

    def __init__(self, source: Any, config: ModelConfig, path: Path):
        heads = [count * config.head_dim for count in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
        rows = {"qkv": heads, "gate_up": [config.intermediate_size] * 2}
        wrong = []
        self._source = source
        self._places: dict[str, tuple[str, int, int]] = {}  # name of a part: joined matrix, first row, end
        for joined, parts in FUSED.items():
            ends = np.cumsum(rows[joined]).tolist()
            for layer in range(config.num_layers):
                name = _name(FUSED_NAMES[f"layers/{joined}/kernel"], layer)
                if name in source.names():
                    wrong += [name] * (source.shape(name) != (ends[-1], config.hidden_size))
                    for part, first, end in zip(parts, [0, *ends], ends, strict=False):
                        self._places[_name(TENSOR_NAMES[f"layers/{part}/kernel"], layer)] = name, first, end

        if wrong:
            raise ValueError(
                f"{path}: {len(wrong)} tensors have the wrong shape: '{wrong[0]}' is {source.shape(wrong[0])}, which "
                "does not suit the heads and sizes of config.json."
            )

    def names(self) -> set[str]:
        joined = {name for name, _, _ in self._places.values()}
        return (self._source.names() - joined) | self._places.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._places:
            return self._source.shape(name)
        joined, first, end = self._places[name]
        return end - first, self._source.shape(joined)[1]

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        if name not in self._places:
            return self._source.read(name, index)
        joined, first, end = self._places[name]
        start, stop, _ = index[0].indices(end - first)
        return self._source.read(joined, (slice(first + start, first + stop), *index[1:]))


class Joined(NamedTuple):
    """The parts of a matrix of `FUSED`, which are joined a layer at a time."""

    parts: tuple[Array, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return *self.parts[0].shape[:-1], sum(part.shape[-1] for part in self.parts)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def layer(self, index: int) -> np.ndarray:
        return np.concatenate([np.asarray(part[index]) for part in self.parts], axis=-1)


def fuse(flat: Mapping[str, Array]) -> dict[str, "Array | Joined"]:
    """Parameters with the matrices of `FUSED` joined."""
    name = lambda part: f"layers/{part}/kernel"
    parts = {name(part) for names in FUSED.values() for part in names}
    joined = {name(one): Joined(tuple(flat[name(part)] for part in names)) for one, names in FUSED.items()}
    return {name: value for name, value in flat.items() if name not in parts} | joined


def _name(hf: str, layer: int) -> str:
    return hf.lstrip("*").format(layer)
