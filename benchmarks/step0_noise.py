"""How far do cached scores and the train step's forward pass disagree while theta = theta_t? One JSON line a format.

    python benchmarks/step0_noise.py --config configs/smollm2_gsm8k.yaml --run runs/smollm2_gsm8k [--policy.path FILE]

Takes the first batch of rows of a finished run's newest round, scores it with theta_0 and lets the compiled train step
compute the same log-probs in a dry run: the largest |P_t| is the noise that could decide alpha at a round's first step.
"""

import argparse
import dataclasses
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tpaw_jax.cli import overrides
from tpaw_jax.config import config_file
from tpaw_jax.data import dataset, packing, prefix_trees
from tpaw_jax.generation.policy import open_policy
from tpaw_jax.models import Transformer
from tpaw_jax.runtime import sharding
from tpaw_jax.selfplay import round_store
from tpaw_jax.storage import journal
from tpaw_jax.training import scoring, train_step
from tpaw_jax.training.logprobs import make_log_prob_fn
from tpaw_jax.training.train_step import StepScalars
from tpaw_jax.types import TeamScores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--run", required=True, type=Path, help="a run of that configuration")
    options, rest = parser.parse_known_args()
    run = config_file.load(options.config, overrides.read(rest))
    mesh = sharding.make_mesh(run.mesh)
    player = open_policy(run, mesh)
    prompts, *_ = dataset.load(run.data, player.template, run.seed)
    store = round_store.open_store(journal.open_journal(options.run, read_only=True), prompts)
    window = [store.generations[r] for r in run.objective.opponents(max(store.generations))]
    rows = packing.pack(prefix_trees.trees_of_window(prompts, window, store.sources), run.packing)
    optimizer = train_step.make_optimizer(run.train)
    for compute, remat in itertools.product(("float32", "bfloat16"), ("layer", "dots", "none")):
        model = Transformer(player.model.config, jnp.dtype(compute), jnp.float32, remat)
        log_prob_fn = make_log_prob_fn(model, run.policy.head_chunk)
        size = run.packing.rows_per_batch
        first = packing.take(rows, np.arange(min(size, len(rows))), size)
        log_probs = scoring.score(scoring.make_scorer(log_prob_fn, mesh), player.params, first, size)
        scores = TeamScores(log_probs[None], np.ones(1, bool))
        batch = packing.step_batch(first, scores, np.arange(size), size, 1)
        objective = dataclasses.replace(run.objective, n_max=1)
        step = train_step.make_train_step(log_prob_fn, optimizer, objective, mesh)
        state = train_step.init_state(jax.tree.map(jnp.copy, player.params), optimizer, mesh)
        scalars = StepScalars(np.float32(0), np.float32(run.objective.lam[0]), np.float32(0), np.bool_(True))
        _, metrics = step(state, *batch, scalars)
        record = {
            "compute_dtype": compute,
            "remat": remat,
            "max_abs_reward": float(metrics["newest_max_abs_reward"]),
            "alpha_is_eta_at_tolerance_0": float(metrics["player/alpha_is_eta"][0]),
            "mean_target_log_prob": float(metrics["logps/chosen"]),
            "triplets": float(metrics["triplets"]),
            "backend": jax.default_backend(),
            "jax": jax.__version__,
        }
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
