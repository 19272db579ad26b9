"""Score packed responses under frozen players, one player at a time."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, PyTree

from tpaw_jax.data import packing
from tpaw_jax.data.packing import Rows
from tpaw_jax.models.parallel import context as contexts
from tpaw_jax.runtime import sharding
from tpaw_jax.runtime.host import Prefetch
from tpaw_jax.training.logprobs import LogProbFn
from tpaw_jax.types import TreeBatch

Scorer = LogProbFn
"""(params, batch on the host) -> summed log-prob of every response, nats."""


def make_scorer(
    log_prob_fn: LogProbFn,
    mesh: Mesh | None = None,
    compiler_options: Mapping[str, str] | None = None,
    context: int = 1,
) -> Scorer:
    """Build the compiled scorer from the function that the train step differentiates.

    Without a mesh, it runs on the first local device. On batches of the train step's shape, the scores are
    bit-identical to the log-probs in the train step with float32, and with bfloat16 and rematerialization (see the
    tests and A8).
    """
    mesh = sharding.single_device_mesh() if mesh is None else mesh
    program, placed = score_program(log_prob_fn, mesh, compiler_options, context), batch_sharding(mesh, context)
    return lambda params, batch: program(params, sharding.place(batch, placed))


def batch_sharding(mesh: Mesh, context: int = 1) -> NamedSharding:
    """The sharding of a batch of the scorer: by row, or whole on every device if `context` devices share rows."""
    return sharding.rows(mesh) if context == 1 else sharding.replicated(mesh)


def score_program(
    log_prob_fn: LogProbFn, mesh: Mesh, compiler_options: Mapping[str, str] | None = None, context: int = 1
) -> Any:
    """Build the jitted (params, batch) -> log-probs. Each device, or group of `context` devices, computes its own rows.

    The result is replicated.
    """
    by_row = sharding.rows(mesh)

    def log_probs(params: PyTree[Array], batch: TreeBatch) -> Array:
        specs = jax.tree.map(lambda placed: placed.spec, sharding.param_shardings(params, mesh))
        per_device = jax.shard_map(
            log_prob_fn, mesh=mesh, in_specs=(specs, by_row.spec), out_specs=by_row.spec, check_vma=False
        )
        return contexts.collect(per_device(params, contexts.spread(batch, context, mesh)), context, mesh)

    options = dict(compiler_options) if compiler_options else None
    replicated = sharding.replicated(mesh)
    placed = batch_sharding(mesh, context)
    return jax.jit(log_probs, in_shardings=(None, placed), out_shardings=replicated, compiler_options=options)


def score(
    scorer: Scorer,
    params: PyTree[Array],
    rows: Rows,
    rows_per_batch: int,
    batches_at_once: int = 1,
    progress: Callable[[Rows], None] = lambda _: None,
) -> Float[np.ndarray, "rows R"]:
    """Compute the summed log-prob of every response of `rows` under `params`, in nats. Padding responses get 0.

    As long as enough rows remain, each call of `scorer` gets `rows_per_batch * batches_at_once` rows, then
    `rows_per_batch`; so at most two programs are compiled. `progress` is called with each batch.
    """
    cuts = _cuts(len(rows), rows_per_batch, rows_per_batch * batches_at_once)

    def batch_of(cut: tuple[int, int]) -> tuple[Rows, TreeBatch]:
        batch = packing.take(rows, np.arange(cut[0], min(sum(cut), len(rows))), cut[1])
        return batch, batch.batch

    pending, scored = [], []
    with Prefetch(batch_of, cuts) as batches:
        for batch, arrays in batches:
            pending.append(scorer(params, arrays))
            if len(pending) > 1:  # fetch the previous result while the device computes this one
                scored.append(np.asarray(pending.pop(0)))
            progress(batch)
    scored.extend(np.asarray(values) for values in pending)
    width = rows.prompt_index.shape[1]
    return np.concatenate([np.zeros((0, width), np.float32), *scored])[: len(rows)]


def _cuts(count: int, small: int, large: int) -> list[tuple[int, int]]:
    """(first row, size) of each batch: large batches, then small ones."""
    in_large = count // large * large
    return [(i, large) for i in range(0, in_large, large)] + [(i, small) for i in range(in_large, count, small)]
