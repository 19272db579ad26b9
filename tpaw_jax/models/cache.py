"""The key-value cache of the sampler: a fixed number of slots, each holding one sequence from position 0."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int


class KVCache(struct.PyTreeNode):
    """Keys and values of every layer and slot. A slot is refilled by writing over it: lengths live with the sampler."""

    keys: Float[Array, "L S K C H"]
    values: Float[Array, "L S K C H"]


def empty(layers: int, slots: int, heads: int, positions: int, size: int, dtype: jnp.dtype) -> KVCache:
    """A zeroed cache; 2 L S K C H elements of `dtype`."""
    shape = (layers, slots, heads, positions, size)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def write(
    cache: KVCache,
    layer: Int[Array, ""],
    slots: Int[Array, "B"],
    positions: Int[Array, "B T"],
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K H"],
) -> KVCache:
    """The cache with `keys` and `values` of one layer at (slot, position). Slots outside the cache are dropped."""
    # The indexed axes (layer, slot, position) lead the update's shape, which is [B, T, K, H].
    index = (layer, slots[:, None], slice(None), positions)
    return KVCache(
        cache.keys.at[index].set(keys.astype(cache.keys.dtype), mode="drop"),
        cache.values.at[index].set(values.astype(cache.values.dtype), mode="drop"),
    )
