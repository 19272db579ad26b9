"""Log-probs of responses: the function that scoring and training share.

The output head runs only over the predictions of a row, in chunks, so the [B, T, V] logits are never materialized. The
logits of the predictions are kept only if a rematerialization policy says so. Softmax and sums are float32.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from tpaw_jax.models.attention import Visibility, capped, slope, visible
from tpaw_jax.models.experts import RouterStatistics
from tpaw_jax.models.parallel import context
from tpaw_jax.models.transformer import KEEPS_LOGITS, Transformer, head_name
from tpaw_jax.types import TreeBatch

VOCABULARY_BLOCK = 1024
"""Logits per prediction that are computed at a time: few enough for a CPU's cache, enough for full matmul speed."""

LogProbFn = Callable[[PyTree[Array], TreeBatch], Float[Array, "B R"]]
"""(params, batch) -> summed log-prob of every response, nats. Scoring and the train step access a model through it."""

RoutedLogProbFn = Callable[[PyTree[Array], TreeBatch], tuple[Float[Array, "B R"], RouterStatistics | None]]
"""The same with the statistics of the routers, of each row, see `make_routed_log_prob_fn`."""

ApplyFn = Callable[[PyTree[Array], Array, Array, Array], Array]
"""(params, tokens [B, T], positions [B, T], mask [B, T, T]) -> logits [B, T, V]: a user's own model."""


def make_log_prob_fn(model: Transformer, head_chunk: int) -> LogProbFn:
    """Build the log-prob function of a `Transformer`.

    The logits of the predictions are kept for the backward pass if the model's `remat` is in `KEEPS_LOGITS`. If the
    model is sharded (`Transformer.parallel`), call the function inside `shard_map`, with one device's rows and
    parameter shards.

    Args:
        model: the model.
        head_chunk: predictions of each row that the output head computes at a time.
    """
    routed = make_routed_log_prob_fn(model, head_chunk)
    return lambda params, batch: routed(params, batch)[0]


def make_routed_log_prob_fn(model: Transformer, head_chunk: int) -> RoutedLogProbFn:
    """Build `make_log_prob_fn`'s function with the statistics of the routers of a mixture of experts as second result.

    They are None if the model is dense.
    """
    keep = model.remat in KEEPS_LOGITS

    def log_prob_fn(params: PyTree[Array], batch: TreeBatch) -> tuple[Float[Array, "B R"], RouterStatistics | None]:
        batch = jax.tree.map(jnp.asarray, batch)  # outside jit, host batches work too
        (batch, hidden, table, labels, live, axis), statistics = _predictions(model, params, batch)
        options = {"keep": keep, "axis": axis, "cap": model.config.logits_cap}
        log_probs_BP = token_log_probs(hidden, table, labels, live, head_chunk, **options)
        return _totals(log_probs_BP, batch, model), statistics

    return log_prob_fn


def make_greedy_fn(model: Transformer, head_chunk: int) -> Callable[[PyTree[Array], TreeBatch], Float[Array, "B R 2"]]:
    """Build (params, batch) -> [summed log-prob of every response in nats, 1 if all its tokens are the argmax else 0].

    For evaluation. The output head is computed twice.
    """

    def greedy_fn(params: PyTree[Array], batch: TreeBatch) -> Float[Array, "B R 2"]:
        batch = jax.tree.map(jnp.asarray, batch)
        (batch, hidden, table, labels, live, axis), _ = _predictions(model, params, batch)
        log_probs_BP = token_log_probs(hidden, table, labels, live, head_chunk, axis=axis, cap=model.config.logits_cap)
        log_probs_BR = _totals(log_probs_BP, batch, model)
        not_greedy_BP = ~_is_argmax(hidden, table, labels, head_chunk, axis) & live
        greedy_BR = _totals(not_greedy_BP.astype(jnp.float32), batch, model) == 0
        return jnp.stack([log_probs_BR, greedy_BR.astype(jnp.float32)], axis=-1)

    return greedy_fn


