"""The key-value cache of the sampler: a pool of pages, each with some consecutive tokens of one slot's sequence.

A sequence holds as many pages as it has tokens for, so short ones do not pay for long ones, and shares a prompt's with
other responses to it. Attention reads the pool in the order it lies in, each page for the slots that own it, and then
joins the pages of a slot by their softmax sums: no key or value is gathered. (CPUs have kernels for that,
`cpu_kernels`.) Slots and pages are split into R shards that know nothing of each other.
"""

from __future__ import annotations

import functools
import math
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
    """Keys and values of all pages in one layer. Layers are apart, so that each is updated where it lies.

    A token's heads are one row of E = K H numbers: a TPU pads it to a multiple of 128 at most, writes a row of it where
    it lies, and reads it once a step.
    """

    keys: Float[Array, "R U P E"]
    values: Float[Array, "R U P E"]


KVCache = tuple[LayerPages, ...]


class PageTable(NamedTuple):
    """Whose the pages of each shard are."""

    of_slot: Int[AnyArray, "R S J"]  # the pages of a slot's sequence in order; U where there is none
    part: Int[AnyArray, "R S J"]  # W times the page and the slot's place among its owners; U W where there is none
    owner: Int[AnyArray, "R U W"]  # the slots that a page belongs to, at most W; any, where there are fewer
    first: Int[AnyArray, "R U W"]  # the position of its first token; beyond every position, where there is no slot


def empty(layers: int, shards: int, pages: int, heads: int, size: int, dtype: jnp.dtype) -> KVCache:
    """A zeroed pool of `pages` pages a shard; 2 L R U P E elements of `dtype`."""
    zeros = lambda: jnp.zeros((shards, pages, PAGE, heads * size), dtype)
    return tuple(LayerPages(zeros(), zeros()) for _ in range(layers))


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
    written = []
    for layer, row_keys, row_values in zip(cache, keys, values, strict=True):
        new_keys, new_values = (_heads_in_a_row(of_pages(x, places_RCP)) for x in (row_keys, row_values))
        written.append(LayerPages(put(layer.keys, pages, new_keys), put(layer.values, pages, new_values)))
    return tuple(written)


def write_token(
    layer: LayerPages,
    table: PageTable,
    positions: Int[Array, "R S"],
    keys: Float[Array, "R S K H"],
    values: Float[Array, "R S K H"],
) -> LayerPages:
    """A layer with one further token in every slot that has a page for it."""
    page, offset = page_of(table, positions), positions % PAGE
    put = jax.vmap(lambda old, u, p, new: old.at[u, p].set(new.astype(old.dtype), mode="drop"))
    keys, values = _heads_in_a_row(keys), _heads_in_a_row(values)
    return LayerPages(put(layer.keys, page, offset, keys), put(layer.values, page, offset, values))


