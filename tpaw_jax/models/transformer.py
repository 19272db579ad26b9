"""One decoder for all model families; what differs between them is configuration, see `model_config.FAMILIES`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from tpaw_jax.models.attention import EINSUM, SAVED, Attention, Visibility
from tpaw_jax.models.context import check_groups, check_heads, exchanging_heads, own_tokens
from tpaw_jax.models.layer_scan import scan_layers
from tpaw_jax.models.model_config import LayerKind, ModelConfig
from tpaw_jax.models.parallel import UNSHARDED, Parallel
from tpaw_jax.models.rope import attention_factor, rope_angles, rope_frequencies, rotate
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


_dots = _policies.save_from_both_policies(_is_matmul, _policies.save_only_these_names(SAVED))

REMAT_POLICIES = {  # what the forward pass keeps for the backward pass, from most memory to least
    "none": None,  # all activations
    "dots": _dots,  # results of matmuls and attention
    "head": _dots,  # like dots, but no logits
    "offload": _offload,  # like head, in host memory
    "layer": _policies.nothing_saveable,  # only the input of each layer
}

KEEPS_LOGITS = ("none", "dots")
"""Policies under which the forward pass keeps the logits of the predictions, [B, P, V] float32."""


ACTIVATIONS = {"silu": nn.silu, "gelu_pytorch_tanh": nn.gelu}  # flax's gelu is the tanh approximation


class RMSNorm(nn.Module):
    """RMS normalization with a learned scale, to which `offset` is added, over the last axis, in float32."""

    epsilon: float
    param_dtype: DTypeLike
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        scale = self.param("scale", nn.initializers.constant(1.0 - self.offset), (x.shape[-1],), self.param_dtype)
        return rms_norm(x, with_offset(scale, self.offset), self.epsilon)


def with_offset(scale: Array, offset: float) -> Array:
    """Compute the scale of a norm in float32 if an offset is added."""
    return scale.astype(jnp.float32) + offset if offset else scale


def rms_norm(x: Array, scale: Array, epsilon: float) -> Array:
    """Compute x / rms(x) * scale over the last axis, in float32."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)
    return (normed * scale.astype(jnp.float32)).astype(x.dtype)


def scaled(x: Array, factor: float) -> Array:
    """Compute x times a constant that is not rounded to the dtype of x; nothing if it is 1."""
    return x if factor == 1.0 else (x.astype(jnp.float32) * factor).astype(x.dtype)


