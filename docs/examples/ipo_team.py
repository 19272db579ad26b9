"""A new objective in the compiled step: IPO's squared margin (arXiv 2310.12036), averaged over a team of players.

python docs/examples/ipo_team.py
"""

import jax.numpy as jnp
import numpy as np
import optax
from packed_trees import CONFIG, VOCABULARY, apply_fn, init

import tpaw_jax

TAU = 0.1
LOG_PROB_FN = tpaw_jax.from_apply_fn(apply_fn)


def ipo(params, batch, scores, total, scalars):
    """mean over triplets and players of (h - 1 / (2 tau))^2, h = log-ratio of the target minus that of the response."""
    target, generated = tpaw_jax.by_triplet(LOG_PROB_FN(params, batch), batch)  # [N]
    player_target, player_generated = tpaw_jax.by_triplet(scores.log_probs, batch)  # [J, N]
    h = (target - player_target) - (generated - player_generated)
    present = scores.player_mask[:, None]
    per_triplet = jnp.sum(jnp.where(present, (h - 1 / (2 * TAU)) ** 2, 0), axis=0) / jnp.sum(present)
    weight = batch.triplet_weight.reshape(-1)  # how many equal triplets each stands for; 0 is padding
    sums = {"triplets": jnp.sum(weight), "h": jnp.sum(weight * h.mean(axis=0)), "max": jnp.zeros(())}
    return jnp.sum(weight * per_triplet) / total, sums


def main():
    rng = np.random.default_rng(0)
    texts = lambda: tuple(rng.integers(0, VOCABULARY, rng.integers(3, 9)).astype(np.int32) for _ in range(8))
    prompts = tpaw_jax.Prompts(np.arange(8, dtype=np.int32), prompt_tokens=texts(), target_tokens=texts())
    generations = tpaw_jax.Generations(0, texts(), (np.zeros(0, np.float32),) * 8)
    rows = tpaw_jax.pack(tpaw_jax.trees_of_window(prompts, [generations]), CONFIG)

    players = [init(1), init(2)]
    scorer = tpaw_jax.make_scorer(LOG_PROB_FN)
    scored = np.stack([tpaw_jax.score(scorer, player, rows, rows_per_batch=1) for player in players])
    scores = tpaw_jax.TeamScores(scored, np.ones(2, bool))

    optimizer = optax.adam(1.0)
    step = tpaw_jax.make_step(ipo, optimizer)
    state = tpaw_jax.init_state(players[0], optimizer)
    batch = tpaw_jax.step_batch(rows, scores, np.arange(len(rows)), 1, len(rows))
    scalars = tpaw_jax.StepScalars(np.float32(1e-2), lam=np.float32(0), tolerance=np.float32(0), dry_run=np.bool_(0))
    losses = []
    for _ in range(20):
        state, metrics = step(state, *batch, scalars)
        losses.append(float(metrics["loss"]))
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}, mean h {metrics['h']:.2f} of {1 / (2 * TAU):.0f}")
    assert losses[-1] < losses[0]


if __name__ == "__main__":
    main()
