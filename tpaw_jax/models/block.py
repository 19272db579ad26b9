"""One layer of the transformer, and what the kinds of layers of a model need."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from tpaw_jax.models import experts
from tpaw_jax.models.adapters import EXPERTS, Linear, Lora
from tpaw_jax.models.attention import Attention, Visibility
from tpaw_jax.models.model_config import LAYERS, LayerKind, ModelConfig
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


def rms_norm(x: Array, scale: Array | None, epsilon: float) -> Array:
    """Compute x / rms(x) * scale over the last axis, in float32."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)
    return (normed if scale is None else normed * scale.astype(jnp.float32)).astype(x.dtype)


def scaled(x: Array, factor: float) -> Array:
    """Compute x times a constant that is not rounded to the dtype of x; nothing if it is 1."""
    return x if factor == 1.0 else (x.astype(jnp.float32) * factor).astype(x.dtype)


class Shared(NamedTuple):
    """What layers take from before them, besides the carry."""

    keys_and_values: tuple[Array, Array] | None = None  # each [B, T, K, H], for layers that compute none
    embedded: Float[Array, "M D"] | None = None  # the embeddings of the tokens, for layers with `token_features`
    token_scale: Float[Array, "Q"] | None = None  # of the norm of their projection, one for all layers


class LayerInputs(NamedTuple):
    """What all layers of a stack take without gradient. Angles and context are of `stacked_by_kind`."""

    angles: tuple[Array, Array]
    context: Any
    live: Bool[Array, "M"] | None = None  # False for tokens of padding; only for experts
    tokens: Int[Array, "M"] | None = None  # only for `token_features`


