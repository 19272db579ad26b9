"""Attention over packed trees on CPU, in plain XLA. It computes only unmasked keys: work follows the trees, not T^2.

Rows are cut into tiles of up to `TILE` queries of the same response, or of the same turn of a prompt. A tile attends to
two spans of its row: the prompt of its response, and its own branch up to the tile's last query. Both are sliced into
one key list, whose length is rounded up to one of a few widths. Each width has its own loop, whose trip count is data,
so new rows need no new compilation, and memory is O(T). The backward pass recomputes the attention weights from the
saved log-sum-exp (FlashAttention, arXiv 2205.14135). Tests compare it with `masks.attend` under the mask
`masks.visible`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Shaped

from tpaw_jax.models.attention.masks import SAVED, Attention, Visibility, capped, slope
from tpaw_jax.types import AnyArray

TILE = 32
"""Queries per tile: enough for efficient matmuls, few enough that a response's last tile is not mostly padding."""


class Tile(NamedTuple):
    """A tile, or several. Indices count the tokens of all rows, laid end to end."""

    first_query: Int[Array, "*tiles"]
    queries: Int[Array, "*tiles"]  # number of queries, at most `TILE`
    trunk: Int[Array, "*tiles"]  # start of the tree's prompt
    trunk_length: Int[Array, "*tiles"]  # tokens of the prompt; 0 for tiles of the prompt itself
    branch: Int[Array, "*tiles"]  # start of the tile's own prompt or response


class Tiles(NamedTuple):
    """The tiles of some rows, ordered by the width of their key lists. Tiles [bounds[i], bounds[i+1]) have width i."""

    tile: Tile
    bounds: Int[Array, "widths+1"]
    window: Int[Array, ""]  # positions that a query sees, its own included


def key_widths(length: int) -> list[int]:
    """Return the widths of key lists in rows of `length` tokens: 32, 64, 96, ... 256, 320, ... `length`."""
    widths, width = [], TILE
    while width < length:
        widths.append(width)
        width += max(TILE, 2 ** (width.bit_length() - 3))
    return [*widths, length]


def plan(visibility: Visibility, window: int | None = None) -> Tiles:
    """Cut packed rows into tiles. The branches of a segment must follow each other, trunk first, without padding.

    With a window, tiles are the same: the keys before it are computed and masked.
    """
    segments_BT, branches_BT, prompt_end_BT = visibility.arrays()
    (rows, length), total = segments_BT.shape, segments_BT.size
    index = jnp.arange(total)
    differs = lambda x: jnp.pad(x[:, 1:] != x[:, :-1], ((0, 0), (1, 0)), constant_values=True).reshape(-1)
    new_part = differs(segments_BT) | differs(branches_BT)  # of the trunk, or a branch: tokens without padding
    new_segment = differs(segments_BT)
    start_of = lambda new: lax.cummax(jnp.where(new, index, 0))
    trunk, part = start_of(new_segment), start_of(new_part)
    end = lax.cummin(jnp.append(jnp.where(new_part, index, total)[1:], total), reverse=True)  # end of own part
    in_branch = branches_BT.reshape(-1) > 0
    prompt_end = (prompt_end_BT + jnp.arange(rows)[:, None] * length).reshape(-1)
    tile = Tile(
        first_query=index,
        queries=jnp.minimum(end - index, TILE),
        trunk=trunk,
        trunk_length=jnp.where(in_branch, prompt_end - trunk, 0),
        branch=jnp.where(in_branch, part, trunk),
    )
    keys = tile.trunk_length + index + tile.queries - tile.branch
    widths = jnp.asarray(key_widths(length))
    is_tile = ((index - part) % TILE == 0) & (segments_BT.reshape(-1) > 0)
    width = jnp.where(is_tile, jnp.searchsorted(widths, keys), len(widths))
    order = jnp.argsort(width)
    bounds = jnp.searchsorted(width[order], jnp.arange(len(widths) + 1))
    tile = jax.tree.map(lambda x: x[order].astype(jnp.int32), tile)
    return Tiles(tile, bounds.astype(jnp.int32), jnp.int32(total if window is None else window))


