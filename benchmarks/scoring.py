"""How fast do players score, and does reading the next one from the ring cost anything? JSON lines.

    python benchmarks/scoring.py --model smollm2 --row-length 2048 --repeats 5

One line for each number of batches scored at once: forward passes over packed UltraChat-like trees, model FLOPs of
useful tokens, the matmul peak of the same shapes measured before. Then one line for three players scoring from a ring
on disk, each read while the one before scores, against read and score in turn.
"""

import argparse
import tempfile
import time
from pathlib import Path

import common
import jax
import numpy as np

from tpaw_jax.config import PackingConfig
from tpaw_jax.runtime import sharding
from tpaw_jax.runtime.host import Prefetch, restart_with_huge_pages
from tpaw_jax.storage import journal, ring
from tpaw_jax.training import cost, scoring


def main() -> None:
    restart_with_huge_pages()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=common.MODELS, default="smollm2")
    parser.add_argument("--row-length", type=int, default=2048)
    parser.add_argument("--batches-at-once", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--prompts", type=int, default=27, help="they fill four rows")
    parser.add_argument("--scale", type=float, default=0.25, help="of the lengths; 1 is the paper's")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    vocabulary = common.MODELS[options.model].vocab_size
    data = common.workload(options.prompts, 3, options.scale, options.seed, vocabulary)
    packed = PackingConfig(row_length=options.row_length)
    setup = common.set_up(options.model, packed, data, "dots", 256)
    batch_sizes(setup, packed, options)
    streaming(setup, options)


def batch_sizes(setup: common.Setup, packed: PackingConfig, options: argparse.Namespace) -> None:
    """A line for each number of batches at once, their passes interleaved."""
    rows, model = setup.rows, setup.model.config
    scorer = scoring.make_scorer(setup.log_prob_fn, setup.mesh)
    peak = common.matmul_peak(model, options.row_length, backward=False)
    readings: dict[int, list[float]] = {n: [] for n in options.batches_at_once}
    scored, compiled = {}, {}
    for n in readings:
        start = time.perf_counter()
        scored[n] = scoring.score(scorer, setup.params, rows, 1, n)
        compiled[n] = time.perf_counter() - start
    for _ in range(options.repeats):
        for n, seconds in readings.items():
            start = time.perf_counter()
            scoring.score(scorer, setup.params, rows, 1, n)
            seconds.append(time.perf_counter() - start)
    work = cost.work_of_trees(setup.trees, packed)
    flops = cost.flops(model, work)
    for n, seconds in readings.items():
        rate = common.spread([flops / s / 1e9 for s in seconds])
        common.emit(
            benchmark="scoring",
            model=options.model,
            row_length=options.row_length,
            rows=len(rows),
            fill=rows.fill,
            batches_at_once=n,
            seconds=common.spread(seconds),
            tokens_per_second=common.spread([work.tokens / s for s in seconds]),
            model_gflops=rate,
            matmul_peak_gflops=peak,
            share_of_peak=rate["median"] / peak["median"],
            largest_difference_from_one_at_once=float(np.abs(scored[n] - scored[options.batches_at_once[0]]).max()),
            first_call_seconds=compiled[n],
            machine=common.machine(),
        )


def streaming(setup: common.Setup, options: argparse.Namespace) -> None:
    """Three players from a ring on disk: read ahead, and in turn."""
    players, like = [2, 1, 0], sharding.abstract(setup.params)
    scorer = scoring.make_scorer(setup.log_prob_fn, setup.mesh)
    with tempfile.TemporaryDirectory() as directory:
        opened = ring.open_ring(journal.open_journal(Path(directory)), 3)
        for player in players:
            ring.push(opened, setup.params, player)
        opened.checkpointer.wait_until_finished()
        load = lambda player: ring.restore_policy(opened, player, like)
        score = lambda params: scoring.score(scorer, params, setup.rows, 1)
        score(jax.block_until_ready(load(2)))

        def in_turn():
            for player in players:
                score(jax.block_until_ready(load(player)))

        def ahead():
            with Prefetch(load, players) as loaded:
                for _ in players:
                    params = next(loaded)
                    score(params)
                    del params
            return loaded.waited

        readings: dict[str, list[float]] = {"ahead": [], "in_turn": [], "read": [], "waited": []}
        for _ in range(options.repeats):
            readings["read"].append(common.seconds_of(lambda: load(0)))
            start = time.perf_counter()
            readings["waited"].append(ahead())
            readings["ahead"].append(time.perf_counter() - start)
            start = time.perf_counter()
            in_turn()
            readings["in_turn"].append(time.perf_counter() - start)
    common.emit(
        benchmark="scoring_from_the_ring",
        model=options.model,
        players=len(players),
        seconds_read_ahead=common.spread(readings["ahead"]),
        seconds_in_turn=common.spread(readings["in_turn"]),
        seconds_to_read_one=common.spread(readings["read"]),
        seconds_waited=common.spread(readings["waited"]),
        machine=common.machine(),
    )


if __name__ == "__main__":
    main()
