"""Which chunks of keys each block of queries attends to, for the attention on TPU and GPU.

A token of a tree attends to two ranges of its row: a part of the trunk, and its own branch up to itself. Branches are
short, so large blocks of queries and keys would mostly compute pairs that the mask then discards. Both attentions take
`QUERIES` tokens at a time, with all query heads of a key head, and gather the `CHUNK`-key chunks that any of them
attends to, a few per matmul. Which chunks those are is data, so new rows need no new compilation.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from tpaw_jax.models.attention.masks import Visibility, starts

QUERIES = 128
"""Tokens whose queries are computed together."""

CHUNK = 64
"""Keys that are skipped or computed together."""

CHUNKS = 4
"""Chunks of one matmul, unless `policy.attention_chunks` says otherwise. They need not be adjacent."""


class Rules(NamedTuple):
    """The attention rule of packed rows: token t attends to keys [r0, r1) and [r2, r3] of `ranges[:, :, t]`."""

    ranges: Int[Array, "B 4 T"]  # begin and end in the trunk, begin in the token's branch, the token itself
    chunks: Int[Array, "B Q C"]  # for each block of queries: the chunks of keys that it attends to, then -1
    matmuls: Int[Array, "B Q"]  # the number of matmuls for those chunks


def plan(visibility: Visibility, chunks: int = CHUNKS, window: int | None = None) -> Rules:
    """Compute the attention rule of packed rows, with `chunks` chunks per matmul.

    With a window, the ranges of a token begin where the window does.

    The tokens of a segment, and of a branch, must be contiguous.

    Raises:
        ValueError: the row length is not a multiple of 128.
    """
    segments_BT, branches_BT, prompt_end_BT = visibility.arrays()
    rows, length = segments_BT.shape
    if length % QUERIES:
        raise ValueError(
            f"Rows of {length} tokens: attention on TPU needs a multiple of {QUERIES}; change packing.row_length."
        )
    tree_BT, branch_BT = jax.vmap(starts)(segments_BT, branches_BT)
    trunk_end_BT = jnp.where(branches_BT == 0, tree_BT, prompt_end_BT)
    index_BT = jnp.broadcast_to(jnp.arange(length), (rows, length))
    trunk_BT = tree_BT
    if window is not None:  # of its trunk, a token sees as many keys as its branch leaves of the window
        trunk_BT = jnp.maximum(tree_BT, trunk_end_BT + index_BT - branch_BT - window + 1)
        branch_BT = jnp.maximum(branch_BT, index_BT - window + 1)
    ranges_B4T = jnp.stack([trunk_BT, trunk_end_BT, branch_BT, index_BT], axis=1).astype(jnp.int32)
    seen_BQC = seen_chunks(ranges_B4T)
    total = seen_BQC.shape[2]
    padding = -total % chunks
    chunk_BQC = jnp.sort(jnp.where(seen_BQC, jnp.arange(total), total), axis=2)
    chunks_BQC = jnp.where(chunk_BQC < total, chunk_BQC, -1)
    chunks_BQC = jnp.pad(chunks_BQC, ((0, 0), (0, 0), (0, padding)), constant_values=-1)
    matmuls_BQ = -(-seen_BQC.sum(axis=2) // chunks)
    return Rules(ranges_B4T, chunks_BQC.astype(jnp.int32), matmuls_BQ.astype(jnp.int32))


def seen_chunks(ranges_B4T: Int[Array, "B 4 T"]) -> Bool[Array, "B Q C"]:
    """Whether any query of each block attends to any key of each chunk."""
    rows, _, length = ranges_B4T.shape
    first_C = jnp.arange(length // CHUNK) * CHUNK
    overlaps = lambda begin, end: (begin[..., None] < first_C + CHUNK) & (end[..., None] > first_C)
    trunk_begin, trunk_end, branch, own = ranges_B4T.swapaxes(0, 1)
    seen_BTC = (overlaps(trunk_begin, trunk_end) & (trunk_end > trunk_begin)[..., None]) | overlaps(branch, own + 1)
    return seen_BTC.reshape(rows, -1, QUERIES, len(first_C)).any(axis=2)
