"""Our side of the peer comparison: a team of three scores, then the policy trains. python tpaw.py WORKLOAD.json

Run by ../peers.py. It is a round as a run plays it from its third round on. Everything after the first compile is
counted: packing, scoring, two epochs of steps with their optimizer updates. The newest player scores all responses; the
other two score the newest responses only, because they scored the rest in the rounds before. One triplet visit is one
triplet in one epoch.
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


class Table:
    """The log-prob of every response by every player, by prompt and source; not a number while it is unknown."""

    def __init__(self, prompts: int) -> None:
        self.log_probs = np.full((PLAYERS, prompts, PLAYERS + 1), np.nan, np.float32)  # the last source is the target

    def add(self, player: int, rows: packing.Rows, log_probs: np.ndarray) -> None:
        real = rows.prompt_index >= 0
        self.log_probs[player, rows.prompt_index[real], rows.source[real]] = log_probs[real]

    def forget(self, player: int, source: int) -> None:
        self.log_probs[player, :, source] = np.nan

    def of(self, rows: packing.Rows) -> np.ndarray:
        """[players, rows, responses]; 0 where a row has no response."""
        found = self.log_probs[:, np.maximum(rows.prompt_index, 0), rows.source]
        return np.where(rows.prompt_index >= 0, found, 0).astype(np.float32)


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

    new = prefix_trees.trees_of_responses(prompts, {PLAYERS - 1: generations[0].tokens})
    known = Table(len(prompts))
    for j, player in enumerate(players[1:], start=1):
        known.add(j, setup.rows, scoring.score(scorer, player, setup.rows, 1))
        known.forget(j, PLAYERS - 1)
    blank = TeamScores(np.zeros((PLAYERS, *setup.rows.prompt_index.shape), np.float32), np.ones(PLAYERS, bool))
    scoring.score(scorer, setup.params, packing.take(setup.rows, np.arange(1), 1), 1)
    for _ in range(2):  # the second time, the state lies where the step itself put it
        state, metrics = jax.block_until_ready(step(state, *inputs(setup.rows, blank, np.arange(1))))

    start = time.perf_counter()
    rows = packing.pack(prefix_trees.trees_of_window(prompts, generations, sources), packed)
    known.add(0, rows, scoring.score(scorer, players[0], rows, 1))
    new_rows = packing.pack(new, packed)
    for j, player in enumerate(players[1:], start=1):
        known.add(j, new_rows, scoring.score(scorer, player, new_rows, 1))
    scores = TeamScores(known.of(rows), np.ones(PLAYERS, bool))
    assert np.isfinite(scores.log_probs).all()
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
