"""Hidden states -> log-probs of responses, the one function that scoring and training share.

The head runs over the predictions of a row only, in chunks, so the [B, T, V] logits never exist. Softmax and sums are
float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from tpaw_jax.models.attention import Visibility, visible
from tpaw_jax.models.transformer import Transformer, head_table
from tpaw_jax.types import TreeBatch

LogProbFn = Callable[[PyTree[Array], TreeBatch], Float[Array, "B R"]]
"""(params, batch) -> summed log-prob of every response, nats: what scoring and the train step ask of a model."""

ApplyFn = Callable[[PyTree[Array], Array, Array, Array], Array]
"""(params, tokens [B, T], positions [B, T], mask [B, T, T]) -> logits [B, T, V]: a model of the user's own."""


def make_log_prob_fn(model: Transformer, head_chunk: int) -> LogProbFn:
    """The log-prob function of a `Transformer`, its head in chunks of `head_chunk` predictions of each row."""

    def log_prob_fn(params: PyTree[Array], batch: TreeBatch) -> Float[Array, "B R"]:
        batch = jax.tree.map(jnp.asarray, batch)  # outside jit, a batch of the host is as welcome
        hidden_BTD: Any = model.apply(
            {"params": params},
            batch.tokens,
            batch.positions,
            batch.segment_ids,
            batch.branch_ids,
            method="hidden",
        )
        hidden_BPD = jnp.take_along_axis(hidden_BTD, batch.sources[..., None], axis=1)
        table_VD = head_table(params).astype(hidden_BPD.dtype)
        live_BP = batch.responses < batch.triplet_weight.shape[-1]
        per_token = token_log_probs(hidden_BPD, table_VD, batch.labels, live_BP, head_chunk)
        return sum_by_response(per_token, batch)

    return log_prob_fn


def from_apply_fn(apply_fn: ApplyFn) -> LogProbFn:
    """The log-prob function of any model that takes a dense mask and returns full logits."""

    def log_prob_fn(params: PyTree[Array], batch: TreeBatch) -> Float[Array, "B R"]:
        batch = jax.tree.map(jnp.asarray, batch)
        mask = visible(Visibility(batch.segment_ids, batch.branch_ids))
        logits_BTV = apply_fn(params, batch.tokens, batch.positions, mask).astype(jnp.float32)
        log_probs_BTV = jax.nn.log_softmax(logits_BTV)
        rows = jnp.arange(batch.tokens.shape[0])[:, None]
        return sum_by_response(log_probs_BTV[rows, batch.sources, batch.labels], batch)

    return log_prob_fn


def token_log_probs(
    hidden: Float[Array, "B P D"],
    table: Float[Array, "V D"],
    labels: Int[Array, "B P"],
    live: Any,
    chunk: int,
) -> Float[Array, "B P"]:
    """log softmax(hidden table^T)[labels], nats, float32; 0 where `live` [B, P] is False.

    The logits of one chunk at a time exist, forward and backward; a chunk without a live prediction in any row is
    skipped, which makes padding at the end of the rows nearly free.
    """
    rows, predictions, _ = hidden.shape
    chunk = min(chunk, predictions)
    padding = -predictions % chunk
    split = lambda x: jnp.moveaxis(
        jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)).reshape(rows, -1, chunk, *x.shape[2:]), 1, 0
    )

    def compute(hidden_BcD, labels_Bc, live_Bc, table):
        logits_BcV = jnp.einsum("bcd,vd->bcv", hidden_BcD, table, preferred_element_type=jnp.float32)
        picked_Bc = jnp.take_along_axis(logits_BcV, labels_Bc[..., None], axis=-1)[..., 0]
        return jnp.where(live_Bc, picked_Bc - jax.nn.logsumexp(logits_BcV, axis=-1), 0.0)

    @jax.checkpoint
    def one_chunk(table, hidden_BcD, labels_Bc, live_Bc):
        skipped = lambda *_: jnp.zeros(labels_Bc.shape, jnp.float32)
        return jax.lax.cond(jnp.any(live_Bc), compute, skipped, hidden_BcD, labels_Bc, live_Bc, table)

    chunks = split(hidden), split(labels), split(live)
    _, per_chunk = jax.lax.scan(lambda _, xs: (None, one_chunk(table, *xs)), None, chunks)
    return jnp.moveaxis(per_chunk, 0, 1).reshape(rows, -1)[:, :predictions]


def sum_by_response(per_token: Float[Array, "B P"], batch: TreeBatch) -> Float[Array, "B R"]:
    """Token log-probs summed over each response, nats."""
    count = batch.triplet_weight.shape[-1]
    total = lambda values, owners: jax.ops.segment_sum(values, owners, num_segments=count + 1)[:count]
    return jax.vmap(total)(per_token.astype(jnp.float32), batch.responses)