def attend_tiles(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K H"],
    tiles: Tiles,
    cap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Compute grouped-query attention of packed rows, softmax(q k^T / sqrt(H)) v over the visible keys; 0 for padding.

    Scores, softmax and sums are float32. The weights are rounded to the dtype of the values, as in `attend`.
    """
    return _attend(queries, keys, values, tiles, cap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(queries, keys, values, tiles, cap):
    return _forward(queries, keys, values, tiles, cap)[0]


def _forward(queries, keys, values, tiles, cap):
    rows, length, _, size = queries.shape
    total, kv_heads = rows * length, keys.shape[2]
    q_KTGH, k_KTH, v_KTH = _by_head(queries, kv_heads), _by_head(keys, 0), _by_head(values, 0)
    out_KTGH = jnp.zeros(q_KTGH.shape, queries.dtype)
    lse_KTG = jnp.zeros(q_KTGH.shape[:-1], jnp.float32)

    def body_of_width(width):
        def body(i, carry):
            out_KTGH, lse_KTG = carry
            tile = _take(tiles.tile, i)
            scores = _scores(_queries(q_KTGH, tile), _keys(k_KTH, tile, width), tile, tiles.window, cap)
            top = jnp.max(scores, axis=-1, keepdims=True)
            weights = jnp.exp(scores - top)
            total_weight = jnp.sum(weights, axis=-1, keepdims=True)
            flat = weights.astype(values.dtype).reshape(kv_heads, -1, width)
            attended = _matmul("kqc,kch->kqh", flat, _keys(v_KTH, tile, width)).reshape(*weights.shape[:-1], size)
            out_KTGH = _put(out_KTGH, (attended / total_weight).astype(out_KTGH.dtype), tile)
            return out_KTGH, _put(lse_KTG, (top + jnp.log(total_weight))[..., 0], tile)

        return body

    out_KTGH, lse_KTG = _loop_over_widths(tiles, length, body_of_width, (out_KTGH, lse_KTG))
    out = checkpoint_name(_by_row(out_KTGH[:, :total], rows), SAVED)
    lse_KTG = checkpoint_name(lse_KTG, SAVED)
    return out, (queries, keys, values, tiles, out, lse_KTG)


def _backward(cap, saved, d_out):
    queries, keys, values, tiles, out, lse_KTG = saved
    rows, length, _, size = queries.shape
    total, kv_heads = rows * length, keys.shape[2]
    q_KTGH, k_KTH, v_KTH = _by_head(queries, kv_heads), _by_head(keys, 0), _by_head(values, 0)
    d_out_KTGH = _by_head(d_out, kv_heads)
    # The sum over keys of weight times gradient:
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
    delta_KTG = _by_head(delta[..., None], kv_heads)[..., 0]
    zeros = lambda x: jnp.zeros(x.shape, jnp.float32)

    def body_of_width(width):
        def body(i, carry):
            d_q, d_k, d_v = carry
            tile = _take(tiles.tile, i)
            q, k, v = _queries(q_KTGH, tile), _keys(k_KTH, tile, width), _keys(v_KTH, tile, width)
            d_o = _queries(d_out_KTGH, tile)
            scores = _scores(q, k, tile, tiles.window, cap)
            weights = jnp.exp(scores - _slice(lse_KTG, tile)[..., None])
            weights = jnp.where(_live(tile, weights.ndim), weights, 0)
            d_weights = _matmul("kqh,kch->kqc", _flat(d_o), v).reshape(weights.shape)
            d_capped = weights * (d_weights - _slice(delta_KTG, tile)[..., None]) * size**-0.5
            d_scores = _flat((d_capped * slope(scores, cap)).astype(q.dtype))
            d_q = _put(d_q, _matmul("kqc,kch->kqh", d_scores, k).reshape(q.shape), tile)
            d_k = _add_keys(d_k, _matmul("kqc,kqh->kch", d_scores, _flat(q)), tile)
            d_v = _add_keys(d_v, _matmul("kqc,kqh->kch", _flat(weights.astype(v.dtype)), _flat(d_o)), tile)
            return d_q, d_k, d_v

        return body

    d_q, d_k, d_v = _loop_over_widths(tiles, length, body_of_width, (zeros(q_KTGH), zeros(k_KTH), zeros(v_KTH)))
    by_row = lambda x, like: _by_row(x[:, :total], rows).reshape(like.shape).astype(like.dtype)
    no_gradient = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), tiles)
    return by_row(d_q, queries), by_row(d_k, keys), by_row(d_v, values), no_gradient


_attend.defvjp(_forward, _backward)


def _loop_over_widths(tiles: Tiles, length: int, body_of_width: Any, carry: Any) -> Any:
    """For each width, run a loop over the tiles that have it."""
    for i, width in enumerate(key_widths(length)):
        carry = lax.fori_loop(tiles.bounds[i], tiles.bounds[i + 1], body_of_width(width), carry)
    return carry


def _by_head(x: Float[Array, "B T heads H"], groups_of: int) -> Array:
    """[B T K H] -> [K, B T + padding, H]; with `groups_of` = K, [B T N H] -> [K, B T + padding, N / K, H].

    With the padding at the end, no slice of queries or keys reaches past the array.
    """
    rows, length, heads, size = x.shape
    padding = max(length, TILE)
    split = (groups_of, heads // groups_of) if groups_of else (heads,)
    x = jnp.moveaxis(x.reshape(rows * length, *split, size), 1, 0)
    return jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))


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
    """Mask of the sliced queries that belong to the tile, to broadcast with [K, Q, ...]."""
    return (jnp.arange(TILE) < tile.queries).reshape(1, TILE, *[1] * (dimensions - 2))


def _queries(x: Float[Array, "K BT G H"], tile: Tile) -> Float[Array, "K Q G H"]:
    """The tile's queries (or their gradients), padded with 0."""
    return jnp.where(_live(tile, x.ndim), _slice(x, tile), 0)


def _put(x: Float[Array, "K BT *rest"], new: Float[Array, "K Q *rest"], tile: Tile) -> Float[Array, "K BT *rest"]:
    new = jnp.where(_live(tile, x.ndim), new, _slice(x, tile))
    return lax.dynamic_update_slice_in_dim(x, new, tile.first_query, axis=1)


def _keys(x: Shaped[Array, "K BT H"], tile: Tile, width: int) -> Shaped[Array, "K C H"]:
    """The tile's key list: the trunk, then its own branch. `_scores` masks the keys beyond the query."""
    from_trunk = lax.dynamic_slice_in_dim(x, tile.trunk, width, axis=1)
    from_branch = lax.dynamic_slice_in_dim(x, tile.branch - tile.trunk_length, width, axis=1)
    return jnp.where((jnp.arange(width) < tile.trunk_length)[None, :, None], from_trunk, from_branch)


def _add_keys(x: Float[Array, "K BT H"], new: Float[Array, "K C H"], tile: Tile) -> Float[Array, "K BT H"]:
    """Add the gradient of a key list to the gradient `x` of the keys in it."""
    width = new.shape[1]
    in_trunk = (jnp.arange(width) < tile.trunk_length)[None, :, None]
    for start, part in ((tile.trunk, in_trunk), (tile.branch - tile.trunk_length, ~in_trunk)):
        old = lax.dynamic_slice_in_dim(x, start, width, axis=1)
        x = lax.dynamic_update_slice_in_dim(x, old + jnp.where(part, new, 0), start, axis=1)
    return x


def _scores(
    q: Float[Array, "K Q G H"], k: Float[Array, "K C H"], tile: Tile, window: Int[AnyArray, ""], cap: float | None
) -> Array:
    """Scaled float32 scores, [K, Q, G, C]; masked keys get the lowest float. A key's column is its position."""
    (kv_heads, length, groups, size), width = q.shape, k.shape[1]
    scores = _matmul("kqh,kch->kqc", _flat(q), k).reshape(kv_heads, length, groups, width) * size**-0.5
    column = jnp.arange(width)
    query = tile.first_query + jnp.arange(length)[:, None] - tile.branch + tile.trunk_length
    seen = (column <= query) & (column > query - window)
    return jnp.where(seen[None, :, None], capped(scores, cap), jnp.finfo(jnp.float32).min)


TILES = Attention(plan, attend_tiles)
"""Tiled attention: O(T) memory; work follows the trees."""