def page_of(table: PageTable, positions: Int[Array, "R S"]) -> Int[Array, "R S"]:
    """The page that a slot's token at a position lies in."""
    return jnp.take_along_axis(jnp.asarray(table.of_slot), positions[..., None] // PAGE, axis=2)[..., 0]


def attend_pages(
    queries: Float[Array, "R S N H"],
    keys: Float[Array, "R S K H"],
    values: Float[Array, "R S K H"],
    layer: LayerPages,
    table: PageTable,
    positions: Int[Array, "R S"],
) -> Float[Array, "R S N H"]:
    """Grouped-query attention of one query a slot over the tokens of its pages before `positions`, and its own token.

    `keys` and `values` are those of the own token, which need not be in its page yet: a pool that is read before it is
    written into stays where it is. Each page has its own softmax, joined over the pages of a slot (arXiv 1805.02867);
    scores and sums are float32. A page is read once for all its slots; the pages of a slot are summed in their order.
    """
    shards, slots, heads, size = queries.shape
    pages, kv_heads = layer.keys.shape[1], keys.shape[2]
    of = jax.vmap(lambda x, index: x[index])  # within a shard
    all_pages = lambda x: x.reshape(shards * pages, *x.shape[2:])
    pool_keys, pool_values = all_pages(layer.keys), all_pages(layer.values)  # plain batches: XLA is slow with nested
    q_RSKGH = queries.reshape(shards, slots, kv_heads, heads // kv_heads, size)
    joined = _joined_heads(kv_heads, size)

    q_RSKGH = q_RSKGH.astype(pool_keys.dtype)
    sharers = table.owner.shape[2]
    q_UWKGH = all_pages(of(_in_joined_heads(q_RSKGH, joined), table.owner))
    before_UW = all_pages(of(positions, table.owner) - table.first)
    of_all = lambda x_UWKG: x_UWKG.swapaxes(1, 2).reshape(len(x_UWKG), x_UWKG.shape[2], -1, *x_UWKG.shape[4:])
    scores = _of_each_run("uph,ugh->ugp", pool_keys, of_all(q_UWKGH)) * size**-0.5
    seen_UWP = jnp.arange(PAGE) < before_UW[..., None]
    seen = jnp.repeat(seen_UWP, q_UWKGH.shape[3], axis=1)[:, None]
    scores = jnp.where(seen, scores, UNSEEN)
    top = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - top[..., None])
    total = jnp.sum(weights, axis=-1)
    found = _of_each_run("uph,ugp->ugh", pool_values, weights.astype(pool_values.dtype))

    parts = shards * pages * sharers  # a part is what a page is to one of its slots
    of_each = lambda x: x.reshape(*x.shape[:2], sharers, -1, *x.shape[3:]).swapaxes(1, 2)
    found_VKGH = _of_each_head(of_each(found).reshape(parts, *q_UWKGH.shape[2:]), joined)
    top_VKG, total_VKG = (of_each(x).reshape(found_VKGH.shape[:-1]) for x in (top, total))

    as_kept = lambda x: x.astype(pool_keys.dtype).astype(jnp.float32).reshape(shards * slots, kv_heads, -1, size)
    own_MKG = jnp.sum(as_kept(q_RSKGH) * as_kept(keys), axis=-1) * size**-0.5
    there_MJ = jnp.reshape(table.of_slot, (shards * slots, -1)) < pages
    part_RSJ = jnp.minimum(table.part, pages * sharers - 1)
    by_shard = lambda x: x.reshape(shards, pages * sharers, *x.shape[1:])
    of_slot = lambda x: of(by_shard(x), part_RSJ).reshape(*there_MJ.shape, *x.shape[1:])
    top_MJKG = jnp.where(there_MJ[..., None, None], of_slot(top_VKG), UNSEEN)
    most_MKG = jnp.maximum(jnp.max(top_MJKG, axis=1), own_MKG)
    share_MJKG, weight_MKG = jnp.exp(top_MJKG - most_MKG[:, None]), jnp.exp(own_MKG - most_MKG)
    total_MKG = jnp.sum(share_MJKG * of_slot(total_VKG), axis=1) + weight_MKG
    sum_MKGH = jnp.sum(share_MJKG[..., None] * of_slot(found_VKGH), axis=1) + weight_MKG[..., None] * as_kept(values)
    return (sum_MKGH / total_MKG[..., None]).reshape(queries.shape).astype(queries.dtype)


def _of_each_run(product: str, pool_UPE, of_heads_UKGX):
    runs = jnp.split(pool_UPE, of_heads_UKGX.shape[1], axis=-1)
    in_float32 = functools.partial(jnp.einsum, product, preferred_element_type=jnp.float32)
    return jnp.stack([in_float32(run, of_heads_UKGX[:, i]) for i, run in enumerate(runs)], axis=1)


LANES = 128
"""Numbers that a TPU keeps side by side: it pads smaller last dimensions to as many."""


def _joined_heads(kv_heads: int, size: int) -> int:
    """Heads whose products are one, so that a row falls into runs of `LANES`; all heads, where no fewer do."""
    joined = math.gcd(kv_heads, max(1, LANES // size))
    return joined if joined * size % LANES == 0 else kv_heads


def _in_joined_heads(q_RSKGH, joined: int):
    """[R S K/J JG JH]: the queries of J heads over the row of all J of them, with zeros where the other heads are.

    Products with zeros cost a TPU nothing while it reads the pool, and splitting a row into shorter ones a copy of it.
    """
    *rs, heads, group, size = q_RSKGH.shape
    of_heads = q_RSKGH.reshape(*rs, heads // joined, joined, group, 1, size)
    own = jnp.eye(joined, dtype=bool)[:, None, :, None]
    return jnp.where(own, of_heads, 0).reshape(*rs, heads // joined, joined * group, joined * size)


def _of_each_head(found_UKGH, joined: int):
    """Of J joined heads, what belongs to each, [U K G H]."""
    pages, groups, queries, size = found_UKGH.shape
    shape = pages, groups, joined, queries // joined, joined, size // joined
    own = jnp.eye(joined, dtype=bool)[:, None, :, None]
    return jnp.where(own, found_UKGH.reshape(shape), 0).sum(axis=4).reshape(pages, groups * joined, shape[3], shape[5])


def _heads_in_a_row(x):
    return x.reshape(*x.shape[:-2], -1)
