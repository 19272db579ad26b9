"""Packed prefix trees, cached scores and the compiled train step, around a model of your own.

python docs/examples/packed_trees.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import tpaw_jax

VOCABULARY, WIDTH = 32, 16
CONFIG = tpaw_jax.PackingConfig(row_length=64, max_responses_per_row=12)


def apply_fn(params, tokens, positions, mask):
    """Your model: tokens and positions [B, T], mask [B, T, T] of what each token may attend to -> logits [B, T, V]."""
    x = params["embedding"][tokens] + params["position"][positions]
    attention = jax.nn.softmax(jnp.where(mask, x @ x.swapaxes(1, 2), -1e9), axis=-1)
    return jnp.tanh(attention @ x) @ params["head"]


def init(seed):
    shapes = {"embedding": (VOCABULARY, WIDTH), "position": (64, WIDTH), "head": (WIDTH, VOCABULARY)}
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {name: 0.3 * jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}


def main():
    rng = np.random.default_rng(0)
    texts = lambda: tuple(rng.integers(0, VOCABULARY, rng.integers(3, 9)).astype(np.int32) for _ in range(8))
    prompts = tpaw_jax.Prompts(np.arange(8, dtype=np.int32), prompt_tokens=texts(), target_tokens=texts())
    no_log_probs = (np.zeros(0, np.float32),) * 8
    rounds = [tpaw_jax.Generations(r, texts(), no_log_probs) for r in (1, 0)]  # newest first
    rows = tpaw_jax.pack(tpaw_jax.trees_of_window(prompts, rounds), CONFIG)
    print(f"{int(rows.triplets.sum())} triplets in {len(rows)} rows that are {rows.fill:.0%} full")

    log_prob_fn = tpaw_jax.from_apply_fn(apply_fn)
    scorer = tpaw_jax.make_scorer(log_prob_fn)
    players = [init(1), init(2)]  # newest first; score each once, then drop it
    scored = [tpaw_jax.score(scorer, player, rows, rows_per_batch=1) for player in players]
    scores = tpaw_jax.TeamScores(np.stack(scored), np.ones(2, bool))

    optimizer = optax.adam(1.0)  # the step scales its updates by the learning rate
    step = tpaw_jax.make_train_step(log_prob_fn, optimizer, tpaw_jax.ObjectiveConfig())
    state = tpaw_jax.init_state(players[0], optimizer)  # the step donates it
    batch = tpaw_jax.step_batch(rows, scores, np.arange(len(rows)), 1, len(rows))
    scalars = tpaw_jax.StepScalars(np.float32(1e-2), lam=np.float32(0.1), tolerance=np.float32(0), dry_run=np.bool_(0))
    for i in range(10):
        state, metrics = step(state, *batch, scalars)
        if i in (0, 9):
            print(f"step {i}: loss {metrics['loss']:.3f}, margin {metrics['rewards/margins']:.3f}")
    assert metrics["rewards/margins"] > 0


if __name__ == "__main__":
    main()
