"""What do prefix trees with cached scores save against padded pairs with live references? Two JSON lines.

    python benchmarks/trees_vs_pairs.py --model small --scale 0.25 --prompts 24 --repeats 3

One round of three players on UltraChat-like lengths, the same model, parameters and data on both sides, in one process,
one after the other in every repeat. Trees: scoring by three players and two epochs of steps, all counted. Pairs
(tests/plain.py): every triplet as two sequences of one static shape, full logits, three live references in every step,
`--batch` triplets at a time; one epoch is timed, since the second costs the same. The shape is that of the length
limits, prompt and response, which any batch of a real set can need; `--pad longest` takes the longest pair of this
small set instead. Compiling is not counted.
First their losses are compared, on the policy and three players that differ from it.
"""

import argparse
import resource
import sys
from pathlib import Path

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax

from tpaw_jax.config import PackingConfig, TrainConfig
from tpaw_jax.data import packing, prefix_trees
from tpaw_jax.models.attention import EINSUM
from tpaw_jax.runtime.host import Prefetch, restart_with_huge_pages
from tpaw_jax.training import cost, scoring, train_step
from tpaw_jax.training.train_step import StepScalars
from tpaw_jax.types import TeamScores

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from plain import pair_batch, pair_loss, triplets_of

PLAYERS, EPOCHS, STEP_TRIPLETS = 3, 2, 64
PAPER = {"lam": 0.1, "eta": 6.0, "gamma": 0.5}


def main() -> None:
    restart_with_huge_pages()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=common.MODELS, default="small")
    parser.add_argument("--scale", type=float, default=0.25, help="of the lengths; 1 is the paper's")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--batch", type=int, default=8, help="triplets of a batch of pairs")
    parser.add_argument("--pad", choices=("limits", "longest"), default="limits", help="what pairs are padded to")
    parser.add_argument("--row-length", type=int, default=0, help="of the trees; 0: the fullest up to 2048 x scale x 4")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    data = common.workload(
        options.prompts, PLAYERS, options.scale, options.seed, common.MODELS[options.model].vocab_size
    )
    prompts, generations = data
    trees = prefix_trees.trees_of_window(prompts, generations, prefix_trees.first_sources(prompts, generations))
    lengths = (
        [options.row_length]
        if options.row_length
        else range(int(3072 * options.scale), int(8192 * options.scale) + 1, 64)
    )
    config = PackingConfig(row_length=common.fullest_row_length(trees, PackingConfig(), lengths))
    setup = common.set_up(options.model, config, data, remat="dots", chunk=448)
    keys = jax.random.split(jax.random.key(1), PLAYERS)
    nudged = lambda key: jax.tree.map(lambda p: p * (1 + 1e-3 * jax.random.normal(key, p.shape)), setup.params)
    players = [nudged(key) for key in keys]
    pairs = triplets_of(prompts, generations)
    longest = max(len(x) + max(len(y), len(g)) for x, y, g in pairs)
    if options.pad == "limits":
        longest = int(4 * options.scale * (common.CAPS["prompt"] + common.CAPS["target"]))
    batches = [pair_batch(pairs[i : i + options.batch], longest) for i in range(0, len(pairs), options.batch)]

    common.emit(benchmark="trees_vs_pairs_loss", **losses(setup, players, batches), triplets=len(pairs))
    play_trees, play_pairs = Trees(setup, players), Pairs(setup, players, batches)
    rates: dict[str, list[float]] = {"trees": [], "pairs": []}
    triplets = {"trees": EPOCHS * len(pairs), "pairs": len(batches) * options.batch}
    for turn in range(options.repeats + 1):
        for name, play in (("trees", play_trees), ("pairs", play_pairs)):
            system = resource.getrusage(resource.RUSAGE_SELF).ru_stime
            seconds = common.seconds_of(play)
            system = resource.getrusage(resource.RUSAGE_SELF).ru_stime - system
            common.emit(benchmark="trees_vs_pairs_turn", turn=turn, of=name, seconds=seconds, system_seconds=system)
            if turn:  # the first of each finds the memory of its buffers in the other's hands, and maps anew
                rates[name].append(triplets[name] / seconds)
    model, places = setup.model.config, len(batches) * 2 * options.batch * longest
    padded = cost.Work(places, places, places * (longest + 1) / 2)
    work = cost.work_of_rows(setup.rows)
    common.emit(
        benchmark="trees_vs_pairs",
        model=options.model,
        scale=options.scale,
        prompts=options.prompts,
        players=PLAYERS,
        row_length=config.row_length,
        fill=setup.rows.fill,
        pairs_padded_to=longest,
        trees_triplets_per_second=common.spread(rates["trees"]),
        pairs_triplets_per_second=common.spread(rates["pairs"]),
        ratio=common.spread([a / b for a, b in zip(rates["trees"], rates["pairs"], strict=True)]),
        flops_ratio=2 * (3 + PLAYERS) * cost.flops(model, padded) / (9 * cost.flops(model, work)),
        machine=common.machine(),
    )


