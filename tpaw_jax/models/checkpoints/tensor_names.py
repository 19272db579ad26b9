"""The names of parameters in Hugging Face checkpoints, and matrices that some families' checkpoints join."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array

from tpaw_jax.models.model_config import ModelConfig

TENSOR_NAMES = {  # flax path: Hugging Face name; {} is the layer, a second {} the expert, * marks transposed kernels
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


_MLP = "*model.layers.{}.mlp"
_MIXTRAL = "*model.layers.{}.block_sparse_moe"

EXPERT_NAMES = {
    "router": f"{_MLP}.gate.weight",
    "expert_gate": f"{_MLP}.experts.{{}}.gate_proj.weight",
    "expert_up": f"{_MLP}.experts.{{}}.up_proj.weight",
    "expert_down": f"{_MLP}.experts.{{}}.down_proj.weight",
    "shared_gate": f"{_MLP}.shared_expert_gate.weight",
    "gate": f"{_MLP}.shared_expert.gate_proj.weight",
    "up": f"{_MLP}.shared_expert.up_proj.weight",
    "down": f"{_MLP}.shared_expert.down_proj.weight",
}
"""Names of a layer's kernels in a mixture of experts. `gate`, `up` and `down` are the shared expert."""

MIXTRAL_NAMES = {
    "router": f"{_MIXTRAL}.gate.weight",
    "expert_gate": f"{_MIXTRAL}.experts.{{}}.w1.weight",
    "expert_up": f"{_MIXTRAL}.experts.{{}}.w3.weight",
    "expert_down": f"{_MIXTRAL}.experts.{{}}.w2.weight",
}


def tensor_names(config: ModelConfig) -> dict[str, str]:
    """The Hugging Face names of a model's parameters, as in `TENSOR_NAMES`."""
    names = TENSOR_NAMES | (FUSED_NAMES if config.fused else {})
    if config.post_norm:
        names["layers/mlp_norm/scale"] = "model.layers.{}.pre_feedforward_layernorm.weight"
    if config.num_experts:
        kernels = MIXTRAL_NAMES if config.model_type == "mixtral" else EXPERT_NAMES
        names |= {f"layers/{name}/kernel": hf for name, hf in kernels.items()}
    return names


def tensors_of(hf: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """The tensors that make up one flax parameter: Hugging Face name, place in the parameter, shape in the file."""
    stacked = hf.count("{}")
    inner = shape[stacked:][::-1] if hf.startswith("*") else shape[stacked:]
    return [(hf.lstrip("*").format(*place), place, inner) for place in np.ndindex(shape[:stacked])]


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


class Part(NamedTuple):
    """Where a matrix lies in a joined tensor of a checkpoint."""

    joined: str  # name of the tensor
    rows: int  # of the joined matrix
    first: int  # row of the part
    end: int
    expert: int | None = None  # index on the leading axis, if the tensor has those of all experts


class SplitSource:
    """A source of tensors whose joined matrices have the names of their parts.

    Raises:
        ValueError: a joined tensor has the wrong shape. Names `path` and the tensor.
    """

    def __init__(self, source: Any, config: ModelConfig, path: Path):
        self._source = source
        present = source.names()
        parts = (_stacked_parts if config.num_experts else _fused_parts)(config)
        self._parts = {name: part for name, part in parts.items() if part.joined in present}
        columns = {"down_proj": config.expert_size}
        wrong = []
        for part in {part.joined: part for part in self._parts.values()}.values():
            experts = () if part.expert is None else (config.num_experts,)
            expected = (*experts, part.rows, columns.get(part.joined.split(".")[-1], config.hidden_size))
            wrong += [part.joined] * (source.shape(part.joined) != expected)
        if wrong:
            raise ValueError(
                f"{path}: {len(wrong)} tensors have the wrong shape: '{wrong[0]}' is {source.shape(wrong[0])}, which "
                "does not suit the heads and sizes of config.json."
            )

    def names(self) -> set[str]:
        return (self._source.names() - {part.joined for part in self._parts.values()}) | self._parts.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        part = self._parts.get(name)
        return (
            self._source.shape(name) if part is None else (part.end - part.first, *self._source.shape(part.joined)[-1:])
        )

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        part = self._parts.get(name)
        if part is None:
            return self._source.read(name, index)
        start, stop, _ = index[0].indices(part.end - part.first)
        rows = slice(part.first + start, part.first + stop), *index[1:]
        if part.expert is None:
            return self._source.read(part.joined, rows)
        return self._source.read(part.joined, (slice(part.expert, part.expert + 1), *rows))[0]


def _fused_parts(config: ModelConfig) -> dict[str, Part]:
    heads = [count * config.head_dim for count in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    rows = {"qkv": heads, "gate_up": [config.intermediate_size] * 2}
    parts = {}
    for joined, names in FUSED.items():
        ends = np.cumsum(rows[joined]).tolist()
        for layer in range(config.num_layers):
            stored = _name(FUSED_NAMES[f"layers/{joined}/kernel"], layer)
            for name, first, end in zip(names, [0, *ends], ends, strict=False):
                parts[_name(TENSOR_NAMES[f"layers/{name}/kernel"], layer)] = Part(stored, ends[-1], first, end)
    return parts


def _stacked_parts(config: ModelConfig) -> dict[str, Part]:
    """The experts' matrices in checkpoints that stack them, as transformers 5 does in memory."""
    size, names, parts = config.expert_size, tensor_names(config), {}
    of_experts = {"expert_gate": (0, size), "expert_up": (size, 2 * size), "expert_down": (0, config.hidden_size)}
    for kernel, (first, end) in of_experts.items():
        stored, rows = ("down_proj", config.hidden_size) if kernel == "expert_down" else ("gate_up_proj", 2 * size)
        for layer, expert in np.ndindex(config.num_layers, config.num_experts):
            name = _name(names[f"layers/{kernel}/kernel"], layer, expert)
            parts[name] = Part(f"model.layers.{layer}.mlp.experts.{stored}", rows, first, end, expert)
    if config.model_type == "mixtral":
        for layer in range(config.num_layers):
            stored = _name(EXPERT_NAMES["router"], layer)
            parts[_name(names["layers/router/kernel"], layer)] = Part(stored, config.num_experts, 0, config.num_experts)
    return parts


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


def _name(hf: str, *place: int) -> str:
    return hf.lstrip("*").format(*place)
