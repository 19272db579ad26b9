"""What prefix trees with cached scores save and keep: tokens computed a prompt, and parity. One JSON line a question.

    python benchmarks/tree_vs_pairs.py --config configs/smollm2_gsm8k.yaml --run runs/smollm2_gsm8k [--prompts 3]

Against the plain way: every triplet as two padded sequences, with every player's live forward pass in every step.
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tpaw_jax import config, dataset, packing, scoring, session, sharding, triplets
from tpaw_jax.cli import _overrides
from tpaw_jax.config import ObjectiveConfig
from tpaw_jax.logprobs import make_log_prob_fn
from tpaw_jax.train_step import StepScalars, _triplets
from tpaw_jax.types import TeamScores

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from plain import pair_loss, triplets_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--run", required=True, type=Path, help="a run of that configuration")
    parser.add_argument("--prompts", type=int, default=3, help="prompts of the parity check")
    options, rest = parser.parse_known_args()
    run = config.load(options.config, _overrides(rest))
    mesh = sharding.make_mesh(run.mesh)
    player = session.open_player(run, mesh)
    prompts, *_ = dataset.load(run.data, player.template, run.seed)
    store = triplets.open_store(options.run, prompts)
    window = store.window(max(store.generations), run.objective.n_max)
    trees = packing.trees_of_window(prompts, window, store.sources)
    print(json.dumps(tokens(prompts, window, trees, run)))
    print(json.dumps(parity(player, prompts, window, trees[: options.prompts], run, mesh)))


def tokens(prompts, window, trees, run) -> dict:
    """Token slots computed a prompt in one pass over D_O, and how many forward passes a round's steps need of them."""
    pairs = [(len(x) + len(y), len(x) + len(g)) for x, y, g in triplets_of(prompts, window)]
    longest = max(max(pair) for pair in pairs)
    rows = packing.pack(trees, run.packing)
    count = len(prompts)
    return {
        "question": "tokens a prompt",
        "prompts": count,
        "rounds_in_window": len(window),
        "pairs_padded_to_the_longest": 2 * longest * len(pairs) / count,
        "pairs_without_padding": sum(map(sum, pairs)) / count,
        "trees_packed_with_padding": len(rows) * run.packing.row_length / count,
        "trees_without_padding": sum(t.tokens for t in trees) / count,
        "live_reference_passes_a_step": len(window),
        "cached_reference_passes_a_step": 0,
    }


def parity(player, prompts, window, trees, run, mesh) -> dict:
    """Loss and gradient of the two ways on the first prompts, float32, three players near the policy."""
    keys = jax.random.split(jax.random.key(0), 3)
    nudged = lambda key: jax.tree.map(lambda p: p * (1 + 1e-3 * jax.random.normal(key, p.shape)), player.params)
    players = [nudged(key) for key in keys]
    rows = packing.pack(trees, run.packing)
    model = player.model.clone(dtype=jnp.float32)
    log_prob_fn = make_log_prob_fn(model, run.policy.head_chunk)
    scorer = scoring.make_scorer(log_prob_fn, mesh)
    cached = [scoring.score(scorer, p, rows, len(rows)) for p in players]
    scores = TeamScores(np.stack(cached), np.ones(3, bool))
    knobs = {"lam": 0.1, "eta": 6.0, "gamma": 0.5}
    scalars = StepScalars(np.float32(0), np.float32(knobs["lam"]), np.float32(0), np.bool_(False))

    def tree_loss(params):
        out, *_ = _triplets(log_prob_fn(params, rows.batch), rows.batch, scores, ObjectiveConfig(), scalars)
        weight = rows.batch.triplet_weight.reshape(-1)
        return jnp.sum(weight * out.per_triplet) / weight.sum()

    chosen = prompts.take(range(len(trees)))
    pairs = triplets_of(chosen, window)
    plain = lambda params: pair_loss(model, params, players, pairs, **knobs)
    (a, tree_gradient), (b, pair_gradient) = (jax.jit(jax.value_and_grad(f))(player.params) for f in (tree_loss, plain))
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(pair_gradient))
    difference = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), tree_gradient, pair_gradient)
    return {
        "question": "parity of trees with padded pairs, float32",
        "triplets": len(pairs),
        "loss_trees": float(a),
        "loss_pairs": float(b),
        "relative_loss_difference": abs(float(a) - float(b)) / abs(float(b)),
        "largest_gradient": largest,
        "largest_gradient_difference_over_largest": max(jax.tree.leaves(difference)) / largest,
    }


if __name__ == "__main__":
    main()
