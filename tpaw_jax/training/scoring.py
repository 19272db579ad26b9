"""Frozen players -> log-probs of packed responses, one player scoring at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from tpaw_jax.data import packing
from tpaw_jax.data.packing import Rows
from tpaw_jax.runtime import sharding
from tpaw_jax.runtime.host import Prefetch
from tpaw_jax.training.logprobs import LogProbFn
from tpaw_jax.types import TreeBatch

Scorer = LogProbFn


def make_scorer(log_prob_fn: LogProbFn, mesh: Mesh, compiler_options: Mapping[str, str] | None = None) -> Scorer:
    """The compiled forward pass of the function that the train step differentiates, on batches of the host.

    On batches of the step's shape, float32 gives the train step's own bits; so does bfloat16 with rematerialisation
    (see the tests and A8).
    """
    program = score_program(log_prob_fn, mesh, compiler_options)
    return lambda params, batch: program(params, sharding.place(batch, sharding.rows(mesh)))


def score_program(log_prob_fn: LogProbFn, mesh: Mesh, compiler_options: Mapping[str, str] | None = None) -> Any:
    """The jitted (params, batch) -> log-probs, each device computing its own rows; the result is on all of them."""
    by_row = sharding.rows(mesh)

    def log_probs(params: PyTree[Array], batch: TreeBatch) -> Array:
        specs = jax.tree.map(lambda placed: placed.spec, sharding.param_shardings(params, mesh))
        of_device = jax.shard_map(
            log_prob_fn, mesh=mesh, in_specs=(specs, by_row.spec), out_specs=by_row.spec, check_vma=False
        )
        return of_device(params, batch)

    options = dict(compiler_options) if compiler_options else None
    everywhere = sharding.replicated(mesh)
    return jax.jit(log_probs, in_shardings=(None, by_row), out_shardings=everywhere, compiler_options=options)


def score(
    scorer: Scorer,
    params: PyTree[Array],
    rows: Rows,
    rows_per_batch: int,
    batches_at_once: int = 1,
    progress: Callable[[Rows], None] = lambda _: None,
) -> Float[np.ndarray, "rows R"]:
    """Summed log-probs of every response of `rows` under `params`, nats; padding responses get 0.

    Rows go to the device `rows_per_batch` times `batches_at_once` at a time while there are so many, then
    `rows_per_batch` at a time: two shapes, two programs.
    """
    cuts = _cuts(len(rows), rows_per_batch, rows_per_batch * batches_at_once)
    batch_of = lambda cut: packing.take(rows, np.arange(cut[0], min(sum(cut), len(rows))), cut[1])
    pending, scored = [], []
    with Prefetch(batch_of, cuts) as batches:
        for batch in batches:
            pending.append(scorer(params, batch.batch))
            if len(pending) > 1:  # the device works on one batch while the host fetches the one before
                scored.append(np.asarray(pending.pop(0)))
            progress(batch)
    scored.extend(np.asarray(values) for values in pending)
    width = rows.prompt_index.shape[1]
    return np.concatenate([np.zeros((0, width), np.float32), *scored])[: len(rows)]


def _cuts(count: int, small: int, large: int) -> list[tuple[int, int]]:
    """(first row, rows) of each batch: large ones, then small ones."""
    whole = count // large * large
    return [(i, large) for i in range(0, whole, large)] + [(i, small) for i in range(whole, count, small)]