def _predictions(model: Transformer, params: PyTree[Array], batch: TreeBatch) -> tuple[tuple[Any, ...], Any]:
    """The batch as the device computes it, hidden states [B, P, D], output embedding, labels, mask of real predictions,
    and mesh axis of the vocabulary; and the statistics of the routers."""
    parallel = model.parallel
    batch = context.rows_of_group(batch, parallel.context) if parallel.context > 1 else batch
    outputs: Any = model.apply({"params": params}, batch, method="hidden_and_head", mutable=["router"])
    (hidden_BTD, table_VD), collected = outputs
    hidden_BPD = jnp.take_along_axis(hidden_BTD, batch.hidden_index[..., None], axis=1)
    name = head_name(params)
    live_BP, labels_BP, axis = batch.response_ids < batch.triplet_weight.shape[-1], jnp.asarray(batch.labels), None
    if parallel.splits_vocabulary(name):
        hidden_BPD, axis = parallel.copy_to_tensor(hidden_BPD), "tensor"
        labels_BP = labels_BP - lax.axis_index(axis) * table_VD.shape[0]
    return (batch, hidden_BPD, table_VD, labels_BP, live_BP, axis), collected.get("router", {}).get("statistics")


def _totals(per_token: Array, batch: TreeBatch, model: Transformer) -> Float[Array, "B R"]:
    """Sum a value per token over each response, on all devices that share its row."""
    sums_BR, shared_by = sum_by_response(per_token, batch), model.parallel.context
    if shared_by == 1:
        return sums_BR
    return context.total_of_group(sums_BR + 0 * batch.triplet_weight, shared_by)  # NaN if predictions were lost


def from_apply_fn(apply_fn: ApplyFn) -> LogProbFn:
    """Build the log-prob function of any model that takes a dense mask and returns full logits."""

    def log_prob_fn(params: PyTree[Array], batch: TreeBatch) -> Float[Array, "B R"]:
        batch = jax.tree.map(jnp.asarray, batch)
        mask = visible(Visibility.of(batch))
        logits_BTV = apply_fn(params, batch.tokens, batch.positions, mask).astype(jnp.float32)
        log_probs_BTV = jax.nn.log_softmax(logits_BTV)
        rows = jnp.arange(batch.tokens.shape[0])[:, None]
        return sum_by_response(log_probs_BTV[rows, batch.hidden_index, batch.labels], batch)

    return log_prob_fn


class _Head(NamedTuple):
    """Static options of `token_log_probs`."""

    chunk: int
    keep: bool
    axis: str | None
    cap: float | None


def token_log_probs(
    hidden: Float[Array, "B P D"],
    table: Float[Array, "V D"],
    labels: Int[Array, "B P"],
    live: Bool[Array, "B P"],
    chunk: int,
    *,
    keep: bool = False,
    axis: str | None = None,
    cap: float | None = None,
) -> Float[Array, "B P"]:
    """Compute log softmax(hidden table^T)[labels], in nats, float32; 0 where `live` is False.

    Only a block of logits exists at a time: `chunk` predictions of each row times `VOCABULARY_BLOCK` tokens. The
    forward pass keeps the log-sum-exp, from which the backward pass recomputes each block. Chunks after the last live
    prediction are skipped, so padding at the end of the rows is nearly free.

    Args:
        hidden: final hidden states of the predictions.
        table: output embedding.
        labels: tokens to predict.
        live: which predictions are real.
        chunk: predictions of each row that are computed at a time.
        keep: keep the logits for the backward pass too, 4 B P V bytes. It then computes two matmuls instead of three.
        axis: mesh axis over which the vocabulary is sharded. Then `table` is the device's shard, and `labels` count
            from its start.
        cap: soft cap of the logits, see `attention.capped`.
    """
    return _token_log_probs(hidden, table, labels, live, _Head(chunk, keep, axis, cap))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _token_log_probs(hidden, table, labels, live, head):
    return _head_forward(hidden, table, labels, live, head._replace(keep=False))[0]


