"""Parameters that checkpoints of some families join in one tensor, which holds ours as parts along one axis."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array

from tpaw_jax.models.checkpoints.tensor_names import EXPERT_NAMES, TensorName, tensor_names
from tpaw_jax.models.layer_stacks import places_of, stacks_of
from tpaw_jax.models.model_config import ModelConfig

FUSED_NAMES = {  # matrices that are joined: flax paths in a stack, name of the joined tensor
    ("q/kernel", "k/kernel", "v/kernel"): "*model.layers.{}.self_attn.qkv_proj.weight",
    ("gate/kernel", "up/kernel"): "*model.layers.{}.mlp.gate_up_proj.weight",
}

GATE_UP_NAMES = {("expert_gate/kernel", "expert_up/kernel"): "*model.layers.{}.experts.gate_up_proj"}

JOINED_LAYERS = {  # parameters whose layers are joined
    "token_embedding/embedding": "model.embed_tokens_per_layer.weight",
    "token_projection/kernel": "*model.per_layer_model_projection.weight",
}


class Part(NamedTuple):
    """Where a tensor lies in a joined tensor of a checkpoint."""

    joined: str  # name of the joined tensor
    shape: tuple[int, ...]  # of the joined tensor, without the axis of experts if `expert` is set
    axis: int  # the axis that the parts share
    first: int
    end: int
    expert: tuple[int, int] | None = None  # index on the leading axis and its size, if the tensor has all experts


class SplitSource:
    """A source of tensors whose joined tensors have the names of their parts.

    Raises:
        ValueError: a joined tensor has the wrong shape. Names `path` and the tensor.
    """

    def __init__(self, source: Any, config: ModelConfig, path: Path):
        self._source = source
        present = source.names()
        self._parts = {name: part for name, part in _parts_of(config).items() if part.joined in present}
        wrong = []
        for part in {part.joined: part for part in self._parts.values()}.values():
            expected = part.shape if part.expert is None else (part.expert[1], *part.shape)
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
        if part is None:
            return self._source.shape(name)
        return *part.shape[: part.axis], part.end - part.first, *part.shape[part.axis + 1 :]

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        part = self._parts.get(name)
        if part is None:
            return self._source.read(name, index)
        start, stop, _ = index[part.axis].indices(part.end - part.first)
        own = slice(part.first + start, part.first + stop)
        index = *index[: part.axis], own, *index[part.axis + 1 :]
        if part.expert is None:
            return self._source.read(part.joined, index)
        return self._source.read(part.joined, (slice(part.expert[0], part.expert[0] + 1), *index))[0]


def names_in_files(names: Iterable[str], config: ModelConfig) -> list[str]:
    """The tensors that checkpoints have, for names of parts that they have only in joined tensors."""
    always = {n: part.joined for n, part in _parts_of(config).items() if config.fused or not n.endswith(".weight")}
    return sorted({always.get(name, name) for name in names})


def _parts_of(config: ModelConfig) -> dict[str, Part]:
    """The parts of joined tensors that a checkpoint may have, by name."""
    names = tensor_names(config)
    parts: dict[str, Part] = {}
    for stack, own in stacks_of(config).items():
        if config.fused:
            parts |= _fused_parts(names, stack, own)
        if own.experts_beside_dense:
            parts |= _experts_beside_parts(names, stack, own)
        elif own.num_experts:
            parts |= _stacked_parts(names, stack, own)
    if config.token_features:
        parts |= _parts_of_layers(names, config)
    return parts


def _fused_parts(names: dict[str, TensorName], stack: str, config: ModelConfig) -> dict[str, Part]:
    heads = [count * config.head_dim for count in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    parts = {}
    for (fused, template), rows in zip(FUSED_NAMES.items(), (heads, [config.intermediate_size] * 2), strict=True):
        ends = np.cumsum(rows).tolist()
        for i in range(config.num_layers):
            for name, first, end in zip(fused, [0, *ends], ends, strict=False):
                own = names[f"{stack}/{name}"]
                joined = own._replace(template=template).of(i)
                parts[own.of(i)] = Part(joined, (ends[-1], config.hidden_size), 0, first, end)
    return parts


def _experts_beside_parts(names: dict[str, TensorName], stack: str, config: ModelConfig) -> dict[str, Part]:
    (fused, template), size = next(iter(GATE_UP_NAMES.items())), config.expert_size
    parts = {}
    for i in range(config.num_layers):
        for number, name in enumerate(fused):
            own = names[f"{stack}/{name}"]
            shape = config.num_experts, 2 * size, config.hidden_size
            first = number * size
            parts[own.of(i)] = Part(own._replace(template=template).of(i), shape, 1, first, first + size)
    return parts


def _stacked_parts(names: dict[str, TensorName], stack: str, config: ModelConfig) -> dict[str, Part]:
    """The experts' matrices in checkpoints that stack them, as transformers 5 does in memory."""
    size, hidden, count, parts = config.expert_size, config.hidden_size, config.num_experts, {}
    matrices = {  # where each is
        "expert_gate": ("gate_up_proj", (2 * size, hidden), 0, size),
        "expert_up": ("gate_up_proj", (2 * size, hidden), size, 2 * size),
        "expert_down": ("down_proj", (hidden, size), 0, hidden),
    }
    for kernel, (stored, shape, first, end) in matrices.items():
        own = names[f"{stack}/{kernel}/kernel"]
        for i, expert in np.ndindex(config.num_layers, count):
            joined = f"model.layers.{own.layers[i]}.mlp.experts.{stored}"
            parts[own.of(i, expert)] = Part(joined, shape, 0, first, end, (expert, count))
    own = names[f"{stack}/router/kernel"]
    if config.model_type == "mixtral":
        for i in range(config.num_layers):
            stored = own._replace(template=EXPERT_NAMES["router/kernel"]).of(i)
            parts[own.of(i)] = Part(stored, (count, hidden), 0, 0, count)
    return parts


