"""One decoder for all model families; what differs between them is configuration, see `model_config.FAMILIES`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from tpaw_jax.models.attention import EINSUM, SAVED, Attention, Visibility, capped
from tpaw_jax.models.block import (
    Block,
    RMSNorm,
    attention_context,
    embedding_multiplier,
    kind_of_layers,
    rotary_angles,
    scaled,
    stacked_by_kind,
)
from tpaw_jax.models.experts import RouterStatistics
from tpaw_jax.models.model_config import ModelConfig
from tpaw_jax.models.parallel import UNSHARDED, Parallel, scan_layers
from tpaw_jax.models.parallel.context import check_groups, check_heads, exchanging_heads, own_tokens
from tpaw_jax.runtime import sharding, tpu
from tpaw_jax.types import TreeBatch

_policies = jax.checkpoint_policies
_is_matmul = _policies.dots_with_no_batch_dims_saveable
_to_host = {"offload_src": "device", "offload_dst": "pinned_host"}
_offload_matmul = _policies.offload_dot_with_no_batch_dims(**_to_host)
_offload_attention = _policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[], names_which_can_be_offloaded=[SAVED], **_to_host
)


def _offload(primitive, *arguments, **parameters):
    rule = _offload_matmul if _is_matmul(primitive, *arguments, **parameters) else _offload_attention
    return rule(primitive, *arguments, **parameters)


def _is_ragged_matmul(primitive, *_, **__):
    return str(primitive) == "ragged_dot_general"


_saved = _policies.save_from_both_policies(_is_matmul, _policies.save_only_these_names(SAVED))
_dots = _policies.save_from_both_policies(_saved, _is_ragged_matmul)

REMAT_POLICIES = {  # what the forward pass keeps for the backward pass, from most memory to least
    "none": None,  # all activations
    "dots": _dots,  # results of matmuls and attention
    "head": _dots,  # like dots, but no logits
    "offload": _offload,  # like head, in host memory
    "layer": _policies.nothing_saveable,  # only the input of each layer
}

KEEPS_LOGITS = ("none", "dots")
"""Policies under which the forward pass keeps the logits of the predictions, [B, P, V] float32."""


class Embedding(nn.Module):
    """A token embedding table, or a device's shard of one."""

    shape: tuple[int, ...]  # (vocabulary, features)
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self) -> Float[Array, "v d"]:
        return self.param("embedding", nn.initializers.normal(self.shape[1] ** -0.5), self.shape, self.param_dtype)


