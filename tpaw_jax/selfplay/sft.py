"""Supervised fine-tuning: a run of one round that trains on the targets alone. Its policy is theta_0 of self-play.

Data, packing, train step, ring and journal are those of self-play. A prompt is a tree with one response, its target,
and only the target's tokens count in the loss.
"""

from typing import Any

import numpy as np
from jaxtyping import Array, PyTree

from tpaw_jax.data import packing, prefix_trees
from tpaw_jax.observe import health
from tpaw_jax.observe.health import Diverged
from tpaw_jax.observe.profiling import Stopwatch
from tpaw_jax.selfplay import round_summary, round_training, stages
from tpaw_jax.selfplay.round_training import Trained
from tpaw_jax.selfplay.session import Round, Session
from tpaw_jax.training import cost
from tpaw_jax.types import TeamScores


def train(session: Session, loaded: dict[int, PyTree[Array]], strict: bool) -> list[dict[str, Any]]:
    """Train theta_1 on the targets unless it is in the ring, and return the round's summary.

    Raises:
        Preempted, FloatingPointError: as `round_training.train`.
        Diverged: the run is strict, and the training shows a sign of divergence.
    """
    if session.first == 0:
        this = Round(session, 0, [], Stopwatch({"startup": session.startup}))
        rows = packing.pack(prefix_trees.trees_of_targets(session.prompts), session.config.packing)
        tokens = int(session.prompts.target_tokens.lengths.sum())
        session.say(
            f"{len(session.prompts)} targets, {tokens} tokens, in {len(rows)} rows that are {rows.fill:.1%} full."
        )
        no_players = np.zeros(session.config.objective.n_max, bool)
        scores = TeamScores(np.zeros((len(no_players), *rows.prompt_index.shape), np.float32), no_players)
        policy = loaded.pop(0)
        evaluated = stages.evaluate(this, policy, " before")
        policy, trained = round_training.train(this, rows, scores, policy)
        evaluated |= stages.evaluate(this, policy)
        warnings = _finish(this, rows, trained, evaluated)
        stages.push(this, policy)
        if strict and warnings:
            raise Diverged(f"{' '.join(warnings)} The run is strict and stops here; theta_1 is in the ring.")
    return stages.end(session)


def _finish(this: Round, rows: packing.Rows, trained: Trained, evaluated: dict[str, float]) -> list[str]:
    """Write and print the summary. Returns the warnings of `health`."""
    session = this.session
    mean, last = round_summary.last_epoch(session, 0)
    work = cost.with_backward(cost.work_of_rows(rows), bool(session.frozen)) * session.config.train.epochs
    done, seconds = cost.flops(session.model, work * trained.share), this.watch.seconds["training"]
    summary = {
        "round": 0,
        "targets": int(rows.triplets.sum()),
        "target tokens": int(session.prompts.target_tokens.lengths.sum()),
        "steps": trained.steps,
        "fill": rows.fill,
        "loss": mean("loss"),
        "skipped": int(last["skipped"]),
        "held-out before": trained.held_out_before,
        "held-out after": trained.held_out_after,
        **evaluated,
        "GFLOP/s": done / seconds / 1e9,
        **this.watch.shares(),
        "training s": round(seconds, 2),
    }
    round_summary.write(session, summary)
    return round_summary.warn(session, health.training_warnings(summary))