def _head_forward(hidden, table, labels, live, head):
    chunk, keep, axis, cap = head
    hidden_nMD, labels_nM, live_nM = (_chunks(x, chunk) for x in (hidden, labels, live))
    blocks, block = _vocabulary_blocks(table)

    def one_chunk(n, carry):
        *results, kept = carry

        def one_block(i, carry):
            top_M, total_M, picked_M, kept = carry
            logits_Mv, label_Mv, _, _ = _logits(table, hidden_nMD[n], labels_nM[n], i, block, cap)
            if keep:
                kept = lax.dynamic_update_slice(kept, logits_Mv[None, None], (n, i, 0, 0))
            new_top_M = jnp.maximum(top_M, jnp.max(logits_Mv, axis=-1))
            total_M = total_M * jnp.exp(top_M - new_top_M) + jnp.sum(jnp.exp(logits_Mv - new_top_M[:, None]), axis=-1)
            return new_top_M, total_M, picked_M + jnp.sum(jnp.where(label_Mv, logits_Mv, 0), axis=-1), kept

        zeros_M = jnp.zeros(labels_nM.shape[1:], jnp.float32)
        start = (zeros_M - jnp.inf, zeros_M, zeros_M, kept)
        top_M, total_M, picked_M, kept = lax.fori_loop(0, blocks, one_block, start)
        if axis is not None:
            top_of_all_M = lax.pmax(top_M, axis)
            parts = total_M * jnp.exp(top_M - top_of_all_M), picked_M
            top_M, (total_M, picked_M) = top_of_all_M, lax.psum(parts, axis)
        lse_M = top_M + jnp.log(total_M)
        log_probs_nM, lse_nM = results
        return log_probs_nM.at[n].set(jnp.where(live_nM[n], picked_M - lse_M, 0)), lse_nM.at[n].set(lse_M), kept

    zeros_nM = jnp.zeros(labels_nM.shape, jnp.float32)
    kept = lax.empty((len(live_nM), blocks, labels_nM.shape[1], block), jnp.float32) if keep else None
    log_probs_nM, lse_nM, kept = lax.fori_loop(0, _live_chunks(live_nM), one_chunk, (zeros_nM, zeros_nM, kept))
    return _rows(log_probs_nM, live.shape), (hidden, table, labels, live, lse_nM, kept)


def _head_backward(head, saved, gradient):
    chunk, keep, _, cap = head
    hidden, table, labels, live, lse_nM, kept = saved
    gradient = jnp.where(live, gradient, 0).astype(jnp.float32)
    hidden_nMD, labels_nM, gradient_nM = (_chunks(x, chunk) for x in (hidden, labels, gradient))
    blocks, block = _vocabulary_blocks(table)
    matmul = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def one_chunk(n, carry):
        d_hidden_nMD, d_table_VD = carry

        def one_block(i, carry):
            d_hidden_MD, d_table_VD = carry
            logits_Mv, label_Mv, table_vD, start = _logits(table, hidden_nMD[n], labels_nM[n], i, block, cap)
            logits_Mv = kept[n, i] if keep else logits_Mv
            d_logits_Mv = (label_Mv - jnp.exp(logits_Mv - lse_nM[n][:, None])) * gradient_nM[n][:, None]
            d_logits_Mv = (d_logits_Mv * slope(logits_Mv, cap)).astype(hidden.dtype)
            d_hidden_MD += matmul("mv,vd->md", d_logits_Mv, table_vD)
            d_table_vD = lax.dynamic_slice_in_dim(d_table_VD, start, block)
            d_table_vD += matmul("mv,md->vd", d_logits_Mv, hidden_nMD[n])
            return d_hidden_MD, lax.dynamic_update_slice_in_dim(d_table_VD, d_table_vD, start, axis=0)

        zeros_MD = jnp.zeros(hidden_nMD.shape[1:], jnp.float32)
        d_hidden_MD, d_table_VD = lax.fori_loop(0, blocks, one_block, (zeros_MD, d_table_VD))
        return d_hidden_nMD.at[n].set(d_hidden_MD), d_table_VD

    zeros = jnp.zeros(hidden_nMD.shape, jnp.float32), jnp.zeros(table.shape, jnp.float32)
    d_hidden_nMD, d_table_VD = lax.fori_loop(0, _live_chunks(_chunks(live, chunk)), one_chunk, zeros)
    no_gradient = [np.zeros(x.shape, jax.dtypes.float0) for x in (labels, live)]
    return _rows(d_hidden_nMD, hidden.shape).astype(hidden.dtype), d_table_VD.astype(table.dtype), *no_gradient