def losses(setup: common.Setup, players: list, batches: list) -> dict[str, float]:
    """The loss of D_O both ways, its mean over all triplets."""
    scorer = scoring.make_scorer(setup.log_prob_fn, setup.mesh)
    scored = np.stack([scoring.score(scorer, p, setup.rows, 1) for p in players])
    step, state, _ = common.make_step(setup)
    scores = TeamScores(scored, np.ones(PLAYERS, bool))
    batch = packing.step_batch(setup.rows, scores, np.arange(len(setup.rows)), 1, len(setup.rows))
    zero = np.float32(0)
    _, metrics = step(state, *batch, StepScalars(zero, np.float32(PAPER["lam"]), zero, np.bool_(True)))
    of_batch = jax.jit(lambda params, players, batch: pair_loss(setup.model, params, players, batch, **PAPER))
    of_batches = [float(of_batch(setup.params, players, batch)) for batch in batches]
    in_trees, in_pairs = float(metrics["loss"]), float(np.average(of_batches, weights=[len(b[0][0]) for b in batches]))
    return {"trees": in_trees, "pairs": in_pairs, "relative_difference": abs(in_trees - in_pairs) / abs(in_pairs)}


class Trees:
    """A round's scoring and training in trees."""

    def __init__(self, setup: common.Setup, players: list):
        self.setup, self.players = setup, players
        self.scorer = scoring.make_scorer(setup.log_prob_fn, setup.mesh)
        self.step, self.state, self.scalars = common.make_step(setup)
        self.rows_per_step = round(STEP_TRIPLETS / float(setup.rows.triplets.mean()))
        for _ in range(2):  # compile, with the state where the step itself puts it
            jax.block_until_ready(self())

    def __call__(self):
        rows = self.setup.rows
        scored = np.stack([scoring.score(self.scorer, player, rows, 1) for player in self.players])
        scores = TeamScores(scored, np.ones(PLAYERS, bool))
        orders = [packing.epoch_order(rows, 0, 0, epoch) for epoch in range(EPOCHS)]
        size, places = self.rows_per_step, train_step.input_shardings(self.setup.mesh)
        plan = [order[i : i + size] for order in orders for i in range(0, len(order), size)]
        make = lambda indices: jax.device_put(
            (*packing.step_batch(rows, scores, indices, 1, size), self.scalars), places
        )
        with Prefetch(make, plan, depth=2) as ahead:
            for arguments in ahead:
                self.state, metrics = self.step(self.state, *arguments)
        return self.state, metrics


class Pairs:
    """One epoch of the plain twin's steps."""

    def __init__(self, setup: common.Setup, players: list, batches: list):
        self.players, self.batches = players, batches
        optimizer = train_step.make_optimizer(TrainConfig())
        self.params = jax.tree.map(jnp.copy, setup.params)
        self.state = optimizer.init(self.params)
        plain = setup.model.clone(remat="none", attention=EINSUM)

        def step(params, state, players, batch):
            loss, gradients = jax.value_and_grad(lambda p: pair_loss(plain, p, players, batch, **PAPER))(params)
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, jax.tree.map(lambda u: 1e-7 * u, updates)), state, loss

        self.step = jax.jit(step, donate_argnums=(0, 1))
        for _ in range(2):
            self.params, self.state, loss = self.step(self.params, self.state, self.players, self.batches[0])
        jax.block_until_ready(loss)

    def __call__(self):
        for batch in self.batches:
            self.params, self.state, loss = self.step(self.params, self.state, self.players, batch)
        return self.params, loss


if __name__ == "__main__":
    main()
