"""The key-value cache of the sampler: a fixed number of slots, each holding one sequence from position 0.

A slot is refilled by writing over it: which of its positions count is known by the sampler alone.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int

BLOCK = 64
"""Positions that attention reads at a time, up to the last one that any slot has reached."""


class LayerCache(struct.PyTreeNode):
    """Keys and values of all slots in one layer. Layers are apart, so that each is updated where it lies."""

    keys: Float[Array, "S K C H"]
    values: Float[Array, "S K C H"]


KVCache = tuple[LayerCache, ...]


def empty(layers: int, slots: int, heads: int, positions: int, size: int, dtype: jnp.dtype) -> KVCache:
    """A zeroed cache of at least `positions` positions, whole blocks; 2 L S K C H elements of `dtype`."""
    shape = (slots, heads, -(-positions // BLOCK) * BLOCK, size)
    return tuple(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(layers))


def write_prompts(
    cache: KVCache, slots: Int[Array, "B"], keys: Float[Array, "L B P K H"], values: Float[Array, "L B P K H"]
) -> KVCache:
    """The cache with whole prompts from position 0 of their slots. Slots outside the cache are dropped."""

    def put(old, new_BPKH):
        new_BKPH = new_BPKH.swapaxes(1, 2).astype(old.dtype)
        return old.at[slots, :, : new_BKPH.shape[2]].set(new_BKPH, mode="drop")

    return tuple(LayerCache(put(layer.keys, keys[i]), put(layer.values, values[i])) for i, layer in enumerate(cache))


def write_token(
    layer: LayerCache, positions: Int[Array, "S"], keys: Float[Array, "S K H"], values: Float[Array, "S K H"]
) -> LayerCache:
    """A layer with one further token in every slot."""
    index = (jnp.arange(len(positions)), slice(None), positions)
    put = lambda old, new: old.at[index].set(new.astype(old.dtype))
    return LayerCache(put(layer.keys, keys), put(layer.values, values))


def attend_slots(
    queries: Float[Array, "S N H"], layer: LayerCache, positions: Int[Array, "S"]
) -> Float[Array, "S N H"]:
    """Grouped-query attention of one query a slot over its positions up to `positions`, itself among them.

    Blocks after the longest sequence are not read; the softmax is carried from block to block (arXiv 1805.02867), its
    scores and sums float32. A block that is masked for a slot changes none of its bits.
    """
    slots, heads, size = queries.shape
    kv_heads = layer.keys.shape[1]
    q_SKGH = queries.reshape(slots, kv_heads, heads // kv_heads, size)
    block_of = lambda x, i: lax.dynamic_slice_in_dim(x, i * BLOCK, BLOCK, axis=2)

    def one_block(i, carry):
        top_SKG, total_SKG, out_SKGH = carry
        k_SKbH, v_SKbH = block_of(layer.keys, i), block_of(layer.values, i)
        scores = jnp.einsum("skgh,skbh->skgb", q_SKGH, k_SKbH, preferred_element_type=jnp.float32) * size**-0.5
        seen_Sb = i * BLOCK + jnp.arange(BLOCK) <= positions[:, None]
        scores = jnp.where(seen_Sb[:, None, None], scores, -jnp.inf)
        new_top_SKG = jnp.maximum(top_SKG, jnp.max(scores, axis=-1))
        weights = jnp.exp(scores - new_top_SKG[..., None])
        shrink_SKG = jnp.exp(top_SKG - new_top_SKG)
        found = jnp.einsum("skgb,skbh->skgh", weights.astype(v_SKbH.dtype), v_SKbH, preferred_element_type=jnp.float32)
        return (
            new_top_SKG,
            total_SKG * shrink_SKG + jnp.sum(weights, axis=-1),
            out_SKGH * shrink_SKG[..., None] + found,
        )

    zeros = jnp.zeros(q_SKGH.shape, jnp.float32)
    start = (zeros[..., 0] - jnp.inf, zeros[..., 0], zeros)
    _, total_SKG, out_SKGH = lax.fori_loop(0, jnp.max(positions) // BLOCK + 1, one_block, start)
    return (out_SKGH / total_SKG[..., None]).reshape(slots, heads, size).astype(queries.dtype)
