"""The key-value cache of the sampler: a pool of pages, each with some consecutive tokens of one slot's sequence.

A sequence holds as many pages as it has tokens for, so short ones do not pay for long ones. Attention reads the pool in
the order it lies in, each page for the slot that owns it, and then joins the pages of a slot by their softmax sums: no
key or value is gathered. Slots and pages are split into R shards that know nothing of each other.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from tpaw_jax.types import AnyArray

PAGE = 64
"""Tokens of a page."""

UNSEEN = -1e30
"""The score of a token that a query does not see; finite, so that a page without any is no special case."""


class LayerPages(struct.PyTreeNode):
    """Keys and values of all pages in one layer. Layers are apart, so that each is updated where it lies."""

    keys: Float[Array, "R U K H P"]  # tokens last: scores are then products over consecutive memory
    values: Float[Array, "R U K P H"]


KVCache = tuple[LayerPages, ...]


class PageTable(NamedTuple):
    """Whose the pages of each shard are."""

    of_slot: Int[AnyArray, "R S J"]  # the pages of a slot's sequence in order; U where there is none
    owner: Int[AnyArray, "R U"]  # the slot that a page belongs to; any, where it is free
    first: Int[AnyArray, "R U"]  # the position of a page's first token; beyond every position, where it is free


def empty(layers: int, shards: int, pages: int, heads: int, size: int, dtype: jnp.dtype) -> KVCache:
    """A zeroed pool of `pages` pages a shard; 2 L R U K P H elements of `dtype`."""
    keys, values = (shards, pages, heads, size, PAGE), (shards, pages, heads, PAGE, size)
    return tuple(LayerPages(jnp.zeros(keys, dtype), jnp.zeros(values, dtype)) for _ in range(layers))


def write_prompts(
    cache: KVCache,
    keys: Float[Array, "L R T K H"],
    values: Float[Array, "L R T K H"],
    starts: Int[Array, "R C"],
    pages: Int[Array, "R C"],
) -> KVCache:
    """The cache with a page's worth of tokens, from each of `starts` in the rows of its shard, in each of `pages`.

    A page beyond the pool is dropped. What stands behind the last token of a prompt is written and never seen.
    """
    places_RCP = jnp.minimum(starts[..., None] + jnp.arange(PAGE), keys.shape[2] - 1)
    of_pages = jax.vmap(lambda row_TKH, places_CP: row_TKH[places_CP])  # [R C P K H]
    put = jax.vmap(lambda old, page_C, new: old.at[page_C].set(new.astype(old.dtype), mode="drop"))
    return tuple(
        LayerPages(
            put(layer.keys, pages, of_pages(keys[i], places_RCP).transpose(0, 1, 3, 4, 2)),
            put(layer.values, pages, of_pages(values[i], places_RCP).swapaxes(2, 3)),
        )
        for i, layer in enumerate(cache)
    )


def write_token(
    layer: LayerPages,
    table: PageTable,
    positions: Int[Array, "R S"],
    keys: Float[Array, "R S K H"],
    values: Float[Array, "R S K H"],
) -> LayerPages:
    """A layer with one further token in every slot that has a page for it."""
    page, offset = page_of(table, positions), positions % PAGE
    put_key = lambda old, u, p, new: old.at[u, :, :, p].set(new.astype(old.dtype), mode="drop")
    put_value = lambda old, u, p, new: old.at[u, :, p].set(new.astype(old.dtype), mode="drop")
    return LayerPages(
        jax.vmap(put_key)(layer.keys, page, offset, keys), jax.vmap(put_value)(layer.values, page, offset, values)
    )


def page_of(table: PageTable, positions: Int[Array, "R S"]) -> Int[Array, "R S"]:
    """The page that a slot's token at a position lies in."""
    return jnp.take_along_axis(jnp.asarray(table.of_slot), positions[..., None] // PAGE, axis=2)[..., 0]


def attend_pages(
    queries: Float[Array, "R S N H"], layer: LayerPages, table: PageTable, positions: Int[Array, "R S"]
) -> Float[Array, "R S N H"]:
    """Grouped-query attention of one query a slot over the tokens of its pages up to `positions`, itself among them.

    Each page has its own softmax, joined over the pages of a slot (arXiv 1805.02867); scores and sums are float32. The
    pages of a slot are summed in their order, wherever in the pool they lie.
    """
    shards, slots, heads, size = queries.shape
    pages, kv_heads = layer.keys.shape[1:3]
    of = jax.vmap(lambda x, index: x[index])  # within a shard
    all_pages = lambda x: x.reshape(shards * pages, *x.shape[2:])
    by_shard = lambda x: x.reshape(shards, pages, *x.shape[1:])
    keys, values = all_pages(layer.keys), all_pages(layer.values)  # plain batches of products: XLA is slow with nested

    q_UKGH = all_pages(of(queries.reshape(shards, slots, kv_heads, heads // kv_heads, size), table.owner))
    scores = jnp.einsum("ukgh,ukhp->ukgp", q_UKGH.astype(keys.dtype), keys, **_IN_FLOAT32) * size**-0.5
    last_U = all_pages(of(positions, table.owner) - table.first)
    scores = jnp.where((jnp.arange(PAGE) <= last_U[:, None])[:, None, None], scores, UNSEEN)
    top_UKG = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - top_UKG[..., None])
    total_UKG = jnp.sum(weights, axis=-1)
    found_UKGH = jnp.einsum("ukgp,ukph->ukgh", weights.astype(values.dtype), values, **_IN_FLOAT32)

    page_RSJ, there_MJ = jnp.minimum(table.of_slot, pages - 1), table.of_slot.reshape(shards * slots, -1) < pages
    of_slot = lambda x: of(by_shard(x), page_RSJ).reshape(*there_MJ.shape, *x.shape[1:])
    top_MJKG = jnp.where(there_MJ[..., None, None], of_slot(top_UKG), UNSEEN)
    share_MJKG = jnp.exp(top_MJKG - jnp.max(top_MJKG, axis=1, keepdims=True))
    total_MKG = jnp.sum(share_MJKG * of_slot(total_UKG), axis=1)
    out_MKGH = jnp.sum(share_MJKG[..., None] * of_slot(found_UKGH), axis=1) / total_MKG[..., None]
    return out_MKGH.reshape(queries.shape).astype(queries.dtype)


_IN_FLOAT32 = {"preferred_element_type": jnp.float32}
