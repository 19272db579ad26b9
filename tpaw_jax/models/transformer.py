"""One decoder for Llama, Llama 3.1, Mistral without a window, Qwen2, Qwen2.5 and Qwen3: configurations, not classes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, PyTree

from tpaw_jax.models import cache as kv
from tpaw_jax.models.attention import (
    EINSUM,
    SAVED,
    Attention,
    RopeScaling,
    Visibility,
    attend,
    rope_angles,
    rope_frequencies,
    rotate,
    visible,
)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture, in Hugging Face's words."""

    model_type: str  # llama, mistral, qwen2 or qwen3: what config.json is written as
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    max_position_embeddings: int
    tie_embeddings: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_scaling: RopeScaling | None = None


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

REMAT_POLICIES = {  # from the least to recompute to the least to keep; what a layer's backward pass finds
    "none": None,  # every activation
    "dots": _dots,  # matmuls and attention
    "head": _dots,  # the same, but of the head's matmul nothing
    "offload": _offload,  # what dots keeps, in the host's memory
    "layer": _policies.nothing_saveable,  # each layer's input only
}

KEEPS_LOGITS = ("none", "dots")
"""Policies under which a gradient of the log-probs keeps the logits of the predictions, [B, P, V] float32."""


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, in float32."""

    epsilon: float
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
        return (normed * scale.astype(jnp.float32)).astype(x.dtype)


class Block(nn.Module):
    """One pre-norm layer: attention, then a gated SiLU feed-forward."""

    config: ModelConfig
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    attention: Attention

    @nn.compact
    def __call__(self, carry, layer, positions_BT, angles, context, slots_B):
        # Tokens of all rows stand on one axis M = B T: what XLA makes of the weights' gradients is then plain matmuls.
        x_MD, cache = carry
        c = self.config
        linear = lambda name, features, bias=False: nn.Dense(
            features, use_bias=bias, name=name, dtype=self.dtype, param_dtype=self.param_dtype
        )
        norm = lambda name: RMSNorm(c.rms_norm_eps, self.param_dtype, name=name)
        heads = lambda y, n: y.reshape(*positions_BT.shape, n, c.head_dim)

        h_MD = norm("attention_norm")(x_MD)
        q_BTNH = heads(linear("q", c.num_heads * c.head_dim, c.qkv_bias)(h_MD), c.num_heads)
        k_BTKH = heads(linear("k", c.num_kv_heads * c.head_dim, c.qkv_bias)(h_MD), c.num_kv_heads)
        v_BTKH = heads(linear("v", c.num_kv_heads * c.head_dim, c.qkv_bias)(h_MD), c.num_kv_heads)
        if c.qk_norm:
            q_BTNH, k_BTKH = norm("q_norm")(q_BTNH), norm("k_norm")(k_BTKH)
        q_BTNH, k_BTKH = rotate(q_BTNH, angles), rotate(k_BTKH, angles)

        if cache is None:
            out_BTNH = self.attention.attend(q_BTNH, k_BTKH, v_BTKH, context)
        else:
            cache = kv.write(cache, layer, slots_B, positions_BT, k_BTKH, v_BTKH)
            keys_BKCH, values_BKCH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
            if context.shape[2] != positions_BT.shape[1]:  # decoding: row s attends to all of slot s, itself among it
                keys_BKCH, values_BKCH = cache.keys[layer], cache.values[layer]
            out_BTNH = attend(q_BTNH, keys_BKCH, values_BKCH, context)
        x_MD += linear("o", c.hidden_size)(out_BTNH.reshape(x_MD.shape[0], -1))

        h_MD = norm("mlp_norm")(x_MD)
        gate_MF, up_MF = linear("gate", c.intermediate_size)(h_MD), linear("up", c.intermediate_size)(h_MD)
        x_MD += linear("down", c.hidden_size)(nn.silu(gate_MF) * up_MF)
        return (x_MD, cache), None


class Transformer(nn.Module):
    """tokens -> logits. Layers are stacked on a leading axis and run under `nn.scan`.

    `dtype` is the compute dtype (norms, softmax and logits stay float32), `param_dtype` that of new parameters, `remat`
    a name in `REMAT_POLICIES`, `attention` that of whole rows (without a cache).
    """

    config: ModelConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    attention: Attention = EINSUM

    def setup(self) -> None:
        c = self.config
        block = Block
        if self.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.num_layers,
        )(c, self.dtype, self.param_dtype, self.attention)
        self.embed = nn.Embed(c.vocab_size, c.hidden_size, dtype=self.dtype, param_dtype=self.param_dtype)
        self.final_norm = RMSNorm(c.rms_norm_eps, self.param_dtype)
        if not c.tie_embeddings:
            self.head = nn.Embed(c.vocab_size, c.hidden_size, dtype=self.dtype, param_dtype=self.param_dtype)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Float32 logits. Rows are one causal sequence each, or several packed ones named by `segment_ids`."""
        return self.logits(self.hidden(tokens, positions, segment_ids))

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        branch_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """The final hidden states, normed; `branch_ids` packs prefix trees (see `Visibility`)."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        context = self.attention.prepare(Visibility(segment_ids, branch_ids))
        return self._run(tokens, positions, context, None, None)[0]

    def prefill(
        self, tokens: Int[Array, "B T"], cache: kv.KVCache, slots: Int[Array, "B"]
    ) -> tuple[Float[Array, "B T D"], kv.KVCache]:
        """Hidden states of prompts that start at position 0, and the cache with them written to `slots`."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return self._run(tokens, positions, visible(Visibility(jnp.ones_like(tokens))), cache, slots)

    def decode(
        self, tokens: Int[Array, "S"], positions: Int[Array, "S"], cache: kv.KVCache
    ) -> tuple[Float[Array, "S D"], kv.KVCache]:
        """Hidden states of one further token a slot, and the cache with it written at `positions`."""
        mask_SC = jnp.arange(cache.keys.shape[3]) <= positions[:, None]
        slots = jnp.arange(tokens.shape[0])
        hidden_S1D, cache = self._run(tokens[:, None], positions[:, None], mask_SC[:, None], cache, slots)
        return hidden_S1D[:, 0], cache

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Float32 logits of hidden states."""
        table = (self.embed if self.config.tie_embeddings else self.head).embedding.astype(self.dtype)
        return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)

    def _run(self, tokens_BT, positions_BT, context, cache, slots_B):
        c = self.config
        angles = rope_angles(jnp.asarray(positions_BT), rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling))
        carry = (self.embed(tokens_BT.reshape(-1)), cache)
        (x_MD, cache), _ = self.layers(carry, jnp.arange(c.num_layers), positions_BT, angles, context, slots_B)
        if self.is_initializing() and not c.tie_embeddings:
            self.head(tokens_BT)
        return self.final_norm(x_MD).reshape(*tokens_BT.shape, -1), cache


def head_table(params: PyTree[Array]) -> Float[Array, "V D"]:
    """The output embedding: the head's own table, or the input embedding where they are tied."""
    return params.get("head", params["embed"])["embedding"]
