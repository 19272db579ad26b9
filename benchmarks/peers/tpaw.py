"""Our side of the peer comparison: a team of three scores, then the policy trains. python tpaw.py WORKLOAD.json

Run by ../peers.py. Everything after the first compile is counted: packing, three players' scoring, two epochs of steps
with their optimizer updates. One triplet visit is one triplet in one epoch.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import jax

from tpaw_jax.config import PackingConfig
from tpaw_jax.data import packing, prefix_trees
from tpaw_jax.runtime.host import Prefetch, restart_with_huge_pages
from tpaw_jax.training import scoring, train_step
from tpaw_jax.types import Generations, Prompts, TeamScores

EPOCHS, PLAYERS, STEP_TRIPLETS = 2, 3, 64  # SPIN's step
ROW_LENGTHS = range(768, 2049, 64)


def main() -> None:
    restart_with_huge_pages()
    work = json.loads(Path(sys.argv[1]).read_text())
    ids = lambda key: tuple(np.array(row[key], np.int32) for row in work["rows"])
    prompts = Prompts(np.arange(len(work["rows"]), dtype=np.int32), ids("prompt"), ids("target"))
    generations = [
        Generations(t, tuple(np.array(row["generated"][t], np.int32) for row in work["rows"]), ())
        for t in reversed(range(PLAYERS))
    ]
    sources = prefix_trees.first_sources(prompts, generations)
    trees = prefix_trees.trees_of_window(prompts, generations, sources)
    packed = PackingConfig(row_length=common.fullest_row_length(trees, PackingConfig(), ROW_LENGTHS))
    setup = common.set_up("small", packed, (prompts, generations), remat="dots", chunk=448)
    rows_per_step = round(STEP_TRIPLETS / float(setup.rows.triplets.mean()))
    players = [jax.tree.map(lambda p, j=j: p * (1 + 1e-4 * j), setup.params) for j in range(PLAYERS)]
    scorer = scoring.make_scorer(setup.log_prob_fn, setup.mesh)
    step, state, scalars = common.make_step(setup)

    def inputs(rows, scores, indices):
        batch = packing.step_batch(rows, scores, indices, 1, rows_per_step)
        return jax.device_put((*batch, scalars), train_step.input_shardings(setup.mesh))

    blank = TeamScores(np.zeros((PLAYERS, *setup.rows.prompt_index.shape), np.float32), np.ones(PLAYERS, bool))
    scoring.score(scorer, setup.params, packing.take(setup.rows, np.arange(1), 1), 1)
    for _ in range(2):  # the second time, the state lies where the step itself put it
        state, metrics = jax.block_until_ready(step(state, *inputs(setup.rows, blank, np.arange(1))))

    start = time.perf_counter()
    rows = packing.pack(prefix_trees.trees_of_window(prompts, generations, sources), packed)
    scores = TeamScores(np.stack([scoring.score(scorer, p, rows, 1) for p in players]), np.ones(PLAYERS, bool))
    scored = time.perf_counter()
    orders = [packing.epoch_order(rows, 0, 0, epoch) for epoch in range(EPOCHS)]
    plan = [order[i : i + rows_per_step] for order in orders for i in range(0, len(order), rows_per_step)]
    with Prefetch(lambda indices: inputs(rows, scores, indices), plan, depth=2) as ahead:
        for arguments in ahead:
            state, metrics = step(state, *arguments)
    jax.block_until_ready((state, metrics))
    end = time.perf_counter()
    assert np.isfinite(float(metrics["loss"]))
    triplets = float(rows.triplets.sum())
    record = {
        "contender": "tpaw_jax",
        "triplets": triplets,
        "row_length": packed.row_length,
        "fill": rows.fill,
        "scoring_seconds": scored - start,
        "steps_seconds": end - scored,
        "triplets_per_second": EPOCHS * triplets / (end - start),
        "triplets_per_second_in_steps": EPOCHS * triplets / (end - scored),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
