"""Attention over packed trees that computes only what the tree mask keeps: work and memory follow the trees, not T^2.

A row is cut into tiles of up to `TILE` queries that belong to one prompt or to one response. Whatever such a tile can
see is two runs of its row: the tree's prompt and the tile's own branch up to its end. Both are sliced into one short
key list, whose length is rounded up to one of few widths, and each width has a loop of its own with a trip count that
is data: no branch, no recompile, O(T) memory. The backward pass recomputes the weights from the saved log-sum-exp
(FlashAttention, arXiv 2205.14135). The plain twin is `attention.attend` under `attention.visible`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from tpaw_jax.models.attention import SAVED, Attention, Visibility

TILE = 32
"""Queries of a tile: enough for the matrix units, few enough that a response's last tile is not mostly padding."""


class Tile(NamedTuple):
    """Places in the rows, laid end to end: scalars, or one value a tile."""

    first_query: Int[Array, "*tiles"]
    queries: Int[Array, "*tiles"]
    trunk: Int[Array, "*tiles"]  # where the tree's prompt begins
    trunk_length: Int[Array, "*tiles"]  # 0 for a tile of the prompt itself
    branch: Int[Array, "*tiles"]  # where the tile's own prompt or response begins


class Tiles(NamedTuple):
    """The tiles of some rows, ordered by the width of their key list; those of width w are [bounds[w], bounds[w+1])."""

    tile: Tile
    bounds: Int[Array, "widths+1"]


def key_widths(length: int) -> list[int]:
    """The lengths of key lists that rows of `length` tokens are computed with: 32, 64, 96, ... 256, 320, ... length."""
    widths, width = [], TILE
    while width < length:
        widths.append(width)
        width += max(TILE, 2 ** (width.bit_length() - 3))
    return [*widths, length]


def plan(visibility: Visibility) -> Tiles:
    """The tiles of packed rows. Tokens of a branch must stand together, the branches of a segment one after the other,
    its trunk first; padding may stand between them."""
    segments_BT, branches_BT = visibility
    if branches_BT is None:
        branches_BT = jnp.zeros_like(segments_BT)
    length, total = segments_BT.shape[1], segments_BT.size
    place = jnp.arange(total)
    differs = lambda x: jnp.pad(x[:, 1:] != x[:, :-1], ((0, 0), (1, 0)), constant_values=True).reshape(-1)
    new_branch = differs(segments_BT) | differs(branches_BT)
    new_segment = differs(_without_padding(segments_BT))
    start_of = lambda new: lax.cummax(jnp.where(new, place, 0))
    trunk, branch = start_of(new_segment), start_of(new_branch)
    end = lax.cummin(jnp.append(jnp.where(new_branch, place, total)[1:], total), reverse=True)  # of the own branch
    in_branch = branches_BT.reshape(-1) > 0
    tile = Tile(
        first_query=place,
        queries=jnp.minimum(end - place, TILE),
        trunk=trunk,
        trunk_length=jnp.where(in_branch, end[trunk] - trunk, 0),
        branch=branch,
    )
    keys = tile.trunk_length + place + tile.queries - branch
    widths = jnp.asarray(key_widths(length))
    is_tile = ((place - branch) % TILE == 0) & (segments_BT.reshape(-1) > 0)
    width = jnp.where(is_tile, jnp.searchsorted(widths, keys), len(widths))
    order = jnp.argsort(width)
    bounds = jnp.searchsorted(width[order], jnp.arange(len(widths) + 1))
    return Tiles(jax.tree.map(lambda x: x[order].astype(jnp.int32), tile), bounds.astype(jnp.int32))


def _without_padding(segments_BT: Array) -> Array:
    """The segment of each token, and that of the last token before it for padding."""
    place_T = jnp.arange(segments_BT.shape[1])
    last_BT = lax.cummax(jnp.where(segments_BT > 0, place_T, 0), axis=1)
    return jnp.take_along_axis(segments_BT, last_BT, axis=1)


