"""Attention over packed trees on TPU: a Pallas kernel that computes only the keys that queries attend to.

It computes the matmuls of `rules`. A row's keys and values of one head, and their gradients, stay in VMEM, which bounds
the length of rows.

Scores are computed as [keys, queries]: softmax then reduces over sublanes, and the mask, which is the same for the
heads of a group, is computed once for all of them. They are in units of log 2, because the hardware has exp2.

Tests compare it with `masks.attend` under the mask `masks.visible`.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from tpaw_jax.models.attention.masks import SAVED, Attention, capped, slope
from tpaw_jax.models.attention.rules import CHUNK, CHUNKS, QUERIES, Rules, plan

VMEM = 60 * 2**20
"""Bytes of VMEM that the kernels use if they can: TPUs from v5e on have 64 MiB or more."""

SCHEDULES = ((4, 2), (4, 1), (2, 1), (1, 1))
"""Blocks of queries in a step of the grid, and buffers for a row's keys: the first one that fits is used. With two
buffers, the keys of the next head are read while this one is computed."""

INPUTS = ("queries", "keys", "keys", "queries", "per query", "per query")
"""What the kernels' inputs hold a block of: q, k, v, and for the backward pass the output's gradient, lse and delta."""

FIRST, LAST = 0, 1
"""Axes of a matrix."""

MASKED, LOG2_E = -1e30, math.log2(math.e)


def tpu_attention(vmem: int = VMEM, interpret: bool = False, chunks: int = CHUNKS) -> Attention:
    """Build the attention of packed trees on TPU, for use inside `shard_map` or on one device.

    Rows must be a multiple of 128 tokens long. With heads of 128, the keys of 32,768 tokens fit into the default of
    `vmem` bytes, and those of 65,536 into 110 MiB. With `interpret`, the kernels run on any device, but slowly. A
    matmul has `chunks` chunks of keys.
    """
    attend = functools.partial(attend_chunks, vmem=vmem, interpret=interpret, chunks=chunks)
    return Attention(lambda visibility, window=None: plan(visibility, chunks, window), attend)


def attend_chunks(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K H"],
    rules: Rules,
    *,
    vmem: int = VMEM,
    interpret: bool = False,
    chunks: int = CHUNKS,
    cap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Compute grouped-query attention of packed rows, softmax(q k^T / sqrt(H)) v over the keys that `rules` allow.

    `chunks` must be that of the `rules`.

    Raises:
        ValueError: the keys of a row do not fit into `vmem` bytes.
    """
    rows, length, heads, size = queries.shape
    kv_heads = keys.shape[2]
    grouped = queries.reshape(rows, length, kv_heads, heads // kv_heads, size)
    q_BKGTH, k_BKTH, v_BKTH = grouped.transpose(0, 2, 3, 1, 4), keys.swapaxes(1, 2), values.swapaxes(1, 2)
    options = _options(q_BKGTH, Options(0, 0, chunks, vmem, interpret, cap))
    out_BKGTH = _attend(q_BKGTH, k_BKTH, v_BKTH, rules, options)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(queries.shape)


class Options(NamedTuple):
    """How the kernels run."""

    blocks: int  # of queries in a step of the grid
    buffers: int  # for the keys of a row
    chunks: int  # of keys in a matmul
    vmem: int  # bytes
    interpret: bool
    cap: float | None = None  # soft cap of scores


def _options(q_BKGTH: Array, wanted: Options) -> Options:
    """The options with the first of `SCHEDULES` for which the backward kernel fits into VMEM, if possible in `VMEM`."""
    _, _, groups, length, size = q_BKGTH.shape
    lanes, itemsize = -(-size // 128) * 128, q_BKGTH.dtype.itemsize
    for vmem, (blocks, buffers) in itertools.product(sorted({min(VMEM, wanted.vmem), wanted.vmem}), SCHEDULES):
        keys = 2 * length * lanes * (itemsize + 4) * buffers  # k and v, and the float32 gradients of both
        queries = 3 * 2 * blocks * groups * QUERIES * lanes * itemsize  # q, d_out and dq, two buffers each
        scores = 5 * wanted.chunks * CHUNK * groups * QUERIES * 4  # the values of one matmul, by the compiler's reports
        sums = 3 * lanes * groups * QUERIES * 4  # `acc`, and what it takes to add to it and to write it
        if length % (blocks * QUERIES) == 0 and keys + queries + scores + sums <= vmem:
            return wanted._replace(blocks=blocks, buffers=buffers, vmem=vmem)
    raise ValueError(
        f"Rows of {length} tokens: with heads of {size}, their keys do not fit into the {wanted.vmem // 2**20} MiB of "
        "VMEM that attention on this TPU may use; lower packing.row_length or policy.attention_chunks."
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: Array, k: Array, v: Array, rules: Rules, options: Options) -> Array:
    return _attend_fwd(q, k, v, rules, options)[0]


def _attend_fwd(q: Array, k: Array, v: Array, rules: Rules, options: Options) -> tuple[Array, Any]:
    out, lse = _call(_forward_kernel, (q, k, v), ("queries", "per query"), rules, options)
    out, lse = checkpoint_name(out, SAVED), checkpoint_name(lse, SAVED)
    return out, (q, k, v, rules, out, lse)


def _attend_bwd(options: Options, residuals: Any, d_out: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, rules, out, lse = residuals
    delta = _by_block(jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1), options.blocks)
    inputs = (q, k, v, d_out, lse, delta)
    dq, dk, dv = _call(_backward_kernel, inputs, ("queries", "keys", "keys"), rules, options)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _call(
    kernel: Callable[..., None], inputs: tuple[Array, ...], outputs: tuple[str, ...], rules: Rules, options: Options
) -> Any:
    """Run a kernel over rows, key heads, and steps of some blocks of queries."""
    rows, kv_heads, groups, length, size = inputs[0].shape
    blocks, tokens = options.blocks, options.blocks * QUERIES
    steps = length // tokens
    block = {
        "queries": pl.BlockSpec((None, None, groups, tokens, size), lambda b, h, i: (b, h, 0, i, 0)),
        "keys": pl.BlockSpec(
            (None, None, length, size), lambda b, h, i: (b, h, 0, 0), pipeline_mode=pl.Buffered(options.buffers)
        ),
        "per query": pl.BlockSpec((None, None, None, blocks, groups * QUERIES), lambda b, h, i: (b, h, i, 0, 0)),
    }
    shape = {
        "queries": jax.ShapeDtypeStruct(inputs[0].shape, inputs[0].dtype),
        "keys": jax.ShapeDtypeStruct((rows, kv_heads, length, size), jnp.float32),
        "per query": jax.ShapeDtypeStruct((rows, kv_heads, steps, blocks, groups * QUERIES), jnp.float32),
    }
    in_smem = lambda x: pl.BlockSpec((None, None, *x.shape[2:]), lambda b, h, i: (b, i, 0, 0), memory_space=pltpu.SMEM)
    chunks, matmuls = rules.chunks.reshape(rows, steps, blocks, -1), rules.matmuls.reshape(rows, steps, 1, blocks)
    rule_specs = [in_smem(chunks), in_smem(matmuls), pl.BlockSpec((None, 4, tokens), lambda b, h, i: (b, 0, i))]
    return pl.pallas_call(
        functools.partial(kernel, per_matmul=options.chunks, cap=options.cap and options.cap * LOG2_E),
        grid=(rows, kv_heads, steps),
        in_specs=rule_specs + [block[kind] for kind in INPUTS[: len(inputs)]],
        out_specs=[block[kind] for kind in outputs],
        out_shape=[shape[kind] for kind in outputs],
        scratch_shapes=[pltpu.VMEM((size, groups * QUERIES), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "parallel", "arbitrary"), vmem_limit_bytes=options.vmem
        ),
        name=kernel.__name__.strip("_"),
        interpret=options.interpret,
    )(chunks, matmuls, rules.ranges, *inputs)


def _forward_kernel(*refs: Any, per_matmul: int, cap: float | None) -> None:
    """The output of a step's queries, and the log of the sum of the exponentials of their scores."""
    chunks, matmuls, ranges, q, k, v, out, lse, acc = refs
    groups, tokens, size = q.shape
    width = groups * QUERIES

    def one_block(i, _):
        here = _queries(i)
        q_WH, ranges_4Q = q[:, here, :].reshape(width, size), ranges[:, here]
        acc[...] = jnp.zeros_like(acc)

        def one_matmul(j, carry):
            most_1W, total_1W = carry
            starts = _starts_of_chunks(chunks, i, j * per_matmul, per_matmul)
            s_KW = _dot(_gather(k, starts), q_WH, LAST, LAST) * (LOG2_E * size**-0.5)
            s_KW = jnp.where(_sees(ranges_4Q, starts, groups), capped(s_KW, cap), MASKED)
            new_1W = jnp.maximum(most_1W, s_KW.max(axis=0, keepdims=True))
            p_KW, scale_1W = jnp.exp2(s_KW - new_1W), jnp.exp2(most_1W - new_1W)
            acc[...] = acc[...] * scale_1W + _dot(_gather(v, starts), p_KW.astype(v.dtype), FIRST, FIRST)
            return new_1W, total_1W * scale_1W + p_KW.sum(axis=0, keepdims=True)

        nothing = jnp.full((1, width), MASKED, jnp.float32), jnp.zeros((1, width), jnp.float32)
        most_1W, total_1W = lax.fori_loop(0, matmuls[0, i], one_matmul, nothing)
        out[:, here, :] = (acc[...] / total_1W).T.reshape(groups, QUERIES, size).astype(out.dtype)
        lse[pl.ds(i, 1), :] = most_1W + jnp.log2(total_1W)
        return 0

    lax.fori_loop(0, tokens // QUERIES, one_block, 0)


def _backward_kernel(*refs: Any, per_matmul: int, cap: float | None) -> None:
    """The gradients of a step's queries; those of all keys and values are summed over the steps."""
    chunks, matmuls, ranges, q, k, v, d_out, lse, delta, dq, dk, dv, acc = refs
    step, (groups, tokens, size) = pl.program_id(2), q.shape
    width = groups * QUERIES

    @pl.when(step == 0)
    def first_step():
        dk[...], dv[...] = jnp.zeros_like(dk), jnp.zeros_like(dv)

    def one_block(i, _):
        here = _queries(i)
        q_WH, d_out_WH = (x[:, here, :].reshape(width, size) for x in (q, d_out))
        ranges_4Q, lse_1W, delta_1W = ranges[:, here], lse[pl.ds(i, 1), :], delta[pl.ds(i, 1), :]
        acc[...] = jnp.zeros_like(acc)

        def one_matmul(j, _):
            starts = _starts_of_chunks(chunks, i, j * per_matmul, per_matmul)
            k_KH, v_KH = _gather(k, starts), _gather(v, starts)
            s_KW = capped(_dot(k_KH, q_WH, LAST, LAST) * (LOG2_E * size**-0.5), cap)
            p_KW = jnp.where(_sees(ranges_4Q, starts, groups), jnp.exp2(s_KW - lse_1W), 0.0)
            _add_to_chunks(dv, starts, _dot(p_KW.astype(v.dtype), d_out_WH, LAST, FIRST))
            d_capped_KW = p_KW * (_dot(v_KH, d_out_WH, LAST, LAST) - delta_1W)
            ds_KW = (d_capped_KW * slope(s_KW, cap)).astype(k.dtype)
            _add_to_chunks(dk, starts, _dot(ds_KW, q_WH, LAST, FIRST) * size**-0.5)
            acc[...] += _dot(k_KH, ds_KW, FIRST, FIRST)
            return 0

        lax.fori_loop(0, matmuls[0, i], one_matmul, 0)
        dq[:, here, :] = (acc[...] * size**-0.5).T.reshape(groups, QUERIES, size).astype(dq.dtype)
        return 0

    lax.fori_loop(0, tokens // QUERIES, one_block, 0)


def _queries(block: Array) -> pl.Slice:
    return pl.ds(pl.multiple_of(block * QUERIES, QUERIES), QUERIES)


def _starts_of_chunks(chunks: Any, block: Array, first: Array, count: int) -> list[Array]:
    """The first keys of `count` chunks; that of a missing chunk is negative, so that no query attends to it."""
    return [chunks[block, first + n] * CHUNK for n in range(count)]


def _keys(start: Array) -> pl.Slice:
    return pl.ds(pl.multiple_of(jnp.maximum(start, 0), CHUNK), CHUNK)


def _gather(x: Any, starts: list[Array]) -> Array:
    return jnp.concatenate([x[_keys(start), :] for start in starts])


def _add_to_chunks(x: Any, starts: list[Array], change_KH: Array) -> None:
    for n, start in enumerate(starts):
        x[_keys(start), :] += change_KH[n * CHUNK : (n + 1) * CHUNK]


def _sees(ranges_4Q: Array, starts: list[Array], groups: int) -> Array:
    """[keys of the chunks, queries of the group]: whether each query attends to each key."""
    index_CQ = lax.broadcasted_iota(jnp.int32, (CHUNK, QUERIES), 0)
    parts = []
    for start in starts:
        key_CQ = start + index_CQ
        trunk, end, branch, own = (ranges_4Q[n : n + 1] for n in range(4))
        parts.append(((key_CQ >= trunk) & (key_CQ < end)) | ((key_CQ >= branch) & (key_CQ <= own)))
    return jnp.tile(jnp.concatenate(parts), (1, groups))


def _dot(a: Array, b: Array, axis_of_a: int, axis_of_b: int) -> Array:
    """The product of two matrices, contracted over these axes, in float32."""
    return lax.dot_general(a, b, (((axis_of_a,), (axis_of_b,)), ((), ())), preferred_element_type=jnp.float32)


def _by_block(x_BKGT: Array, blocks: int) -> Array:
    """One number per query, in the kernel's order: blocks of tokens, then heads of the group, then tokens."""
    rows, kv_heads, groups, _ = x_BKGT.shape
    split = x_BKGT.reshape(rows, kv_heads, groups, -1, blocks, QUERIES)
    return split.transpose(0, 1, 3, 4, 2, 5).reshape(rows, kv_heads, -1, blocks, groups * QUERIES)