class Transformer(nn.Module):
    """A decoder-only transformer: tokens -> logits. Layers are stacked on a leading axis and run under `nn.scan`.

    Args:
        config: the architecture.
        dtype: compute dtype. Norms, softmax and logits are float32 in any case.
        param_dtype: dtype of newly initialized parameters.
        remat: rematerialization policy, a key of `REMAT_POLICIES`.
        attention: attention implementation for packed rows.
        parallel: how parameters are sharded, set by `split`. If they are, call the methods inside `shard_map`, with
            one device's rows and parameter shards.
    """

    config: ModelConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    remat: str = "none"
    attention: Attention = EINSUM
    parallel: Parallel = UNSHARDED

    @property
    def local_config(self) -> ModelConfig:
        """The architecture with the heads and feed-forward features of one device."""
        c, tensor = self.config, self.parallel.tensor
        return dataclasses.replace(
            c,
            num_heads=c.num_heads // tensor,
            num_kv_heads=c.num_kv_heads // tensor,
            intermediate_size=c.intermediate_size // tensor,
            expert_size=c.expert_size // tensor,
            shared_expert_size=c.shared_expert_size // tensor,
        )

    def setup(self) -> None:
        c, parallel = self.config, self.parallel
        block = Block
        if parallel.specs:
            gather = lambda variables: {"params": parallel.layer(variables["params"], self.dtype)}
            block = nn.map_variables(Block, "params", gather)
        if self.remat != "none":
            block = nn.remat(block, policy=REMAT_POLICIES[self.remat], prevent_cse=False, static_argnums=(6,))
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, *[nn.broadcast] * 4),
            length=c.num_layers,
        )(self.local_config, self.dtype, self.param_dtype, self.attention, parallel)
        shape = lambda name: parallel.local_shape(f"{name}/embedding", (c.vocab_size, c.hidden_size))
        table = lambda name: Embedding(shape(name), self.param_dtype)
        self.embed = table("embed")
        self.final_norm = RMSNorm(c.rms_norm_eps, self.param_dtype, c.norm_offset)
        if not c.tie_embeddings:
            self.head = table("head")

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Compute float32 logits. A row is one causal sequence, or several packed ones if `segment_ids` is given."""
        return self.logits(self.hidden(tokens, positions, segment_ids))

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Compute the final hidden states of rows of sequences, normalized and divided by `logits_scaling`."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        return self._rows(tokens, positions, Visibility(segment_ids), with_cache=False)[0]

    def prefill(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
        """Compute the hidden states of packed prompts, and their keys and values, each [L, B, T, K, H]."""
        return self._rows(tokens, positions, Visibility(segment_ids), with_cache=True)[:2]

    def hidden_and_head(self, batch: TreeBatch) -> tuple[Float[Array, "B T D"], Float[Array, "v D"]]:
        """Compute the hidden states of packed trees, and all columns of the output embedding in the compute dtype.

        With context parallelism, the hidden states are those of the device's part of the tokens.
        """
        hidden, _, head = self._rows(batch.tokens, batch.positions, Visibility.of(batch), with_cache=False)
        return hidden, self.parallel.table(head, f"{self._head_name}/embedding", self.dtype)

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Compute float32 logits from hidden states."""
        name = f"{self._head_name}/embedding"
        table = self.parallel.table(self._head(), name, self.dtype)
        logits = jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
        return self.parallel.whole_vocabulary(capped(logits, self.config.logits_cap), name)

    @property
    def _head_name(self):
        return "embed" if self.config.tie_embeddings else "head"

    def _head(self):
        return getattr(self, self._head_name)()

    def _rows(self, tokens_BT, positions_BT, visibility, with_cache):
        context = stacked_by_kind(self.config, lambda kind: attention_context(self.attention, visibility, kind))
        own = lambda x: own_tokens(x, self.parallel.context) if self.parallel.context > 1 else jnp.asarray(x)
        tokens_BT, positions_BT = own(tokens_BT), own(positions_BT)
        angles = rotary_angles(self.config, positions_BT)
        x_MD = self.parallel.embed(self.embed(), "embed/embedding", tokens_BT.reshape(-1), self.dtype)
        x_MD = scaled(x_MD, embedding_multiplier(self.config, self.dtype))
        live_M = statistics = None
        if self.config.num_experts:
            live_M = (own(visibility.segment_ids) > 0).reshape(-1)
            statistics = RouterStatistics(*jnp.zeros((3, len(tokens_BT)), jnp.float32))
        cache, head, inputs = None, self._head(), (angles, context, live_M)
        if self.parallel.specs and not with_cache:
            (x_MD, statistics), head = self._scan_sharded((x_MD, statistics), inputs, head)
        else:
            (x_MD, statistics), cache = self.layers(
                (x_MD, statistics), kind_of_layers(self.config), *inputs, with_cache
            )
        if statistics is not None:
            self.sow("router", "statistics", statistics, reduce_fn=lambda _, new: new)
        hidden_MD = scaled(self.final_norm(x_MD), 1 / self.config.logits_scaling)
        return hidden_MD.reshape(*tokens_BT.shape, -1), cache, head

    def _scan_sharded(self, carry, inputs, head):
        block = Block(self.local_config, self.dtype, self.param_dtype, self.attention, self.parallel, parent=None)
        apply = lambda params, *inputs: block.apply({"params": params}, *inputs, False)[0]
        if self.remat != "none":
            apply = jax.checkpoint(apply, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        params, split = self.parallel.join_attention(self.layers.variables["params"])
        gather = lambda shards: split(self.parallel.layer(shards, self.dtype))
        return scan_layers(gather, apply, (params, kind_of_layers(self.config)), carry, inputs, head)


def shard_model(
    model: Transformer,
    params: PyTree[Any],
    mesh: Mesh,
    reduce_dtype: str = "float32",
    key: str = "mesh.tensor",
    *,
    context: int = 1,
) -> Transformer:
    """Prepare a model for use inside `shard_map`, with parameters sharded by `sharding.PARAM_AXES`.

    Args:
        model: the model.
        params: its parameters, or their shapes.
        mesh: the mesh they are sharded over.
        reduce_dtype: dtype in which gradients are reduced over `fsdp` and `expert`.
        key: configuration key of the tensor axis's size, for error messages.
        context: devices of `fsdp` that share rows.

    Raises:
        ValueError: the tensor axis or `context` does not divide the number of heads or feed-forward features, or the
            model cannot be split over the tensor axis.
    """
    c, tensor = model.config, mesh.shape["tensor"]
    if any(size % tensor for size in (c.num_heads, c.num_kv_heads, *c.feed_forward_sizes)):
        raise ValueError(
            f"{key} is {tensor}; it must divide the model's {c.num_heads} heads, its {c.num_kv_heads} key-value "
            f"heads and its {' and '.join(map(str, c.feed_forward_sizes))} feed-forward features."
        )
    if c.qk_norm_all and tensor > 1:
        raise ValueError(
            f"{key} is {tensor}; it must be 1 for {c.model_type} models, which normalize all heads together."
        )
    expert = _check_experts(c, mesh, context)
    specs = {name: spec for name, spec in sharding.param_specs(params, mesh).items() if any(spec)}
    slices = tpu.slice_count(list(mesh.devices.flat))
    parallel = Parallel(
        specs, tensor, context, reduce_dtype, sharding.scatter_stages(mesh), slices=slices, expert=expert
    )
    if context == 1:
        return model.clone(parallel=parallel)
    check_groups(context, mesh)
    check_heads(context, c.num_heads // tensor, c.num_kv_heads // tensor)
    return model.clone(parallel=parallel, attention=exchanging_heads(model.attention, context))


def _check_experts(config: ModelConfig, mesh: Mesh, context: int) -> int:
    """The size of the mesh's `expert` axis, if it suits the model."""
    expert, experts = mesh.shape["expert"], config.num_experts
    if expert > 1 and (not experts or experts % expert):
        raise ValueError(
            f"mesh.expert is {expert}; it must divide the experts of a layer, and this {config.model_type} model has "
            f"{experts or 'none'}."
        )
    if expert > 1 and context > 1:
        raise ValueError(f"mesh.context is {context} and mesh.expert is {expert}; one of them must be 1.")
    return expert


def head_name(params: PyTree[Array]) -> str:
    """Return the flax path of the output embedding, which is the input embedding if the two are tied."""
    return "head/embedding" if "head" in params else "embed/embedding"


def head_table(params: PyTree[Array]) -> Float[Array, "V D"]:
    """Return the output embedding."""
    return params[head_name(params).split("/")[0]]["embedding"]
