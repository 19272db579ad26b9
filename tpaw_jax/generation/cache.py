"""The paged key-value cache: the allocator of pages on the host, and the pool of pages on the device.

A page holds the keys and values of `PAGE` consecutive tokens of one sequence. A sequence holds only the pages that its
length requires, so short sequences do not pay for long ones, and the responses to one prompt share the prompt's full
pages. `Pages` (NumPy, on the host) decides which slot holds which page. The functions below it (JAX, on the device)
read and write the pool by the table that `Pages.table` returns. Attention reads the pool in place, then combines the
pages of each slot by their softmax sums, so keys and values are never gathered; CPUs have a kernel for this in
`cpu.kernels`. Slots and pages are split into R shards that are independent of each other.

Dimensions of this file: U pages per shard, P tokens per page, at most W owners per page, J pages per slot, E = K H
numbers per token, G queries of a key head, M = R S slots, Z = R U W (page, owner) pairs.
"""

import functools
import heapq
import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from tpaw_jax.models.attention import capped
from tpaw_jax.types import AnyArray

PAGE = 64
"""Tokens of a page."""

LANES = 128
"""Numbers in a row of a TPU's vector registers; it pads a smaller last dimension to this size."""

MASKED = -1e30
"""Score of a token that a query must not see. It is finite, so a page without visible tokens needs no special case."""

FREED = -1
"""Stands for a page that a slot has given back, because no query sees its tokens any more."""

_NO_TOKEN = 1 << 30  # a position that no sequence reaches


class PageTable(NamedTuple):
    """Which slots hold which pages, as the device reads it."""

    of_slot: Int[AnyArray, "R S J"]  # the pages of each slot in the order of its sequence; U where there is none
    part: Int[AnyArray, "R S J"]  # W * page + the slot's index among the page's owners; U * W where there is no page
    owner: Int[AnyArray, "R U W"]  # the slots that hold each page; arbitrary where there are fewer than W
    first: Int[AnyArray, "R U W"]  # the position of the page's first token; `_NO_TOKEN` where there is no owner