class Block(nn.Module):
    """One layer: attention and a gated feed-forward."""

    config: ModelConfig
    dtype: DTypeLike
    param_dtype: DTypeLike
    attention: Attention
    parallel: Parallel

    def setup(self) -> None:
        c = self.config
        linear = lambda features, bias=False: nn.Dense(
            features, use_bias=bias, dtype=self.dtype, param_dtype=self.param_dtype
        )
        norm = lambda: RMSNorm(c.rms_norm_eps, self.param_dtype, c.norm_offset)
        if c.pre_norm:
            self.attention_norm, self.mlp_norm = norm(), norm()
        if c.post_norm:
            self.attention_post_norm, self.mlp_post_norm = norm(), norm()
        self.q = linear(c.num_heads * c.head_dim, c.qkv_bias)
        self.k = linear(c.num_kv_heads * c.head_dim, c.qkv_bias)
        self.v = linear(c.num_kv_heads * c.head_dim, c.qkv_bias)
        self.o = linear(c.hidden_size)
        if c.qk_norm or c.qk_norm_all:
            self.q_norm, self.k_norm = norm(), norm()
        self.gate, self.up = linear(c.intermediate_size), linear(c.intermediate_size)
        self.down = linear(c.hidden_size)

    def __call__(self, x_MD, kind, angles, context, with_cache):
        """Apply the layer to packed rows; `with_cache` also returns keys and values, each [B, T, K, H].

        `kind` is the layer's item of `kind_of_layers`; angles and context are of `stacked_by_kind`.
        """
        angles, context = select_kind((angles, context), kind)
        q_BTNH, k_BTKH, v_BTKH = self._project(x_MD, angles)
        x_MD = self._finish(x_MD, self.attention.attend(q_BTNH, k_BTKH, v_BTKH, context))
        return x_MD, (k_BTKH, v_BTKH) if with_cache else None

    def _project(self, x_MD, angles):
        # All tokens are on one axis, M = B T, so that XLA computes the weights' gradients as plain matmuls.
        c, rows = self.config, angles[0].shape[:2]
        h_MD = self.parallel.copy_to_tensor(self.attention_norm(x_MD) if c.pre_norm else x_MD)
        q_MF, k_MF, v_MF = self.q(h_MD), self.k(h_MD), self.v(h_MD)
        if c.qk_norm_all:
            q_MF, k_MF = self.q_norm(q_MF), self.k_norm(k_MF)
        q_BTNH = q_MF.reshape(*rows, c.num_heads, c.head_dim)
        k_BTKH, v_BTKH = (x_MF.reshape(*rows, c.num_kv_heads, c.head_dim) for x_MF in (k_MF, v_MF))
        if c.qk_norm:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        return scaled(rotate(q_BTNH, angles), c.query_scale), rotate(k_BTKH, angles), v_BTKH

    def _finish(self, x_MD, attended):
        c, reduce = self.config, self.parallel.reduce_from_tensor
        out_MD = reduce(self.o(attended.reshape(x_MD.shape[0], -1)))
        x_MD += scaled(self.attention_post_norm(out_MD) if c.post_norm else out_MD, c.residual_multiplier)
        h_MD = self.parallel.copy_to_tensor(self.mlp_norm(x_MD) if c.pre_norm else x_MD)
        out_MD = reduce(self.down(ACTIVATIONS[c.activation](self.gate(h_MD)) * self.up(h_MD)))
        return x_MD + scaled(self.mlp_post_norm(out_MD) if c.post_norm else out_MD, c.residual_multiplier)


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
        )

    def setup(self) -> None:
        c, parallel = self.config, self.parallel
        block = Block
        if parallel.specs:
            gather = lambda variables: {"params": parallel.layer(variables["params"], self.dtype)}
            block = nn.map_variables(Block, "params", gather)
        if self.remat != "none":
            block = nn.remat(block, policy=REMAT_POLICIES[self.remat], prevent_cse=False, static_argnums=(5,))
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
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
        return self.parallel.whole_vocabulary(logits, name)

    @property
    def _head_name(self):
        return "embed" if self.config.tie_embeddings else "head"

    def _head(self):
        return getattr(self, self._head_name)()

    def _rows(self, tokens_BT, positions_BT, visibility, with_cache):
        context = stacked_by_kind(self.config, lambda kind: attention_context(self.attention, visibility, kind))
        if self.parallel.context > 1:
            tokens_BT, positions_BT = (own_tokens(x, self.parallel.context) for x in (tokens_BT, positions_BT))
        angles = rotary_angles(self.config, positions_BT)
        x_MD = self.parallel.embed(self.embed(), "embed/embedding", tokens_BT.reshape(-1), self.dtype)
        x_MD = scaled(x_MD, embedding_multiplier(self.config, self.dtype))
        cache, head = None, self._head()
        if self.parallel.specs and not with_cache:
            x_MD, head = self._scan_sharded(x_MD, (angles, context), head)
        else:
            x_MD, cache = self.layers(x_MD, kind_of_layers(self.config), angles, context, with_cache)
        hidden_MD = scaled(self.final_norm(x_MD), 1 / self.config.logits_scaling)
        return hidden_MD.reshape(*tokens_BT.shape, -1), cache, head

    def _scan_sharded(self, x_MD, inputs, head):
        block = Block(self.local_config, self.dtype, self.param_dtype, self.attention, self.parallel, parent=None)
        apply = lambda params, *inputs: block.apply({"params": params}, *inputs, False)[0]
        if self.remat != "none":
            apply = jax.checkpoint(apply, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        params, split = self.parallel.join_attention(self.layers.variables["params"])
        gather = lambda shards: split(self.parallel.layer(shards, self.dtype))
        return scan_layers(gather, apply, (params, kind_of_layers(self.config)), x_MD, inputs, head)


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
        reduce_dtype: dtype in which gradients are reduced over `fsdp`.
        key: configuration key of the tensor axis's size, for error messages.
        context: devices of `fsdp` that share rows.

    Raises:
        ValueError: the tensor axis or `context` does not divide the number of heads or feed-forward features, or the
            model cannot be split over the tensor axis.
    """
    c, tensor = model.config, mesh.shape["tensor"]
    if c.num_heads % tensor or c.num_kv_heads % tensor or c.intermediate_size % tensor:
        raise ValueError(
            f"{key} is {tensor}; it must divide the model's {c.num_heads} heads, its {c.num_kv_heads} key-value "
            f"heads and its {c.intermediate_size} feed-forward features."
        )
    if c.qk_norm_all and tensor > 1:
        raise ValueError(
            f"{key} is {tensor}; it must be 1 for {c.model_type} models, which normalize all heads together."
        )
    specs = {name: spec for name, spec in sharding.param_specs(params, mesh).items() if any(spec)}
    slices = tpu.slice_count(list(mesh.devices.flat))
    parallel = Parallel(specs, tensor, context, reduce_dtype, sharding.scatter_stages(mesh), slices=slices)
    if context == 1:
        return model.clone(parallel=parallel)
    check_groups(context, mesh)
    check_heads(context, c.num_heads // tensor, c.num_kv_heads // tensor)
    return model.clone(parallel=parallel, attention=exchanging_heads(model.attention, context))


def embedding_multiplier(config: ModelConfig, dtype: DTypeLike) -> float:
    """Return what embeddings are multiplied by, for a model that computes in `dtype`."""
    factor = config.embedding_multiplier
    return float(np.asarray(factor, dtype)) if config.rounded_multiplier else factor


def kind_of_layers(config: ModelConfig) -> Int[Array, "L"] | None:
    """The kind of each layer, an index into `config.kinds`; None if all are of one kind."""
    kinds = config.kinds
    return None if len(kinds) == 1 else jnp.array([kinds.index(kind) for kind in config.layer_kinds])


def stacked_by_kind(config: ModelConfig, make: Callable[[LayerKind], Any]) -> Any:
    """What each kind of layer needs, stacked on a leading axis; without that axis if all layers are of one kind."""
    made = [make(kind) for kind in config.kinds]
    return made[0] if len(made) == 1 else jax.tree.map(lambda *x: jnp.stack(x), *made)


def select_kind(stacked: Any, kind: Int[Array, ""] | int | None) -> Any:
    """Select what a kind of layer needs from the result of `stacked_by_kind`."""
    return stacked if kind is None else jax.tree.map(lambda x: x[kind], stacked)


def attention_context(attention: Attention, visibility: Visibility, kind: LayerKind) -> Any:
    """What `attention` prepares for a kind of layer."""
    return attention.prepare(visibility) if kind.window is None else attention.prepare(visibility, kind.window)


def rotary_angles(config: ModelConfig, positions: Int[Array, "B T"]) -> tuple[Array, Array]:
    """Compute cos and sin of the rotary embedding at `positions` for `stacked_by_kind`, each [B, T, H/2] float32."""

    def of(kind: LayerKind) -> tuple[Array, Array]:
        if kind.rope_theta is None:
            zeros = jnp.zeros((*positions.shape, config.head_dim // 2), jnp.float32)
            return zeros + 1, zeros
        frequencies = rope_frequencies(config.head_dim, kind.rope_theta, kind.rope_scaling)
        factor = attention_factor(kind.rope_scaling)
        cos, sin = rope_angles(jnp.asarray(positions), frequencies)
        return scaled(cos, factor), scaled(sin, factor)

    return stacked_by_kind(config, of)


def head_name(params: PyTree[Array]) -> str:
    """Return the flax path of the output embedding, which is the input embedding if the two are tied."""
    return "head/embedding" if "head" in params else "embed/embedding"


def head_table(params: PyTree[Array]) -> Float[Array, "V D"]:
    """Return the output embedding."""
    return params[head_name(params).split("/")[0]]["embedding"]
