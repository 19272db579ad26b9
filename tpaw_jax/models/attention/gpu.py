"""Attention over packed trees on GPU, in plain XLA: the matmuls of `rules`, many blocks of queries at once.

A GPU needs hundreds of matmuls in flight, where `tiles` computes one after the other. Blocks of queries are sorted by
their number of matmuls and taken `BLOCKS` at a time, over all rows of a device. Within such a batch, matmul j of every
block runs as one batched matmul, with the running softmax of FlashAttention (arXiv 2205.14135) over j.

Gradients of keys are summed by scatter-add, which XLA computes with atomics on GPU unless XLA_FLAGS has
`--xla_gpu_deterministic_ops=true`.

Tests compare it with `masks.attend` under the mask `masks.visible`.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from tpaw_jax.models.attention import rules
from tpaw_jax.models.attention.masks import SAVED, Attention, Visibility, capped, slope
from tpaw_jax.models.attention.rules import CHUNK, CHUNKS, QUERIES

BLOCKS = 32
"""Blocks of queries in a batch. With 32 heads, their float32 scores take 128 MiB."""

MASKED, LOG2_E = -1e30, math.log2(math.e)


class Batches(NamedTuple):
    """The blocks of queries of some rows, in batches. Token and chunk indices run over all rows, laid end to end."""

    blocks: Int[Array, "S M"]  # most matmuls first; the last batch may end with missing blocks
    ranges: Int[Array, "S M 4 Q"]  # what their tokens attend to, see `rules.Rules`
    chunks: Int[Array, "S M C"]  # the chunks that they attend to, then the number of all chunks
    matmuls: Int[Array, "S"]  # the most matmuls of a block of the batch


def plan(visibility: Visibility, chunks: int = CHUNKS, window: int | None = None) -> Batches:
    """Compute the batches of packed rows, with `chunks` chunks of keys per matmul.

    The tokens of a segment, and of a branch, must be contiguous.
    """
    padded = Visibility(*(_pad(x, axis=1) for x in visibility.arrays()))
    ranges_B4T, chunks_BQC, matmuls_BQ = rules.plan(padded, chunks, window)
    rows, _, length = ranges_B4T.shape
    row = jnp.arange(rows)[:, None, None]
    in_row, total = length // CHUNK, rows * length // CHUNK
    ranges_N4Q = (ranges_B4T + row * length).reshape(rows, 4, -1, QUERIES).swapaxes(1, 2).reshape(-1, 4, QUERIES)
    chunks_NC = jnp.where(chunks_BQC < 0, total, chunks_BQC + row * in_row).reshape(matmuls_BQ.size, -1)
    blocks = min(BLOCKS, matmuls_BQ.size)
    order = jnp.argsort(-matmuls_BQ.reshape(-1))
    order = jnp.pad(order, (0, -len(order) % blocks), constant_values=len(order))
    take = lambda x, missing: jnp.take(x, order, axis=0, mode="fill", fill_value=missing)
    batched = lambda x: x.reshape(-1, blocks, *x.shape[1:]).astype(jnp.int32)
    matmuls = batched(take(matmuls_BQ.reshape(-1), 0)).max(axis=1)
    return Batches(batched(order), batched(take(ranges_N4Q, 0)), batched(take(chunks_NC, total)), matmuls)


def attend_batches(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K H"],
    batches: Batches,
    *,
    chunks: int = CHUNKS,
    cap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Compute grouped-query attention of packed rows, softmax(q k^T / sqrt(H)) v over the visible keys.

    Scores, softmax and sums are float32. The weights are rounded to the dtype of the values, as in `masks.attend`.
    `chunks` must be that of the `batches`.
    """
    rows, length, heads, size = queries.shape
    kv_heads = keys.shape[2]
    q, k, v = (_pad(x, axis=1) for x in (queries, keys, values))
    split = q.reshape(rows, -1, QUERIES, kv_heads, heads // kv_heads, size)
    q_KNWH = split.transpose(3, 0, 1, 4, 2, 5).reshape(kv_heads, rows * split.shape[1], -1, size)
    by_chunk = lambda x: jnp.moveaxis(x, 2, 0).reshape(kv_heads, -1, CHUNK, size)
    out_KNWH = _attend(q_KNWH, by_chunk(k), by_chunk(v), batches, _Options(chunks, cap))
    out = out_KNWH.reshape(kv_heads, rows, -1, heads // kv_heads, QUERIES, size).transpose(1, 2, 4, 0, 3, 5)
    return out.reshape(rows, -1, heads, size)[:, :length]


def gpu_attention(chunks: int = CHUNKS) -> Attention:
    """Build the attention of packed trees on GPU, with `chunks` chunks of keys per matmul. It takes O(T) memory."""
    prepare = lambda visibility, window=None: plan(visibility, chunks, window)
    return Attention(prepare, functools.partial(attend_batches, chunks=chunks))


class _Options(NamedTuple):
    chunks: int  # of a matmul
    cap: float | None

    @property
    def cap_log2(self) -> float | None:
        return None if self.cap is None else self.cap * LOG2_E


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: Array, k: Array, v: Array, batches: Batches, options: _Options) -> Array:
    return _forward(q, k, v, batches, options)[0]


def _forward(q_KNWH: Array, k_KCXH: Array, v_KCXH: Array, batches: Batches, options: _Options) -> tuple[Array, Any]:
    per_matmul = options.chunks
    heads, _, width, size = q_KNWH.shape

    def one_batch(_, batch):
        q = _take(q_KNWH, batch.blocks)

        def one_matmul(j, carry):
            most, total, acc = carry
            chunks = lax.dynamic_slice_in_dim(batch.chunks, j * per_matmul, per_matmul, axis=1)
            s = _dot("kmwh,kmxh->kmwx", q, _gather(k_KCXH, chunks)) * (LOG2_E * size**-0.5)
            s = jnp.where(_sees(batch, chunks, width), capped(s, options.cap_log2), MASKED)
            new = jnp.maximum(most, s.max(axis=-1, keepdims=True))
            p, scale = jnp.exp2(s - new), jnp.exp2(most - new)
            acc = acc * scale + _dot("kmwx,kmxh->kmwh", p.astype(v_KCXH.dtype), _gather(v_KCXH, chunks))
            return new, total * scale + p.sum(axis=-1, keepdims=True), acc

        column = jnp.zeros((heads, len(batch.blocks), width, 1), jnp.float32)
        nothing = column + MASKED, column, jnp.zeros(q.shape, jnp.float32)
        most, total, acc = lax.fori_loop(0, batch.matmuls, one_matmul, nothing)
        return None, ((acc / total).astype(q.dtype), (most + jnp.log2(total))[..., 0])

    _, (out, lse) = lax.scan(one_batch, None, batches)
    out = checkpoint_name(_in_order(out, batches, q_KNWH.shape[1]), SAVED)
    lse = checkpoint_name(_in_order(lse, batches, q_KNWH.shape[1]), SAVED)
    return out, (q_KNWH, k_KCXH, v_KCXH, batches, out, lse)


def _backward(options: _Options, saved: Any, d_out_KNWH: Array) -> tuple[Array, Array, Array, Any]:
    q_KNWH, k_KCXH, v_KCXH, batches, out_KNWH, lse_KNW = saved
    per_matmul, cap = options.chunks, options.cap_log2
    scale = q_KNWH.shape[-1] ** -0.5
    delta_KNW = jnp.sum(out_KNWH.astype(jnp.float32) * d_out_KNWH.astype(jnp.float32), axis=-1)

    def one_batch(carry, batch):
        q, d_out = _take(q_KNWH, batch.blocks), _take(d_out_KNWH, batch.blocks)
        lse, delta = (_take(x, batch.blocks)[..., None] for x in (lse_KNW, delta_KNW))

        def one_matmul(j, carry):
            dq, dk, dv = carry
            chunks = lax.dynamic_slice_in_dim(batch.chunks, j * per_matmul, per_matmul, axis=1)
            k, v = _gather(k_KCXH, chunks), _gather(v_KCXH, chunks)
            s = capped(_dot("kmwh,kmxh->kmwx", q, k) * (LOG2_E * scale), cap)
            p = jnp.where(_sees(batch, chunks, q.shape[2]), jnp.exp2(s - lse), 0.0)
            dv = _add(dv, chunks, _dot("kmwx,kmwh->kmxh", p.astype(v.dtype), d_out))
            d_capped = p * (_dot("kmwh,kmxh->kmwx", d_out, v) - delta) * scale
            ds = (d_capped * slope(s, cap)).astype(k.dtype)
            dk = _add(dk, chunks, _dot("kmwx,kmwh->kmxh", ds, q))
            return dq + _dot("kmwx,kmxh->kmwh", ds, k), dk, dv

        dq = jnp.zeros(q.shape, jnp.float32)
        dq, *carry = lax.fori_loop(0, batch.matmuls, one_matmul, (dq, *carry))
        return tuple(carry), dq.astype(q.dtype)

    zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
    (dk, dv), dq = lax.scan(one_batch, (zeros(k_KCXH), zeros(v_KCXH)), batches)
    dq = _in_order(dq, batches, q_KNWH.shape[1])
    no_gradient = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), batches)
    return dq, dk.astype(k_KCXH.dtype), dv.astype(v_KCXH.dtype), no_gradient


