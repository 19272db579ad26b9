"""Attention over packed trees on TPU, with JAX's splash attention kernel and a mask that is data.

The kernel carries one int32 per query and calls `mask_function(query's int32, key's index)` to decide whether the query
attends to the key. A query of a response attends to its prompt and to its own response up to itself. That takes three
indices (the query's, the end of the prompt, the start of the response). They fit into 32 bits because prompts, their
turns and responses start at multiples of `alignment(T)` (`packing.alignment`). Segment ids keep trees apart. Blocks in
which no query attends to any key are skipped, by a table computed from the rows, so new rows need no new compilation.

Tests compare it with `attention.attend` under the mask `attention.visible`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as mask_info
from jaxtyping import Array, Bool, Float, Int

from tpaw_jax.models.attention import SAVED, Attention, Visibility

BLOCKS = (512, 256, 128)
"""Sizes of a block of queries; the largest that divides the row length is used. Key blocks are up to twice as large."""


class Rules(NamedTuple):
    """The attention rule of some packed rows. All of it is data; none of it is compiled in."""

    rule: Int[Array, "B T"]  # the query's index, the end of its prompt and the start of its branch, in 32 bits
    segments: Int[Array, "B T"]
    blocks: Bool[Array, "B Q C"]  # whether any query of a query block attends to any key of a key block


def alignment(length: int) -> int:
    """Return the multiple at which prompts and responses must start in rows of `length` tokens.

    It is 1 for up to 1024 tokens, and 2, 4, 16 and 32 for 2048, 4096, 8192 and 16384 tokens.
    """
    return 2 ** max(0, -(-(3 * _bits(length) - 32) // 2))


def splash_attention(interpret: bool = False) -> Attention:
    """Build splash attention, for use inside `shard_map` or on one device.

    Rows must be a multiple of 128 tokens long and packed by `packing.pack` with `alignment(T)`. With `interpret`, the
    kernel runs on any device, but slowly.
    """
    return Attention(plan, functools.partial(attend_blocks, interpret=interpret))


def plan(visibility: Visibility) -> Rules:
    """Compute the attention rule of packed rows. The tokens of a branch must be contiguous.

    Raises:
        ValueError: the row length is not a multiple of 128.
    """
    segments_BT, branches_BT, prompt_end_BT = visibility.arrays()
    length = segments_BT.shape[1]
    tree_BT, branch_BT = jax.vmap(_starts)(segments_BT, branches_BT)
    index_T, step, bits = jnp.arange(length), alignment(length), _bits(length)
    coarse_bits = _bits(-(-length // step))
    # Rounding up the end of a prompt adds only padding, which belongs to no tree.
    rule_BT = index_T | -(-prompt_end_BT // step) << bits | (branch_BT // step) << (bits + coarse_bits)
    blocks_BQC = _seen_blocks(tree_BT, prompt_end_BT, branch_BT, *_blocks(length))
    return Rules(rule_BT.astype(jnp.int32), segments_BT, blocks_BQC)


def attend_blocks(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K H"],
    rules: Rules,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Compute grouped-query attention of packed rows, softmax(q k^T / sqrt(H)) v over the keys that `rules` allow."""
    length, size = queries.shape[1], queries.shape[3]
    query, key = _blocks(length)
    sizes = kernel.BlockSizes(
        block_q=query,
        block_kv=key,
        block_kv_compute=query,
        block_q_dkv=query,
        block_kv_dkv=key,
        block_kv_dkv_compute=query,
        use_fused_bwd_kernel=True,
    )

    def one_row(row):
        q_NTH, k_KTH, v_KTH, rules = row
        table = rules.blocks[None].astype(jnp.int32)
        info = lambda axis: mask_info.MaskInfo(_next_block(rules.blocks, axis)[None], None, table, None, rules.rule)
        attention = kernel.SplashAttentionKernel(
            info(axis=1),
            None,
            info(axis=0),
            block_sizes=sizes,
            is_mqa=False,
            save_residuals=False,
            mask_value=kernel.DEFAULT_MASK_VALUE,
            attn_logits_soft_cap=None,
            residual_checkpoint_name=SAVED,
            mask_function=functools.partial(_sees, length),
            interpret=interpret,
        )
        return attention(q_NTH, k_KTH, v_KTH, kernel.SegmentIds(rules.segments, rules.segments))

    by_head = lambda x_BTNH: x_BTNH.swapaxes(1, 2)
    attended = lax.map(one_row, (by_head(queries * size**-0.5), by_head(keys), by_head(values), rules))
    return by_head(attended).astype(queries.dtype)


