"""Frozen players -> log-probs of packed responses, one player resident at a time."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from tpaw_jax import sharding
from tpaw_jax.logprobs import LogProbFn
from tpaw_jax.packing import Rows, batches

Scorer = LogProbFn


def make_scorer(log_prob_fn: LogProbFn, mesh: Mesh) -> Scorer:
    """The compiled forward pass of the function that the train step differentiates, on batches of the same shape.

    Float32 gives the train step's own bits; so does bfloat16 with rematerialisation (see the tests and A8).
    """
    return jax.jit(log_prob_fn, in_shardings=(None, sharding.rows(mesh)), out_shardings=sharding.replicated(mesh))


def score(
    scorer: Scorer,
    params: PyTree[Array],
    rows: Rows,
    rows_per_batch: int,
    progress: Callable[[Rows], None] = lambda _: None,
) -> Float[np.ndarray, "rows R"]:
    """Summed log-probs of every response of `rows` under `params`, nats; padding responses get 0."""
    pending, scored = [], []
    for batch in batches(rows, rows_per_batch):
        pending.append(scorer(params, batch.batch))
        if len(pending) > 1:  # the device works on one batch while the host fetches the one before
            scored.append(np.asarray(pending.pop(0)))
        progress(batch)
    scored.extend(np.asarray(values) for values in pending)
    width = rows.prompt_index.shape[1]
    return np.concatenate([np.zeros((0, width), np.float32), *scored])[: len(rows)]