def _parts_of_layers(names: dict[str, TensorName], config: ModelConfig) -> dict[str, Part]:
    """The parts that belong to the layers in tensors for all layers."""
    size, parts = config.token_features, {}
    width = config.num_layers * size
    shapes = [(config.vocab_size, width), (width, config.hidden_size)]
    for layer, (stack, i) in enumerate(places_of(config)):
        for (name, joined), shape, axis in zip(JOINED_LAYERS.items(), shapes, (1, 0), strict=True):
            own = Part(joined.lstrip("*"), shape, axis, layer * size, (layer + 1) * size)
            parts[names[f"{stack}/{name}"].of(i)] = own
    return parts


class Joined(NamedTuple):
    """Matrices that a checkpoint joins along the last axis; those of one layer or of all layers."""

    parts: tuple[Array, ...]  # layers on the leading axis
    places: tuple[tuple[int, int], ...] = ()  # part and index of each layer, if the layers are joined

    @property
    def shape(self) -> tuple[int, ...]:
        if self.places:
            return *self.parts[0].shape[1:-1], len(self.places) * self.parts[0].shape[-1]
        return *self.parts[0].shape[:-1], sum(part.shape[-1] for part in self.parts)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def tensor(self, place: tuple[int, ...]) -> np.ndarray:
        of = [self.parts[part][i] for part, i in self.places] if self.places else [part[place] for part in self.parts]
        return np.concatenate([np.asarray(one) for one in of], axis=-1)


def join(flat: Mapping[str, Array], config: ModelConfig) -> tuple[dict[str, "Array | Joined"], dict[str, TensorName]]:
    """Parameters as a checkpoint has them, and the names of their tensors."""
    names = tensor_names(config)
    joined: dict[str, Any] = dict(flat)
    for stack, own in stacks_of(config).items():
        templates = (FUSED_NAMES if config.fused else {}) | (GATE_UP_NAMES if own.experts_beside_dense else {})
        for fused, template in templates.items():
            one, *_ = paths = [f"{stack}/{name}" for name in fused]
            joined[one] = Joined(tuple(joined.pop(path) for path in paths))
            names[one] = names[one]._replace(template=template)
    if config.token_features:
        stacks = list(stacks_of(config))
        places = tuple((stacks.index(stack), i) for stack, i in places_of(config))
        for name, template in JOINED_LAYERS.items():
            joined[name] = Joined(tuple(joined.pop(f"{stack}/{name}") for stack in stacks), places)
            names[name] = TensorName(template)
    return joined, names