class Block(nn.Module):
    """One layer: attention and a gated feed-forward. `config` is that of its stack."""

    config: ModelConfig
    dtype: DTypeLike
    param_dtype: DTypeLike
    attention: Attention
    parallel: Parallel
    stack: str = LAYERS
    lora: Lora | None = None

    def setup(self) -> None:
        c = self.config
        linear = lambda features, bias=False, total=None: Linear(
            features, bias, self.dtype, self.param_dtype, self.lora, total
        )
        total = self.parallel.reduce_from_tensor
        norm = lambda: RMSNorm(c.rms_norm_eps, self.param_dtype, c.norm_offset)
        if c.pre_norm:
            self.attention_norm, self.mlp_norm = norm(), norm()
        if c.post_norm:
            self.attention_post_norm, self.mlp_post_norm = norm(), norm()
        self.q, self.o = linear(c.num_heads * c.head_dim, c.qkv_bias), linear(c.hidden_size, total=total)
        if not c.reads_keys:
            self.k = linear(c.num_kv_heads * c.head_dim, c.qkv_bias)
        if not c.reads_keys and not c.keys_as_values:
            self.v = linear(c.num_kv_heads * c.head_dim, c.qkv_bias)
        if c.qk_norm or c.qk_norm_all:
            self.q_norm = norm()
        if (c.qk_norm or c.qk_norm_all) and not c.reads_keys:
            self.k_norm = norm()
        if c.dense_size:
            self.gate, self.up = linear(c.dense_size), linear(c.dense_size)
            self.down = linear(c.hidden_size, total=total)
        if c.num_experts:
            matrix = lambda *shape, **options: Kernel(shape, self.param_dtype, **options)
            held, size = c.num_experts // self.parallel.expert, c.expert_size
            own = {"lora": self.lora if self.lora is not None and EXPERTS in self.lora.targets else None}
            self.router = matrix(c.hidden_size, c.num_experts)
            self.expert_gate = matrix(held, c.hidden_size, size, **own)
            self.expert_up = matrix(held, c.hidden_size, size, **own, shares_a=True)
            self.expert_down = matrix(held, size, c.hidden_size, **own)
            if c.experts_beside_dense:
                self.router_norm, self.experts_norm, self.experts_post_norm = norm(), norm(), norm()
                self.dense_post_norm = norm()
                self.expert_scale = Scale((c.num_experts,), self.param_dtype)
            elif c.dense_size:
                self.shared_gate = matrix(c.hidden_size, 1)
        if c.token_features:
            shape = (c.vocab_size, c.token_features)
            self.token_embedding = TokenEmbedding(self.stack, shape, self.param_dtype, self.parallel)
            self.token_projection, self.token_gate = linear(c.token_features), linear(c.token_features)
            self.token_out, self.token_post_norm = linear(c.hidden_size), norm()
        if c.output_scale:
            self.output_scale = Scale((1,), self.param_dtype)

    def __call__(self, carry, kind, shared, inputs):
        """Apply the layer to packed rows; return the carry, and keys and values, each [B, T, K, H].

        The carry is x [M, D] and the sum of the layers' `RouterStatistics`, or None. `kind` is the layer's item of
        `kind_of_layers`.
        """
        c, (x_MD, statistics) = self.config, carry
        angles, context = select_kind((inputs.angles, inputs.context), kind)
        h_MD = self.parallel.copy_to_tensor(self.attention_norm(x_MD) if c.pre_norm else x_MD)
        q_BTNH = self._queries(h_MD, angles)
        k_BTKH, v_BTKH = shared.keys_and_values if c.reads_keys else self._keys_and_values(h_MD, angles)
        cap = {} if c.attention_cap is None else {"cap": c.attention_cap}
        x_MD = self._add_attention(x_MD, self.attention.attend(q_BTNH, k_BTKH, v_BTKH, context, **cap))
        x_MD, own = self._add_feed_forward(x_MD, inputs.live, rows=len(angles[0]))
        statistics = statistics if own is None else jax.tree.map(jnp.add, statistics, own)
        if c.token_features:
            x_MD += self._of_tokens(x_MD, shared, inputs.tokens)
        if c.output_scale:
            factor = jax.lax.stop_gradient(self.output_scale()).astype(jnp.float32)
            x_MD = (x_MD.astype(jnp.float32) * factor).astype(x_MD.dtype)
        return (x_MD, statistics), (k_BTKH, v_BTKH)

    # All tokens are on one axis, M = B T, so that XLA computes the weights' gradients as plain matmuls.
    def _queries(self, h_MD, angles):
        c, q_MF = self.config, self.q(h_MD)
        if c.qk_norm_all:
            q_MF = self.q_norm(q_MF)
        q_BTNH = q_MF.reshape(*angles[0].shape[:2], c.num_heads, c.head_dim)
        return scaled(rotate(self.q_norm(q_BTNH) if c.qk_norm else q_BTNH, angles), c.query_scale)

    def _keys_and_values(self, h_MD, angles):
        c, k_MF = self.config, self.k(h_MD)
        v_MF = k_MF if c.keys_as_values else self.v(h_MD)
        if c.qk_norm_all:
            k_MF = self.k_norm(k_MF)
        heads = lambda x_MF: x_MF.reshape(*angles[0].shape[:2], c.num_kv_heads, c.head_dim)
        k_BTKH, v_BTKH = self.k_norm(heads(k_MF)) if c.qk_norm else heads(k_MF), heads(v_MF)
        return rotate(k_BTKH, angles), rms_norm(v_BTKH, None, c.rms_norm_eps) if c.value_norm else v_BTKH

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
        if c.experts_beside_dense:
            out_MD, statistics = self._experts_beside(x_MD, out_MD, live, rows)
        elif c.num_experts:
            routed_MD, statistics = self._experts(h_MD, own_MD, live, rows)
            if c.dense_size:
                gate_D1 = self.shared_gate().astype(self.dtype)
                gate_M1 = jax.nn.sigmoid(jnp.dot(h_MD, gate_D1, preferred_element_type=jnp.float32))
                out_MD = (self.parallel.copy_to_tensor(gate_M1) * out_MD).astype(self.dtype)
            out_MD = self.parallel.reduce_from_tensor(out_MD + routed_MD)
        else:
            out_MD = self.parallel.reduce_from_tensor(out_MD)
        x_MD += scaled(self.mlp_post_norm(out_MD) if c.post_norm else out_MD, c.residual_multiplier)
        return x_MD, statistics

    def _experts_beside(self, x_MD, dense_MD, live, rows):
        """The sum of the normalized outputs of a dense feed-forward and of experts with norms of their own."""
        parallel, routed_MD = self.parallel, scaled(self.router_norm(x_MD), self.config.hidden_size**-0.5)
        own_MD = parallel.copy_to_tensor(self.experts_norm(x_MD))
        routed_MD, statistics = self._experts(routed_MD, own_MD, live, rows)
        dense_MD = self.dense_post_norm(parallel.reduce_from_tensor(dense_MD))
        return dense_MD + self.experts_post_norm(parallel.reduce_from_tensor(routed_MD)), statistics

    def _experts(self, h_MD, own_MD, live, rows):
        """The output of the routed experts, or a device's part of it, and statistics of the router, which reads h."""
        c, parallel = self.config, self.parallel
        routes, logits_ME = experts.route(h_MD, self.router().astype(self.dtype), live, c)
        weights = self._expert_weights()
        statistics = experts.router_statistics(routes, logits_ME, live, rows, parallel.sum_of_rows)
        if c.experts_beside_dense:
            routes = experts.scaled_routes(routes, self.expert_scale())
        routes = routes._replace(weights=parallel.copy_to_tensor(routes.weights))
        mixed_outputs = exchange.mixed_outputs if parallel.expert > 1 else experts.mixed_outputs
        return mixed_outputs(own_MD, routes, weights, ACTIVATIONS[c.activation]), statistics

    def _expert_weights(self):
        modules, lora = (self.expert_gate, self.expert_up, self.expert_down), self.lora
        kernels = (module().astype(self.dtype) for module in modules)
        if lora is None or EXPERTS not in lora.targets:
            return experts.ExpertWeights(*kernels)
        (gate_up_a, gate_b), (_, up_b), (down_a, down_b) = (module.adapter() for module in modules)
        of = experts.ExpertAdapters(gate_up_a, *(lora.scale * b for b in (gate_b, up_b)), down_a, lora.scale * down_b)
        return experts.ExpertWeights(*kernels, jax.tree.map(lambda x: x.astype(self.dtype), of))

    def _of_tokens(self, x_MD, shared, tokens_M):
        """What the layer's own embedding of the tokens adds, gated by x."""
        c = self.config
        embedded_MQ = self.token_embedding(tokens_M, self.dtype)
        projected_MQ = scaled(self.token_projection(shared.embedded), c.hidden_size**-0.5)
        own_MQ = token_features(projected_MQ, embedded_MQ, shared.token_scale, c)
        return self.token_post_norm(self.token_out(ACTIVATIONS[c.activation](self.token_gate(x_MD)) * own_MQ))


