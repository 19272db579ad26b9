"""The names of parameters in Hugging Face checkpoints."""

from typing import NamedTuple

import numpy as np

from tpaw_jax.models.layer_stacks import places_of, stacks_of
from tpaw_jax.models.model_config import ModelConfig

TENSOR_NAMES = {  # flax path: Hugging Face name; * marks kernels, whose last two axes are transposed
    "embed/embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "head/embedding": "lm_head.weight",
    "token_norm/scale": "model.per_layer_projection_norm.weight",
}

_LAYER = "model.layers.{}."

LAYER_NAMES = {  # flax path in a stack: name; {} is the number of the layer, a second {} the expert
    "attention_norm/scale": _LAYER + "input_layernorm.weight",
    "q/kernel": f"*{_LAYER}self_attn.q_proj.weight",
    "k/kernel": f"*{_LAYER}self_attn.k_proj.weight",
    "v/kernel": f"*{_LAYER}self_attn.v_proj.weight",
    "o/kernel": f"*{_LAYER}self_attn.o_proj.weight",
    "q/bias": _LAYER + "self_attn.q_proj.bias",
    "k/bias": _LAYER + "self_attn.k_proj.bias",
    "v/bias": _LAYER + "self_attn.v_proj.bias",
    "q_norm/scale": _LAYER + "self_attn.q_norm.weight",
    "k_norm/scale": _LAYER + "self_attn.k_norm.weight",
    "mlp_norm/scale": _LAYER + "post_attention_layernorm.weight",
    "attention_post_norm/scale": _LAYER + "post_attention_layernorm.weight",
    "mlp_post_norm/scale": _LAYER + "post_feedforward_layernorm.weight",
    "gate/kernel": f"*{_LAYER}mlp.gate_proj.weight",
    "up/kernel": f"*{_LAYER}mlp.up_proj.weight",
    "down/kernel": f"*{_LAYER}mlp.down_proj.weight",
    "output_scale/scale": _LAYER + "layer_scalar",
    "token_gate/kernel": f"*{_LAYER}per_layer_input_gate.weight",
    "token_out/kernel": f"*{_LAYER}per_layer_projection.weight",
    "token_post_norm/scale": _LAYER + "post_per_layer_input_norm.weight",
    "token_embedding/embedding": _LAYER + "embed_tokens_per_layer",  # a part of a tensor, see `joined_tensors`
    "token_projection/kernel": f"*{_LAYER}per_layer_model_projection",  # also a part
}

EXPERT_NAMES = {
    "router/kernel": f"*{_LAYER}mlp.gate.weight",
    "expert_gate/kernel": f"*{_LAYER}mlp.experts.{{}}.gate_proj.weight",
    "expert_up/kernel": f"*{_LAYER}mlp.experts.{{}}.up_proj.weight",
    "expert_down/kernel": f"*{_LAYER}mlp.experts.{{}}.down_proj.weight",
    "shared_gate/kernel": f"*{_LAYER}mlp.shared_expert_gate.weight",
    "gate/kernel": f"*{_LAYER}mlp.shared_expert.gate_proj.weight",
    "up/kernel": f"*{_LAYER}mlp.shared_expert.up_proj.weight",
    "down/kernel": f"*{_LAYER}mlp.shared_expert.down_proj.weight",
}
"""Names in a mixture of experts. `gate`, `up` and `down` are the shared expert."""

MIXTRAL_NAMES = {
    "router/kernel": f"*{_LAYER}block_sparse_moe.gate.weight",
    "expert_gate/kernel": f"*{_LAYER}block_sparse_moe.experts.{{}}.w1.weight",
    "expert_up/kernel": f"*{_LAYER}block_sparse_moe.experts.{{}}.w3.weight",
    "expert_down/kernel": f"*{_LAYER}block_sparse_moe.experts.{{}}.w2.weight",
}

EXPERTS_BESIDE_NAMES = {  # of Gemma 4
    "router/kernel": f"*{_LAYER}router.proj.weight",
    "router_norm/scale": _LAYER + "router.scale",
    "expert_scale/scale": _LAYER + "router.per_expert_scale",
    "experts_norm/scale": _LAYER + "pre_feedforward_layernorm_2.weight",
    "experts_post_norm/scale": _LAYER + "post_feedforward_layernorm_2.weight",
    "dense_post_norm/scale": _LAYER + "post_feedforward_layernorm_1.weight",
    "expert_gate/kernel": f"*{_LAYER}experts.gate_proj",  # a part of gate_up_proj, see `joined_tensors`
    "expert_up/kernel": f"*{_LAYER}experts.up_proj",
    "expert_down/kernel": f"*{_LAYER}experts.down_proj",
}


class TensorName(NamedTuple):
    """The tensors of a checkpoint that make up a parameter."""

    template: str  # see `TENSOR_NAMES`
    layers: tuple[int, ...] = ()  # the number of each layer of the stack

    @property
    def transposed(self) -> bool:
        """Whether the last two axes are the other way round in the file."""
        return self.template.startswith("*")

    @property
    def axes(self) -> int:
        """How many leading axes of the parameter are over tensors: layers, and experts if they are apart."""
        return self.template.count("{}")

    def of(self, *place: int) -> str:
        """The name of the tensor at a place in the parameter: the index in its stack, and the expert."""
        numbers = (self.layers[place[0]], *place[1:]) if place else ()
        return self.template.lstrip("*").format(*numbers)

    def tensors(self, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
        """The tensors of a parameter of some shape: name, place in the parameter, shape in the file."""
        inner = self.in_file(shape[self.axes :])
        return [(self.of(*place), place, inner) for place in np.ndindex(shape[: self.axes])]

    def in_file(self, inner: tuple) -> tuple:
        """The shape of a tensor, or an index into it, as it is in the file."""
        return (*inner[:-2], inner[-1], inner[-2]) if self.transposed else inner


def tensor_names(config: ModelConfig) -> dict[str, TensorName]:
    """The tensors of each parameter, by flax path."""
    names = {name: TensorName(template) for name, template in TENSOR_NAMES.items()}
    for stack, own in stacks_of(config).items():
        layers = tuple(i for i, place in enumerate(places_of(config)) if place.stack == stack)
        names |= {f"{stack}/{name}": TensorName(template, layers) for name, template in layer_names(own).items()}
    return names


def layer_names(config: ModelConfig) -> dict[str, str]:
    """The names of the parameters of a layer, as in `LAYER_NAMES`, for a model with one stack."""
    names = dict(LAYER_NAMES)
    if config.post_norm:
        names["mlp_norm/scale"] = _LAYER + "pre_feedforward_layernorm.weight"
    if config.experts_beside_dense:
        names |= EXPERTS_BESIDE_NAMES
    elif config.num_experts:
        names |= MIXTRAL_NAMES if config.model_type == "mixtral" else EXPERT_NAMES
    return names


VISION = tuple(
    f"{prefix}{tower}."
    for prefix in ("", "model.")
    for tower in ("vision_tower", "multi_modal_projector", "audio_tower", "embed_vision", "embed_audio")
)
"""Prefixes of tensors for images and sound, which are not loaded."""

TEXT = {"language_model.lm_head.": "lm_head.", "language_model.model.": "model.", "model.language_model.": "model."}
"""Prefixes of the language model beside them, and without them."""


def text_name(name: str) -> str | None:
    """The name of a tensor in a checkpoint without other towers; None for tensors of those."""
    if name.startswith(VISION):
        return None
    return next((own + name.removeprefix(prefix) for prefix, own in TEXT.items() if name.startswith(prefix)), name)