class Pages:
    """Allocates the pages of R shards with S slots each, on the host.

    A slot holds at most `longest_table` pages, and at most `sharers` slots hold the same page.
    """

    def __init__(self, shards: int, slots: int, pages: int, longest_table: int, sharers: int = 1):
        self.pages, self.longest_table, self.sharers = pages, longest_table, sharers
        self._held: list[list[list[int]]] = [[[] for _ in range(slots)] for _ in range(shards)]
        self._holders: list[Counter[int]] = [Counter() for _ in range(shards)]
        self._free = [list(range(pages)) for _ in range(shards)]

    @property
    def most_used(self) -> int:
        """The number of pages in use in the shard that uses most."""
        return max(self.pages - len(free) for free in self._free)

    def of_slot(self, shard: int, slot: int) -> list[int]:
        """The pages of a slot in the order of its sequence; `FREED` where it has given one back."""
        return self._held[shard][slot]

    def reserve(self, tokens: np.ndarray) -> int:
        """Extend every slot to the pages that `tokens` [R, S] tokens need, lowest free pages first.

        Returns 0, or the number of pages that a shard is short of; then no slot gets a page.
        """
        missing = [
            [max(0, -(-int(n) // PAGE) - len(held)) for n, held in zip(row, slots, strict=True)]
            for row, slots in zip(tokens, self._held, strict=True)
        ]
        shortfall = max(sum(row) - len(free) for row, free in zip(missing, self._free, strict=True))
        if shortfall > 0:
            return shortfall
        for row, slots, free, holders in zip(missing, self._held, self._free, self._holders, strict=True):
            for count, held in zip(row, slots, strict=True):
                new = [heapq.heappop(free) for _ in range(count)]
                held.extend(new)
                holders.update(new)
        return 0

    def expire(self, first: np.ndarray) -> None:
        """Take from every slot the pages whose tokens are all before position `first` [R, S]: no query sees them."""
        for shard, row in enumerate(first):
            for slot, position in enumerate(row):
                held = self._held[shard][slot]
                for j in reversed(range(min(int(position) // PAGE, len(held)))):
                    if held[j] == FREED:
                        break
                    self._give_back(shard, held[j])
                    held[j] = FREED

    def share(self, shard: int, slot: int, other: int, count: int) -> None:
        """Give a slot without pages the first `count` pages of slot `other`; those must not be written any more."""
        shared = self._held[shard][other][:count]
        self._held[shard][slot] = shared
        self._holders[shard].update(shared)

    def release(self, shard: int, slot: int) -> None:
        """Take all pages from a slot, and free those that no other slot holds."""
        for page in self._held[shard][slot]:
            if page != FREED:
                self._give_back(shard, page)
        self._held[shard][slot] = []

    def _give_back(self, shard: int, page: int) -> None:
        holders = self._holders[shard]
        holders[page] -= 1
        if not holders[page]:
            heapq.heappush(self._free[shard], page)

    def table(self) -> PageTable:
        """The current allocation as the device reads it."""
        shards, slots = len(self._held), len(self._held[0])
        of_slot = np.full((shards, slots, self.longest_table), self.pages, np.int32)
        part, owner = of_slot * self.sharers, np.zeros((shards, self.pages, self.sharers), np.int32)
        first = np.full_like(owner, _NO_TOKEN)
        for r, row in enumerate(self._held):
            owners = np.zeros(self.pages, int)  # of each page, so far
            for s, all_held in enumerate(row):
                places = np.flatnonzero(np.array(all_held, int) != FREED)
                held = np.array(all_held, int)[places]
                index = owners[held]
                of_slot[r, s, places], part[r, s, places] = held, self.sharers * held + index
                owner[r, held, index], first[r, held, index] = s, PAGE * places
                owners[held] += 1
        return PageTable(of_slot, part, owner, first)

    def resize(self, slots: np.ndarray, pages: int) -> np.ndarray:
        """Keep `slots` [R, S'] in this order, and change the number of pages; pages in use come first.

        Returns the old number of every page, [R, `pages`]. A free page gets a number beyond the old ones.
        """
        order = np.full((len(self._held), pages), self.pages)
        for r, row in enumerate(self._held):
            kept = [row[s] for s in slots[r]]
            holders = Counter(page for held in kept for page in held if page != FREED)
            order[r, : len(holders)] = list(holders)
            number = {FREED: FREED} | {page: i for i, page in enumerate(holders)}
            self._held[r] = [[number[page] for page in held] for held in kept]
            self._holders[r] = Counter({number[page]: n for page, n in holders.items()})
            self._free[r] = list(range(len(holders), pages))
        self.pages = pages
        return order


class LayerPages(struct.PyTreeNode):
    """Keys and values of all pages in one layer. Each layer has its own arrays, so that XLA updates them in place.

    The heads of a token are one row of E numbers. A TPU pads such a row to a multiple of 128 at most, writes it in
    place, and reads it once per step.
    """

    keys: Float[Array, "R U P E"]
    values: Float[Array, "R U P E"]


KVCache = tuple[LayerPages, ...]


def empty(widths: Sequence[int], shards: int, pages: int, dtype: DTypeLike) -> KVCache:
    """A zeroed pool with `pages` pages per shard for layers with E of `widths`: 2 R U P E elements of `dtype` each."""
    zeros = lambda width: jnp.zeros((shards, pages, PAGE, width), dtype)
    return tuple(LayerPages(zeros(width), zeros(width)) for width in widths)


def write_prompts(
    cache: KVCache,
    keys: Sequence[Float[Array, "R T K H"]],
    values: Sequence[Float[Array, "R T K H"]],
    starts: Int[Array, "R C"],
    pages: Int[Array, "R C"],
) -> KVCache:
    """The cache with `PAGE` tokens of the shard's row, from each of `starts` on, written into each of `pages`.

    `keys` and `values` are those of each layer, which may be stacked. Page numbers beyond the pool are ignored. Tokens
    after the end of a prompt are written too, but no query sees them.
    """
    places_RCP = jnp.minimum(starts[..., None] + jnp.arange(PAGE), keys[0].shape[1] - 1)
    take = jax.vmap(lambda row_TKH, places_CP: row_TKH[places_CP])  # [R C P K H]
    put = jax.vmap(lambda old, page_C, new: old.at[page_C].set(new.astype(old.dtype), mode="drop"))
    written = []
    for layer, row_keys, row_values in zip(cache, keys, values, strict=True):
        new_keys, new_values = (_merge_heads(take(x, places_RCP)) for x in (row_keys, row_values))
        written.append(LayerPages(put(layer.keys, pages, new_keys), put(layer.values, pages, new_values)))
    return tuple(written)


def write_token(
    layer: LayerPages,
    table: PageTable,
    positions: Int[Array, "R S"],
    keys: Float[Array, "R S K H"],
    values: Float[Array, "R S K H"],
) -> LayerPages:
    """One layer with a new token in every slot that has a page for its position."""
    page, offset = page_of(table, positions), positions % PAGE
    put = jax.vmap(lambda old, u, p, new: old.at[u, p].set(new.astype(old.dtype), mode="drop"))
    keys, values = _merge_heads(keys), _merge_heads(values)
    return LayerPages(put(layer.keys, page, offset, keys), put(layer.values, page, offset, values))


def page_of(table: PageTable, positions: Int[Array, "R S"]) -> Int[Array, "R S"]:
    """The page that holds each slot's token at a position; U where the slot has none."""
    return jnp.take_along_axis(jnp.asarray(table.of_slot), positions[..., None] // PAGE, axis=2)[..., 0]


def attend_pages(
    queries: Float[Array, "R S N H"],
    keys: Float[Array, "R S K H"],
    values: Float[Array, "R S K H"],
    layer: LayerPages,
    table: PageTable,
    positions: Int[Array, "R S"],
    *,
    window: int | None = None,
    cap: float | None = None,
) -> Float[Array, "R S N H"]:
    """Grouped-query attention of one query token a slot over its pages before `positions`, and over its own token.

    `keys` and `values` are those of the query's own token. They need not be in the pool yet: XLA updates a pool in
    place only if it is read before it is written. Each page gets its own softmax, and the pages of a slot are then
    combined in their order (online softmax, arXiv 1805.02867). Scores and sums are float32. A page is read once for
    all slots that hold it. With a window, a query sees the last `window` tokens, its own included. `cap` is the soft
    cap of scores.
    """
    shards, slots, heads, size = queries.shape
    pages, kv_heads, dtype = layer.keys.shape[1], keys.shape[2], layer.keys.dtype
    q_RSKGH = queries.reshape(shards, slots, kv_heads, heads // kv_heads, size).astype(dtype)
    partial = _attend_within_pages(q_RSKGH, layer, table, positions, window=window, cap=cap)

    as_cached = lambda x: x.astype(dtype).astype(jnp.float32).reshape(shards * slots, kv_heads, -1, size)
    own_score_MKG = capped(jnp.sum(as_cached(q_RSKGH) * as_cached(keys), axis=-1) * size**-0.5, cap)
    has_page_MJ = jnp.reshape(table.of_slot, (shards * slots, -1)) < pages
    parts = math.prod(table.owner.shape[1:])
    part_RSJ = jnp.minimum(table.part, parts - 1)
    by_shard = lambda x_Z: x_Z.reshape(shards, parts, *x_Z.shape[1:])
    of_slot = lambda x_Z: _take(by_shard(x_Z), part_RSJ).reshape(*has_page_MJ.shape, *x_Z.shape[1:])
    top_MJKG = jnp.where(has_page_MJ[..., None, None], of_slot(partial.top), MASKED)
    top_MKG = jnp.maximum(jnp.max(top_MJKG, axis=1), own_score_MKG)
    scale_MJKG, own_weight_MKG = jnp.exp(top_MJKG - top_MKG[:, None]), jnp.exp(own_score_MKG - top_MKG)
    total_MKG = jnp.sum(scale_MJKG * of_slot(partial.total), axis=1) + own_weight_MKG
    sum_MKGH = jnp.sum(scale_MJKG[..., None] * of_slot(partial.weighted), axis=1)
    sum_MKGH += own_weight_MKG[..., None] * as_cached(values)
    return (sum_MKGH / total_MKG[..., None]).reshape(queries.shape).astype(queries.dtype)


class _PartialSoftmax(NamedTuple):
    """Attention of each owner of a page over that page alone, before division by the softmax's total."""

    weighted: Float[Array, "Z K G H"]  # sum of exp(score - top) * value
    top: Float[Array, "Z K G"]  # the largest score
    total: Float[Array, "Z K G"]  # sum of exp(score - top)


def _attend_within_pages(
    q_RSKGH: Float[Array, "R S K G H"],
    layer: LayerPages,
    table: PageTable,
    positions: Int[Array, "R S"],
    *,
    window: int | None,
    cap: float | None,
) -> _PartialSoftmax:
    kv_heads, size = q_RSKGH.shape[2], q_RSKGH.shape[4]
    merge_shards = lambda x: x.reshape(-1, *x.shape[2:])  # XLA is slow with nested batch dimensions
    pool_keys, pool_values = merge_shards(layer.keys), merge_shards(layer.values)
    joined = _joined_heads(kv_heads, size)
    q_UWKGH = merge_shards(_take(_join_heads(q_RSKGH, joined), table.owner))
    before_UW = merge_shards(_take(positions, table.owner) - table.first)
    sharers = table.owner.shape[2]
    q_UKGH = q_UWKGH.swapaxes(1, 2).reshape(len(q_UWKGH), q_UWKGH.shape[2], -1, q_UWKGH.shape[4])  # owners among G
    scores = capped(_for_each_run("uph,ugh->ugp", pool_keys, q_UKGH) * size**-0.5, cap)
    visible_UWP = jnp.arange(PAGE) < before_UW[..., None]
    if window is not None:
        visible_UWP &= jnp.arange(PAGE) > before_UW[..., None] - window
    visible = jnp.repeat(visible_UWP, q_UWKGH.shape[3], axis=1)[:, None]
    scores = jnp.where(visible, scores, MASKED)
    top = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - top[..., None])
    total = jnp.sum(weights, axis=-1)
    weighted = _for_each_run("uph,ugp->ugh", pool_values, weights.astype(pool_values.dtype))

    by_owner = lambda x: x.reshape(*x.shape[:2], sharers, -1, *x.shape[3:]).swapaxes(1, 2)
    pairs = len(pool_keys) * sharers
    weighted_ZKGH = _separate_heads(by_owner(weighted).reshape(pairs, *q_UWKGH.shape[2:]), joined)
    top_ZKG, total_ZKG = (by_owner(x).reshape(weighted_ZKGH.shape[:-1]) for x in (top, total))
    return _PartialSoftmax(weighted_ZKGH, top_ZKG, total_ZKG)


def _take(x, index):
    """x[index] within each shard."""
    return jax.vmap(lambda x, index: x[index])(x, index)


def _for_each_run(product: str, pool_UPE, operand_UKGX):
    """A float32 product for each run of joined heads in the pool's rows, stacked on axis 1."""
    runs = jnp.split(pool_UPE, operand_UKGX.shape[1], axis=-1)
    in_float32 = functools.partial(jnp.einsum, product, preferred_element_type=jnp.float32)
    return jnp.stack([in_float32(run, operand_UKGX[:, i]) for i, run in enumerate(runs)], axis=1)


def _joined_heads(kv_heads: int, size: int) -> int:
    """How many heads to multiply at once, so that a run of them is a multiple of `LANES`; all heads if fewer do not."""
    joined = math.gcd(kv_heads, max(1, LANES // size))
    return joined if joined * size % LANES == 0 else kv_heads


def _join_heads(q_RSKGH, joined: int):
    """[R S K/J JG JH], for J joined heads: each head's queries against the row of all J heads, zero at other heads.

    Multiplying by zeros costs a TPU nothing while it reads the pool; splitting rows into single heads costs a copy.
    """
    *rs, heads, group, size = q_RSKGH.shape
    by_run = q_RSKGH.reshape(*rs, heads // joined, joined, group, 1, size)
    own = jnp.eye(joined, dtype=bool)[:, None, :, None]
    return jnp.where(own, by_run, 0).reshape(*rs, heads // joined, joined * group, joined * size)


def _separate_heads(joined_UKGH, joined: int):
    """The inverse of `_join_heads` for results: each head's own part, [U K G H]."""
    pages, runs, queries, size = joined_UKGH.shape
    shape = pages, runs, joined, queries // joined, joined, size // joined
    own = jnp.eye(joined, dtype=bool)[:, None, :, None]
    return jnp.where(own, joined_UKGH.reshape(shape), 0).sum(axis=4).reshape(pages, runs * joined, shape[3], shape[5])


def _merge_heads(x):
    return x.reshape(*x.shape[:-2], -1)
