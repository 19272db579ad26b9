"""One layer of the transformer, and what the kinds of layers of a model need."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from tpaw_jax.models import experts
from tpaw_jax.models.attention import Attention, Visibility
from tpaw_jax.models.model_config import LayerKind, ModelConfig
from tpaw_jax.models.parallel import Parallel, exchange
from tpaw_jax.models.rope import attention_factor, rope_angles, rope_frequencies, rotate

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
        if c.dense_size:
            self.gate, self.up = linear(c.dense_size), linear(c.dense_size)
            self.down = linear(c.hidden_size)
        if c.num_experts:
            matrix = lambda *shape: Kernel(shape, self.param_dtype)
            held, size = c.num_experts // self.parallel.expert, c.expert_size
            self.router = matrix(c.hidden_size, c.num_experts)
            self.expert_gate, self.expert_up = (matrix(held, c.hidden_size, size) for _ in range(2))
            self.expert_down = matrix(held, size, c.hidden_size)
            if c.dense_size:
                self.shared_gate = matrix(c.hidden_size, 1)

    def __call__(self, carry, kind, angles, context, live, with_cache):
        """Apply the layer to packed rows; `with_cache` also returns keys and values, each [B, T, K, H].

        The carry is x [M, D] and the sum of the layers' `RouterStatistics`, or None. `kind` is the layer's item of
        `kind_of_layers`; angles and context are of `stacked_by_kind`; `live` [M] is False for tokens of padding.
        """
        x_MD, statistics = carry
        angles, context = select_kind((angles, context), kind)
        q_BTNH, k_BTKH, v_BTKH = self._project(x_MD, angles)
        cap = {} if self.config.attention_cap is None else {"cap": self.config.attention_cap}
        x_MD = self._add_attention(x_MD, self.attention.attend(q_BTNH, k_BTKH, v_BTKH, context, **cap))
        x_MD, own = self._add_feed_forward(x_MD, live, rows=len(angles[0]))
        statistics = None if own is None else jax.tree.map(jnp.add, statistics, own)
        return (x_MD, statistics), (k_BTKH, v_BTKH) if with_cache else None

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

    def _add_attention(self, x_MD, attended):
        c = self.config
        out_MD = self.parallel.reduce_from_tensor(self.o(attended.reshape(x_MD.shape[0], -1)))
        return x_MD + scaled(self.attention_post_norm(out_MD) if c.post_norm else out_MD, c.residual_multiplier)

    def _add_feed_forward(self, x_MD, live, rows):
        c, statistics = self.config, None
        h_MD = self.mlp_norm(x_MD) if c.pre_norm else x_MD
        own_MD, out_MD = self.parallel.copy_to_tensor(h_MD), 0
        if c.dense_size:
            out_MD = self.down(ACTIVATIONS[c.activation](self.gate(own_MD)) * self.up(own_MD))
        if c.num_experts:
            routed_MD, statistics = self._experts(h_MD, own_MD, live, rows)
            if c.dense_size:
                gate_D1 = self.shared_gate().astype(self.dtype)
                gate_M1 = jax.nn.sigmoid(jnp.dot(h_MD, gate_D1, preferred_element_type=jnp.float32))
                out_MD = (self.parallel.copy_to_tensor(gate_M1) * out_MD).astype(self.dtype)
            out_MD = out_MD + routed_MD
        out_MD = self.parallel.reduce_from_tensor(out_MD)
        x_MD += scaled(self.mlp_post_norm(out_MD) if c.post_norm else out_MD, c.residual_multiplier)
        return x_MD, statistics

    def _experts(self, h_MD, own_MD, live, rows):
        """The output of the routed experts, or a device's part of it, and the layer's share of the statistics."""
        c, parallel = self.config, self.parallel
        routes, logits_ME = experts.route(h_MD, self.router().astype(self.dtype), live, c)
        matrices = (self.expert_gate(), self.expert_up(), self.expert_down())
        weights = experts.ExpertWeights(*(matrix.astype(self.dtype) for matrix in matrices))
        statistics = experts.router_statistics(routes, logits_ME, live, rows, parallel.sum_of_rows)
        routes = routes._replace(weights=parallel.copy_to_tensor(routes.weights))
        mixed_outputs = exchange.mixed_outputs if parallel.expert > 1 else experts.mixed_outputs
        out_MD = mixed_outputs(own_MD, routes, weights, ACTIVATIONS[c.activation])
        return out_MD, jax.tree.map(lambda x: x / c.num_layers, statistics)


class Kernel(nn.Module):
    """A matrix, or several stacked ones."""

    shape: tuple[int, ...]
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self) -> Float[Array, "*shape"]:
        initializer = nn.initializers.lecun_normal(batch_axis=tuple(range(len(self.shape) - 2)))
        return self.param("kernel", initializer, self.shape, self.param_dtype)


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
            zeros = jnp.zeros((*positions.shape, config.rotary_size // 2), jnp.float32)
            return zeros + 1, zeros
        frequencies = rope_frequencies(config.rotary_size, kind.rope_theta, kind.rope_scaling, config.rope_length)
        factor = attention_factor(kind.rope_scaling)
        cos, sin = rope_angles(jnp.asarray(positions), frequencies)
        return scaled(cos, factor), scaled(sin, factor)

    return stacked_by_kind(config, of)