def _sees(length: int, rule: Array, key: Array) -> Array:
    """The kernel's mask function: whether queries with this rule attend to keys of the same tree at these indices."""
    bits, step = _bits(length), alignment(length)
    coarse_bits = _bits(-(-length // step))
    part = lambda shift, width: lax.shift_right_logical(rule, jnp.full_like(rule, shift)) & (2**width - 1)
    own, prompt_end, branch = (
        rule & (2**bits - 1),
        part(bits, coarse_bits) * step,
        part(bits + coarse_bits, coarse_bits),
    )
    return (key <= own) & ((key < prompt_end) | (key >= branch * step))


def _starts(segments_T: Array, branches_T: Array) -> tuple[Array, Array]:
    """For each token: the start of its segment, and of its branch; the trunk starts with the segment."""
    index = jnp.arange(len(segments_T))
    token = segments_T > 0
    before = lax.cummax(jnp.where(token, index, -1))  # the last token so far, because segments may contain padding
    before = jnp.concatenate([jnp.full(1, -1), before[:-1]])
    segment_before = jnp.where(before >= 0, segments_T[jnp.maximum(before, 0)], 0)
    differs = lambda x: jnp.concatenate([jnp.ones(1, bool), x[1:] != x[:-1]])
    start_of = lambda new: lax.cummax(jnp.where(new, index, 0))
    segment = jnp.where(token, start_of(token & (segments_T != segment_before)), index)
    branch = start_of(differs(segments_T) | differs(branches_T))
    return segment, jnp.where(branches_T == 0, segment, branch)


def _seen_blocks(tree_BT: Array, prompt_end_BT: Array, branch_BT: Array, query: int, keys: int) -> Array:
    """[B, T / query, T / keys]: whether a block of queries attends to any key of its prompts or branches in a block."""
    rows, length = tree_BT.shape
    first_C = jnp.arange(length // keys) * keys
    overlaps = lambda begin_BT, end_BT: (begin_BT[..., None] < first_C + keys) & (end_BT[..., None] > first_C)
    seen_BTC = overlaps(tree_BT, prompt_end_BT) | overlaps(branch_BT, jnp.arange(1, length + 1)[None])
    return seen_BTC.reshape(rows, -1, query, len(first_C)).any(axis=2)


def _next_block(blocks_QC: Array, axis: int) -> Array:
    """For each block, the next one along `axis` that is computed, or the last one; the kernel prefetches it."""
    index = lax.broadcasted_iota(jnp.int32, blocks_QC.shape, axis)
    following = lax.cummin(jnp.where(blocks_QC, index, blocks_QC.shape[axis]), axis=axis, reverse=True)
    last = jnp.max(jnp.where(blocks_QC, index, 0), axis=axis, keepdims=True)
    return jnp.minimum(following, last)


def _blocks(length: int) -> tuple[int, int]:
    """Sizes of query blocks and key blocks in rows of `length` tokens."""
    query = next((size for size in BLOCKS if length % size == 0), None)
    if query is None:
        raise ValueError(
            f"Rows of {length} tokens: splash attention needs a multiple of {BLOCKS[-1]}; change packing.row_length."
        )
    return query, 2 * query if length % (2 * query) == 0 else query


def _bits(values: int) -> int:
    return (values - 1).bit_length()
