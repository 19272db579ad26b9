"""One decoder for all model families; what differs between them is configuration, see `model_config.FAMILIES`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from tpaw_jax.models import adapters
from tpaw_jax.models.adapters import Lora
from tpaw_jax.models.attention import EINSUM, SAVED, Attention, Visibility, capped
from tpaw_jax.models.block import (
    Block,
    LayerInputs,
    RMSNorm,
    Scale,
    Shared,
    attention_context,
    embedding_multiplier,
    kind_of_layers,
    rotary_angles,
    scaled,
    stacked_by_kind,
)
from tpaw_jax.models.experts import RouterStatistics
from tpaw_jax.models.layer_stacks import cycles_of, has_one_stack, layers_with_experts, stacks_of
from tpaw_jax.models.model_config import ModelConfig
from tpaw_jax.models.parallel import UNSHARDED, Parallel, scan_layers
from tpaw_jax.models.parallel.context import check_groups, check_heads, exchanging_heads, own_tokens
from tpaw_jax.models.parallel.layer_scan import Order, Others, Stack
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
    """A decoder-only transformer: tokens -> logits.

    Layers with parameters of the same shapes are stacked on a leading axis, and run in a scan, see `layer_stacks`.

    Args:
        config: the architecture.
        dtype: compute dtype. Norms, softmax and logits are float32 in any case.
        param_dtype: dtype of newly initialized parameters.
        remat: rematerialization policy, a key of `REMAT_POLICIES`.
        attention: attention implementation for packed rows.
        parallel: how parameters are sharded, set by `split`. If they are, call the methods inside `shard_map`, with
            one device's rows and parameter shards.
        lora: which projections have adapters.
    """

    config: ModelConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    remat: str = "none"
    attention: Attention = EINSUM
    parallel: Parallel = UNSHARDED
    lora: Lora | None = None

    @property
    def local_config(self) -> ModelConfig:
        """The architecture with the heads and feed-forward features of one device."""
        c, tensor = self.config, self.parallel.tensor
        return dataclasses.replace(
            c,
            num_heads=c.num_heads // tensor,
            num_kv_heads=c.num_kv_heads // tensor,
            global_kv_heads=c.global_kv_heads // tensor,
            intermediate_size=c.intermediate_size // tensor,
            kv_shared_size=c.kv_shared_size // tensor,
            expert_size=c.expert_size // tensor,
            shared_expert_size=c.shared_expert_size // tensor,
        )

    def setup(self) -> None:
        c, parallel = self.config, self.parallel
        for stack, own in stacks_of(self.local_config).items():
            layers = nn.scan(
                Block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast),
                length=own.num_layers,
            )
            setattr(self, stack, layers(own, **self._block_options(stack)))
        shape = lambda name: parallel.local_shape(f"{name}/embedding", (c.vocab_size, c.hidden_size))
        table = lambda name: Embedding(shape(name), self.param_dtype)
        self.embed = table("embed")
        self.final_norm = RMSNorm(c.rms_norm_eps, self.param_dtype, c.norm_offset)
        if not c.tie_embeddings:
            self.head = table("head")
        if c.token_features:
            self.token_norm = Scale((c.token_features,), self.param_dtype)

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
    ) -> tuple[Float[Array, "B T D"], tuple[Any, Any]]:
        """Compute the hidden states of packed prompts, and the keys and values of the layers that compute any.

        Those are each [L, B, T, K, H], or a tuple of [B, T, K, H] if layers differ in their shapes.
        """
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

    def _block_options(self, stack):
        names = ("dtype", "param_dtype", "attention", "parallel", "lora")
        return {"stack": stack, **{name: getattr(self, name) for name in names}}

    @property
    def _head_name(self):
        return "embed" if self.config.tie_embeddings else "head"

    def _head(self):
        return getattr(self, self._head_name)()

    def _rows(self, tokens_BT, positions_BT, visibility, with_cache):
        c, split = self.config, self.parallel.context > 1
        own = lambda x: own_tokens(x, self.parallel.context) if split else jnp.asarray(x)
        tokens_BT, positions_BT = own(tokens_BT), own(positions_BT)
        inputs = self._inputs(tokens_BT, positions_BT, own(visibility.segment_ids), visibility)
        x_MD = self.parallel.embed(self.embed(), "embed/embedding", tokens_BT.reshape(-1), self.dtype)
        x_MD = scaled(x_MD, embedding_multiplier(c, self.dtype))
        shared = Shared(None, x_MD, self.token_norm()) if c.token_features else Shared()
        statistics = RouterStatistics(*jnp.zeros((3, len(tokens_BT)), jnp.float32)) if c.num_experts else None
        carry, cache, head = (x_MD, statistics), None, self._head()
        if self.is_initializing():
            carry = self._initialized(carry, shared, inputs)
        elif self.parallel.specs and not with_cache:
            carry, head = self._scan_sharded(carry, shared, inputs, head)
        else:
            carry, cache = self._scan(carry, shared, inputs, with_cache)
        x_MD, statistics = carry
        if statistics is not None:
            mean = jax.tree.map(lambda x: x / layers_with_experts(c), statistics)
            self.sow("router", "statistics", mean, reduce_fn=lambda _, new: new)
        hidden_MD = scaled(self.final_norm(x_MD), 1 / c.logits_scaling)
        return hidden_MD.reshape(*tokens_BT.shape, -1), cache, head

    def _inputs(self, tokens_BT, positions_BT, segment_ids_BT, visibility):
        """The `LayerInputs` of each stack."""
        live_M = (segment_ids_BT > 0).reshape(-1) if self.config.num_experts else None
        tokens_M = tokens_BT.reshape(-1) if self.config.token_features else None

        def of(own):
            context = stacked_by_kind(own, lambda kind: attention_context(self.attention, visibility, kind))
            return LayerInputs(rotary_angles(own, positions_BT), context, live_M, tokens_M)

        return {stack: of(own) for stack, own in stacks_of(self.config).items()}

    def _initialized(self, carry, shared, inputs):
        """Run each stack once to create its parameters; the output is meaningless if there are several."""
        for stack, own in stacks_of(self.local_config).items():
            shape = (*inputs[stack].angles[0].shape[-3:-1], own.num_kv_heads, own.head_dim)
            keys = jnp.zeros(shape, self.dtype)
            carry, _ = getattr(self, stack)(
                carry, kind_of_layers(own), shared._replace(keys_and_values=(keys, keys)), inputs[stack]
            )
        return carry

    def _apply(self, stack, own, prevent_cse=False):
        """The function of a layer of a stack: (parameters, carry, (shared, keys and values read), kind, inputs)."""
        block = Block(own, **self._block_options(stack), parent=None)

        def apply(params, carry, shared, kind, inputs):
            return block.apply({"params": params}, carry, kind, shared[0]._replace(keys_and_values=shared[1]), inputs)

        if self.remat == "none":
            return apply
        return jax.checkpoint(apply, policy=REMAT_POLICIES[self.remat], prevent_cse=prevent_cse)

    def _scan(self, carry, shared, inputs, with_cache):
        """Apply all layers in turn, and return the keys and values of those that compute them if `with_cache`."""
        c, kept, cache = self.config, {}, []
        stacks = stacks_of(self.local_config)
        stacked = {name: (getattr(self, name).variables["params"], kind_of_layers(own)) for name, own in stacks.items()}
        for cycle in cycles_of(c):
            once = cycle.repeats == 1  # then XLA runs no loop, and would merge the backward pass with the forward pass
            applies = {name: self._apply(name, own, prevent_cse=once) for name, own in stacks.items()}

            def repeat(carry, turn, cycle=cycle, applies=applies):
                outputs = []
                for member in cycle.members:
                    own, kind = member.of_turn(turn)
                    if self.parallel.specs:
                        own = self.parallel.layer(own, self.dtype, member.stack)
                    besides = shared, kept.get(member.reads)
                    carry, made = applies[member.stack](own, carry, besides, kind, inputs[member.stack])
                    outputs.append(made if with_cache or member.stores else None)
                return carry, outputs

            carry, outputs = jax.lax.scan(repeat, carry, cycle.turns(stacked), length=cycle.repeats)
            for member, made in zip(cycle.members, outputs, strict=True):
                if member.stores:
                    kept[member.stack] = jax.tree.map(lambda x: x[0], made)
            own_keys = [made for member, made in zip(cycle.members, outputs, strict=True) if member.reads is None]
            cache.append(own_keys)
        if not with_cache:
            return carry, None
        return carry, cache[0][0] if has_one_stack(c) else _in_order(cache)

    def _scan_sharded(self, carry, shared, inputs, head):
        trained, others, functions = {}, {}, []
        for stack, own in stacks_of(self.local_config).items():
            joined, split = self.parallel.join_attention(getattr(self, stack).variables["params"], stack)
            trained[stack], frozen = adapters.split(joined) if self.lora else (joined, {})
            others[stack] = Others(frozen, kind_of_layers(own))
            gather = lambda shards, split=split, stack=stack: split(self.parallel.layer(shards, self.dtype, stack))
            functions.append(Stack(stack, gather, self._apply(stack, own)))
        order = Order(tuple(functions), cycles_of(self.config))
        if self.lora is None:
            return scan_layers(order, (trained, others), carry, shared, inputs, head)
        return scan_layers(order, (trained, others), carry, shared, inputs, None)[0], head


def _in_order(cache: list[list[tuple[Array, Array]]]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """The keys and the values of layers in order, from those of the members of each cycle, stacked over its repeats."""
    cycles = [members for members in cache if members]  # others only read
    layers = [own for members in cycles for i in range(len(members[0][0])) for own in _of_repeat(members, i)]
    return tuple(keys for keys, _ in layers), tuple(values for _, values in layers)


def _of_repeat(members, i):
    return [(keys[i], values[i]) for keys, values in members]


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
    for own in stacks_of(c).values():
        if any(size % tensor for size in (own.num_heads, own.num_kv_heads, *own.feed_forward_sizes)):
            raise ValueError(
                f"{key} is {tensor}; it must divide the model's {own.num_heads} heads, its {own.num_kv_heads} "
                f"key-value heads and its {' and '.join(map(str, own.feed_forward_sizes))} feed-forward features."
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
    for own in stacks_of(c).values():
        check_heads(context, own.num_heads // tensor, own.num_kv_heads // tensor)
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