def token_features(
    projected: Float[Array, "M Q"], embedded: Float[Array, "M Q"], scale: Float[Array, "Q"], config: ModelConfig
) -> Float[Array, "M Q"]:
    """Combine the projection of a token's embedding with its own embedding of the layer (Gemma 3n and 4)."""
    normed = rms_norm(projected, scale, config.rms_norm_eps)
    return scaled(normed + scaled(embedded, config.token_features**0.5), 0.5**0.5)


class TokenEmbedding(nn.Module):
    """A layer's own embedding of the tokens, of which each device holds some columns."""

    stack: str
    shape: tuple[int, int]
    param_dtype: DTypeLike
    parallel: Parallel

    @nn.compact
    def __call__(self, tokens: Int[Array, "M"], dtype: DTypeLike) -> Float[Array, "M Q"]:
        name = f"{self.stack}/token_embedding/embedding"
        shape = self.parallel.local_shape(name, (1, *self.shape))[1:]
        table = self.param("embedding", nn.initializers.normal(self.shape[1] ** -0.5), shape, self.param_dtype)
        return self.parallel.embed(table, name, tokens, dtype)


class Scale(nn.Module):
    """Numbers that start at 1."""

    shape: tuple[int, ...]
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self) -> Float[Array, "*shape"]:
        return self.param("scale", nn.initializers.ones, self.shape, self.param_dtype)


class Kernel(nn.Module):
    """A matrix, or several stacked ones, which have adapters with `lora`; `shares_a`: another module has their A."""

    shape: tuple[int, ...]
    param_dtype: DTypeLike
    lora: Lora | None = None
    shares_a: bool = False

    def setup(self) -> None:
        *stacked, size, features = self.shape
        batch_axis = tuple(range(len(stacked)))
        initializer, lora = nn.initializers.lecun_normal(batch_axis=batch_axis), self.lora
        self.kernel = self.param("kernel", initializer, self.shape, self.param_dtype)
        if lora is None:
            return
        self.a = None
        if not self.shares_a:
            self.a = self.param("lora_a", lora.initializer(batch_axis), (*stacked, size, lora.rank), lora.dtype)
        self.b = self.param("lora_b", nn.initializers.zeros, (*stacked, lora.rank, features), lora.dtype)

    def __call__(self) -> Float[Array, "*shape"]:
        return self.kernel

    def adapter(self) -> tuple[Array | None, Array]:
        """A and B."""
        return self.a, self.b


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