_attend.defvjp(_forward, _backward)


def _pad(x: Array, axis: int) -> Array:
    """Pad an axis of tokens with zeros to whole blocks of queries."""
    return jnp.pad(x, [(0, -x.shape[i] % QUERIES if i == axis else 0) for i in range(x.ndim)])


def _take(x_KN: Array, blocks: Int[Array, "M"]) -> Array:
    return jnp.take(x_KN, blocks, axis=1, mode="fill", fill_value=0)


def _in_order(x_SKM: Array, batches: Batches, blocks: int) -> Array:
    """[batches, K, blocks of a batch, ...] -> [K, all blocks, ...] in the order of the rows."""
    place = jnp.argsort(batches.blocks.reshape(-1))[:blocks]
    x_KSM = jnp.moveaxis(x_SKM, 1, 0)
    return jnp.take(x_KSM.reshape(x_KSM.shape[0], -1, *x_KSM.shape[3:]), place, axis=1)


def _gather(x_KCXH: Array, chunks: Int[Array, "M chunks"]) -> Float[Array, "K M X H"]:
    """The keys of some chunks, in one axis for each block."""
    found = jnp.take(x_KCXH, chunks, axis=1, mode="fill", fill_value=0)
    return found.reshape(*found.shape[:2], -1, found.shape[-1])


def _add(x_KCXH: Array, chunks: Int[Array, "M chunks"], change_KMXH: Array) -> Array:
    """Add to the gradients of some chunks of keys. What belongs to missing chunks is dropped."""
    change = change_KMXH.reshape(x_KCXH.shape[0], *chunks.shape, CHUNK, -1)
    return x_KCXH.at[:, chunks].add(change, mode="drop")


def _sees(batch: Batches, chunks: Int[Array, "M chunks"], width: int) -> Bool[Array, "M W X"]:
    """Whether each query attends to each key of the chunks. Queries are tokens within heads of the group."""
    key = (chunks[..., None] * CHUNK + jnp.arange(CHUNK)).reshape(len(chunks), 1, -1)
    trunk, end, branch, own = jnp.moveaxis(batch.ranges[..., None], 1, 0)
    seen = ((key >= trunk) & (key < end)) | ((key >= branch) & (key <= own))
    return jnp.tile(seen, (1, width // QUERIES, 1))


def _dot(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