@jax.custom_vjp
def attend_tiles(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K H"],
    tiles: Tiles,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention of packed rows, softmax(q k^T / sqrt(H)) v over what each query sees; 0 for padding.

    Scores, softmax and sums are float32; the weights are rounded to the dtype of the values, as in `attend`.
    """
    return _forward(queries, keys, values, tiles)[0]


def _forward(queries, keys, values, tiles):
    rows, length, _, size = queries.shape
    total, kv_heads = rows * length, keys.shape[2]
    q_KTGH, k_KTH, v_KTH = _by_head(queries, kv_heads), _by_head(keys, 0), _by_head(values, 0)
    out_KTGH = jnp.zeros(q_KTGH.shape, queries.dtype)
    lse_KTG = jnp.zeros(q_KTGH.shape[:-1], jnp.float32)

    def of_width(width):
        def body(i, carry):
            out_KTGH, lse_KTG = carry
            tile = _take(tiles.tile, i)
            scores = _scores(_queries(q_KTGH, tile), _keys(k_KTH, tile, width), tile)
            top = jnp.max(scores, axis=-1, keepdims=True)
            weights = jnp.exp(scores - top)
            total_weight = jnp.sum(weights, axis=-1, keepdims=True)
            flat = weights.astype(values.dtype).reshape(kv_heads, -1, width)
            found = _matmul("kqc,kch->kqh", flat, _keys(v_KTH, tile, width)).reshape(*weights.shape[:-1], size)
            out_KTGH = _put(out_KTGH, (found / total_weight).astype(out_KTGH.dtype), tile)
            return out_KTGH, _put(lse_KTG, (top + jnp.log(total_weight))[..., 0], tile)

        return body

    out_KTGH, lse_KTG = _loops(tiles, length, of_width, (out_KTGH, lse_KTG))
    out = checkpoint_name(_by_row(out_KTGH[:, :total], rows), SAVED)
    lse_KTG = checkpoint_name(lse_KTG, SAVED)
    return out, (queries, keys, values, tiles, out, lse_KTG)


def _backward(saved, d_out):
    queries, keys, values, tiles, out, lse_KTG = saved
    rows, length, _, size = queries.shape
    total, kv_heads = rows * length, keys.shape[2]
    q_KTGH, k_KTH, v_KTH = _by_head(queries, kv_heads), _by_head(keys, 0), _by_head(values, 0)
    d_out_KTGH = _by_head(d_out, kv_heads)
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)  # sum over keys of weight x gradient
    delta_KTG = _by_head(delta[..., None], kv_heads)[..., 0]
    zeros = lambda x: jnp.zeros(x.shape, jnp.float32)

    def of_width(width):
        def body(i, carry):
            d_q, d_k, d_v = carry
            tile = _take(tiles.tile, i)
            q, k, v = _queries(q_KTGH, tile), _keys(k_KTH, tile, width), _keys(v_KTH, tile, width)
            d_o = _queries(d_out_KTGH, tile)
            weights = jnp.exp(_scores(q, k, tile) - _slice(lse_KTG, tile)[..., None])
            weights = jnp.where(_live(tile, weights.ndim), weights, 0)
            d_weights = _matmul("kqh,kch->kqc", _flat(d_o), v).reshape(weights.shape)
            d_scores = _flat((weights * (d_weights - _slice(delta_KTG, tile)[..., None]) * size**-0.5).astype(q.dtype))
            d_q = _put(d_q, _matmul("kqc,kch->kqh", d_scores, k).reshape(q.shape), tile)
            d_k = _add_keys(d_k, _matmul("kqc,kqh->kch", d_scores, _flat(q)), tile)
            d_v = _add_keys(d_v, _matmul("kqc,kqh->kch", _flat(weights.astype(v.dtype)), _flat(d_o)), tile)
            return d_q, d_k, d_v

        return body

    d_q, d_k, d_v = _loops(tiles, length, of_width, (zeros(q_KTGH), zeros(k_KTH), zeros(v_KTH)))
    by_row = lambda x, like: _by_row(x[:, :total], rows).reshape(like.shape).astype(like.dtype)
    no_gradient = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), tiles)
    return by_row(d_q, queries), by_row(d_k, keys), by_row(d_v, values), no_gradient


attend_tiles.defvjp(_forward, _backward)


def _loops(tiles: Tiles, length: int, of_width: Any, carry: Any) -> Any:
    """One loop a width over the tiles whose keys fit it."""
    for i, width in enumerate(key_widths(length)):
        carry = lax.fori_loop(tiles.bounds[i], tiles.bounds[i + 1], of_width(width), carry)
    return carry


def _by_head(x: Float[Array, "B T heads H"], groups_of: int) -> Array:
    """[B T K H] -> [K, B T + room, H]; with `groups_of` = K, [B T N H] -> [K, B T + room, N / K, H].

    The room at the end lets every slice of queries or keys be taken whole.
    """
    rows, length, heads, size = x.shape
    room = max(length, TILE)
    split = (groups_of, heads // groups_of) if groups_of else (heads,)
    x = jnp.moveaxis(x.reshape(rows * length, *split, size), 1, 0)
    return jnp.pad(x, [(0, 0), (0, room)] + [(0, 0)] * (x.ndim - 2))


def _by_row(x: Float[Array, "K BT *G H"], rows: int) -> Float[Array, "B T heads H"]:
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(rows, x.shape[0] // rows, -1, x.shape[-1])


def _take(tile: Tile, i: Int[Array, ""]) -> Tile:
    return jax.tree.map(lambda x: x[i], tile)


def _flat(x: Float[Array, "K Q G last"]) -> Float[Array, "K QG last"]:
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _matmul(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _slice(x: Float[Array, "K BT *rest"], tile: Tile) -> Float[Array, "K Q *rest"]:
    return lax.dynamic_slice_in_dim(x, tile.first_query, TILE, axis=1)


def _live(tile: Tile, dimensions: int) -> Array:
    """Which of the sliced queries are the tile's own, to broadcast with [K, Q, ...]."""
    return (jnp.arange(TILE) < tile.queries).reshape(1, TILE, *[1] * (dimensions - 2))


def _queries(x: Float[Array, "K BT G H"], tile: Tile) -> Float[Array, "K Q G H"]:
    """The tile's queries (or their gradients); 0 beyond its end."""
    return jnp.where(_live(tile, x.ndim), _slice(x, tile), 0)


def _put(x: Float[Array, "K BT *rest"], new: Float[Array, "K Q *rest"], tile: Tile) -> Float[Array, "K BT *rest"]:
    new = jnp.where(_live(tile, x.ndim), new, _slice(x, tile))
    return lax.dynamic_update_slice_in_dim(x, new, tile.first_query, axis=1)


def _keys(x: Float[Array, "K BT H"], tile: Tile, width: int) -> Float[Array, "K C H"]:
    """The key list: the trunk, then the own branch from its beginning; what follows is masked."""
    of_trunk = lax.dynamic_slice_in_dim(x, tile.trunk, width, axis=1)
    of_branch = lax.dynamic_slice_in_dim(x, tile.branch - tile.trunk_length, width, axis=1)
    return jnp.where((jnp.arange(width) < tile.trunk_length)[None, :, None], of_trunk, of_branch)


def _add_keys(x: Float[Array, "K BT H"], new: Float[Array, "K C H"], tile: Tile) -> Float[Array, "K BT H"]:
    """Add a gradient of the key list to the keys it was taken from."""
    width = new.shape[1]
    in_trunk = (jnp.arange(width) < tile.trunk_length)[None, :, None]
    for start, part in ((tile.trunk, in_trunk), (tile.branch - tile.trunk_length, ~in_trunk)):
        old = lax.dynamic_slice_in_dim(x, start, width, axis=1)
        x = lax.dynamic_update_slice_in_dim(x, old + jnp.where(part, new, 0), start, axis=1)
    return x


def _scores(q: Float[Array, "K Q G H"], k: Float[Array, "K C H"], tile: Tile) -> Float[Array, "K Q G C"]:
    """Scaled scores in float32, lowest where a query does not see a key."""
    (kv_heads, length, groups, size), width = q.shape, k.shape[1]
    scores = _matmul("kqh,kch->kqc", _flat(q), k).reshape(kv_heads, length, groups, width) * size**-0.5
    column = jnp.arange(width)
    query = tile.first_query + jnp.arange(length)[:, None]
    seen = (column < tile.trunk_length) | (column - tile.trunk_length + tile.branch <= query)
    return jnp.where(seen[None, :, None], scores, jnp.finfo(jnp.float32).min)


TILES = Attention(plan, attend_tiles)
"""By tiles: O(T) memory, and work that follows the trees."""