_token_log_probs.defvjp(_head_forward, _head_backward)


def _is_argmax(hidden, table, labels, chunk, axis):
    """Whether each label has the largest logit, [B, P]."""
    hidden_nMD, labels_nM = _chunks(hidden, chunk), _chunks(labels, chunk)
    blocks, block = _vocabulary_blocks(table)

    def one_chunk(inputs):
        hidden_MD, labels_M = inputs

        def one_block(i, carry):
            top_M, picked_M = carry
            logits_Mv, label_Mv, _, _ = _logits(table, hidden_MD, labels_M, i, block)
            picked_M += jnp.sum(jnp.where(label_Mv, logits_Mv, 0), axis=-1)
            return jnp.maximum(top_M, jnp.max(logits_Mv, axis=-1)), picked_M

        zeros_M = jnp.zeros(labels_M.shape, jnp.float32)
        top_M, picked_M = lax.fori_loop(0, blocks, one_block, (zeros_M - jnp.inf, zeros_M))
        if axis is not None:
            top_M, picked_M = lax.pmax(top_M, axis), lax.psum(picked_M, axis)
        return picked_M >= top_M

    return _rows(lax.map(one_chunk, (hidden_nMD, labels_nM)), labels.shape)


def _logits(table, hidden_MD, labels_M, i, block, cap=None):
    """Block i of the logits, the mask of the labels in it, its part of the table, and its first token.

    The last block starts early enough to have full size. Its overlap with the block before is masked.
    """
    start = jnp.minimum(i * block, table.shape[0] - block)
    table_vD = lax.dynamic_slice_in_dim(table, start, block)
    logits_Mv = capped(jnp.einsum("md,vd->mv", hidden_MD, table_vD, preferred_element_type=jnp.float32), cap)
    token_v = start + jnp.arange(block)
    if table.shape[0] % block:
        logits_Mv = jnp.where(token_v >= i * block, logits_Mv, -jnp.inf)
    return logits_Mv, (token_v == labels_M[:, None]) & (token_v >= i * block), table_vD, start


def _vocabulary_blocks(table: Array) -> tuple[int, int]:
    """Number and size of the vocabulary blocks."""
    block = min(VOCABULARY_BLOCK, table.shape[0])
    return -(-table.shape[0] // block), block


def _chunks(x: Shaped[Array, "B P *rest"], chunk: int) -> Shaped[Array, "n M *rest"]:
    """Cut the predictions of all rows into n chunks, each with one axis M over rows and predictions."""
    rows, predictions, *rest = x.shape
    chunk = min(chunk, predictions)
    x = jnp.pad(x, [(0, 0), (0, -predictions % chunk)] + [(0, 0)] * len(rest))
    return jnp.moveaxis(x.reshape(rows, -1, chunk, *rest), 1, 0).reshape(-1, rows * chunk, *rest)


def _rows(x: Shaped[Array, "n M *rest"], shape: tuple[int, ...]) -> Shaped[Array, "B P *rest"]:
    """The inverse of `_chunks`."""
    rows, predictions, *rest = shape
    x = jnp.moveaxis(x.reshape(len(x), rows, -1, *rest), 0, 1)
    return x.reshape(rows, -1, *rest)[:, :predictions]


def _live_chunks(live_nM: Bool[Array, "n M"]) -> Int[Array, ""]:
    """Number of chunks up to the last one with a live prediction."""
    return jnp.max(jnp.where(live_nM.any(axis=1), jnp.arange(1, len(live_nM) + 1), 0))


def sum_by_response(per_token: Float[Array, "B P"], batch: TreeBatch) -> Float[Array, "B R"]:
    """Sum a value per token, such as log-probs, over each response."""
    count = batch.triplet_weight.shape[-1]
    total = lambda values, responses: jax.ops.segment_sum(values, responses, num_segments=count + 1)[:count]
    return jax.vmap(total)(per_token.astype(jnp.float32), batch.response_ids)
