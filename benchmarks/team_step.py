"""How fast is the team step, and what share of the machine's matmul peak does it reach? One JSON line a row length.

    python benchmarks/team_step.py --model smollm2 --row-length 1024 2048 --repeats 5

Consecutive optimizer steps on UltraChat-like trees, their batches made and transferred by the thread that `tpaw play`
uses; three players; everything of a step is counted. Model FLOPs are of useful tokens: no padding, nothing that is
computed again. The peak is measured on the same shapes before and after the steps.
"""

import argparse
import itertools
import time

import common
import jax
import numpy as np

from tpaw_jax.config import PackingConfig
from tpaw_jax.data import packing
from tpaw_jax.runtime.host import Prefetch, restart_with_huge_pages
from tpaw_jax.training import cost, train_step


def main() -> None:
    restart_with_huge_pages()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=common.MODELS, default="smollm2")
    parser.add_argument("--row-length", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--tokens-per-batch", type=int, default=2048, help="of the rows that are computed at once")
    parser.add_argument("--batch-triplets", type=int, default=64, help="of a step, met as closely as rows allow")
    parser.add_argument("--remat", default="dots")
    parser.add_argument("--head-chunk", type=int, default=256)
    parser.add_argument("--scale", type=float, default=0.25, help="of the lengths; 1 is the paper's")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for row_length in options.row_length:
        measure(options, row_length)


def measure(options: argparse.Namespace, row_length: int) -> None:
    """The line of one row length: as many rows as fill a step each, for `repeats` steps."""
    size = max(1, options.tokens_per_batch // row_length)
    setup, rows_per_step = _setup(options, row_length, size)
    rows, model, most = setup.rows, setup.model.config, rows_per_step // size
    scores = common.team_scores(setup, size)
    step, state, scalars = common.make_step(setup)
    places = train_step.input_shardings(setup.mesh)
    order = itertools.cycle(range(len(rows)))
    plan = [[next(order) for _ in range(rows_per_step)] for _ in range(2 + options.repeats)]

    def inputs(indices):
        batch = packing.step_batch(rows, scores, np.array(indices), size, most)
        return jax.device_put((*batch, scalars), places), indices

    peak = common.matmul_peak(model, size * row_length, backward=True)
    start = time.perf_counter()
    seconds, flops, triplets, tokens, waited, compiled = [], [], [], [], 0.0, 0.0
    with Prefetch(inputs, plan, depth=2) as ahead:
        for i, (arguments, indices) in enumerate(ahead):
            if i < 2:  # compiles; then a warm-up with the state as the step itself places it
                state, metrics = jax.block_until_ready(step(state, *arguments))
                compiled = time.perf_counter() - start if i == 0 else compiled
                before = ahead.waited
                continue
            begun = time.perf_counter()
            state, metrics = jax.block_until_ready(step(state, *arguments))
            seconds.append(time.perf_counter() - begun)
            chosen = packing.take(rows, np.array(indices), len(indices))
            work = cost.work_of_rows(chosen)._replace(tokens=(chosen.batch.segment_ids > 0).sum())
            flops.append(cost.flops(model, cost.with_backward(work, adapters=False)))
            tokens.append(float(work.tokens))
            triplets.append(float(chosen.triplets.sum()))
        waited = ahead.waited - before
    assert np.isfinite(float(metrics["loss"]))
    after = common.matmul_peak(model, size * row_length, backward=True)
    rate = common.spread([f / s / 1e9 for f, s in zip(flops, seconds, strict=True)])
    peaks = {name: (peak[name] + after[name]) / 2 for name in peak}
    common.emit(
        benchmark="team_step",
        model=options.model,
        row_length=row_length,
        rows_per_batch=size,
        rows_per_step=rows_per_step,
        players=3,
        remat=options.remat,
        scale=options.scale,
        fill=sum(tokens) / (len(tokens) * rows_per_step * row_length),
        step_seconds=common.spread(seconds),
        triplets_per_second=common.spread([n / s for n, s in zip(triplets, seconds, strict=True)]),
        tokens_per_second=common.spread([n / s for n, s in zip(tokens, seconds, strict=True)]),
        model_gflops=rate,
        matmul_peak_gflops=peaks,
        share_of_peak=rate["median"] / peaks["median"],
        share_of_best_peak=rate["median"] / peaks["best"],
        input_wait_share=waited / sum(seconds),
        first_call_seconds=compiled,
        machine=common.machine(),
    )


def _setup(options, row_length, size):
    """A model with rows for a few steps, and the rows of one step."""
    triplets_a_row = 3 * row_length / (4 * options.scale * 290)
    count = max(2 * options.batch_triplets, int(8 * triplets_a_row))
    data = common.workload(count, 3, options.scale, options.seed, common.MODELS[options.model].vocab_size)
    config = PackingConfig(row_length=row_length)
    setup = common.set_up(options.model, config, data, options.remat, options.head_chunk)
    a_step = size * max(1, round(options.batch_triplets / (setup.rows.triplets.mean() * size)))
    # The last rows of first-fit-decreasing are the leftovers of a small set; a round has few of them.
    whole = len(setup.rows) // a_step * a_step
    return setup._replace(rows=packing.take(setup.rows, np.arange(whole), whole)), a_step


if __name__ == "__main__":
    main()
