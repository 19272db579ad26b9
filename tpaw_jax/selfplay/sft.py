"""Supervised fine-tuning: a run of one round on the targets alone, whose policy is the theta_0 of self-play.

Data, packing, the step, the ring and the journal are those of self-play; a prompt is a tree with one response, its
target, and the loss is of the target's tokens only.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from jaxtyping import Array, PyTree

from tpaw_jax.data import packing
from tpaw_jax.observe import health, monitoring
from tpaw_jax.observe.health import Diverged
from tpaw_jax.runtime import processes
from tpaw_jax.selfplay import reporting, round_training, triplets
from tpaw_jax.selfplay.session import Session
from tpaw_jax.storage import files, journal, ring
from tpaw_jax.training import cost
from tpaw_jax.types import TARGET, Prompts, TeamScores


def train(session: Session, policy: PyTree[Array], strict: bool) -> list[dict[str, Any]]:
    """Train theta_1 on the targets, or what is left of it, push it to the ring, and return the round's line.

    Raises:
        Preempted, FloatingPointError: as `training.train`.
        Diverged: the run is strict, and the training shows a sign of divergence.
    """
    config, watch = session.config, monitoring.Stopwatch()
    if session.first == 0:
        rows = packing.pack(trees_of_targets(session.prompts), config.packing)
        tokens = sum(map(len, session.prompts.target_tokens))
        session.say(f"{len(session.prompts)} targets of {tokens} tokens in {len(rows)} rows, {rows.fill:.1%} full.")
        no_players = np.zeros(config.objective.n_max, bool)
        scores = TeamScores(np.zeros((len(no_players), *rows.prompt_index.shape), np.float32), no_players)
        before = reporting.evaluated(session, policy, watch, " before")
        policy, trained = round_training.train(session, rows, scores, [], policy, 0, watch)
        session.profiler.stop()
        trained["evaluated"] = before | reporting.evaluated(session, policy, watch)
        wrong = _finish(session, rows, trained, watch)
        files.write_json(triplets.round_directory(session.directory, 0) / "timings.json", watch.report())
        ring.push(session.ring, policy, 1)
        if strict and wrong:
            raise Diverged(f"{' '.join(wrong)} The run is strict and stops here; theta_1 is in the ring.")
    ring.finish_saves(session.ring)
    processes.barrier("the targets are learnt")
    table = reporting.rounds_table(session.directory, 1)
    session.say(monitoring.table(table))
    return table


def trees_of_targets(prompts: Prompts) -> list[packing.Tree]:
    """Every prompt with its target, which counts once."""
    return [
        packing.Tree(i, x, (TARGET,), (y,), ((0, 0, 1),))
        for i, (x, y) in enumerate(zip(prompts.prompt_tokens, prompts.target_tokens, strict=True))
    ]


def _finish(session: Session, rows: packing.Rows, trained: dict[str, Any], watch: monitoring.Stopwatch) -> list[str]:
    """Write the round's line of the table; also what went wrong."""
    mean, last = reporting.last_epoch(session, 0)
    work = cost.of_rows(rows) * (session.config.train.epochs * (1 + cost.BACKWARD))
    done, seconds = cost.flops(session.model, work * trained["share"]), watch.seconds["training"]
    summary = {
        "round": 0,
        "targets": int(rows.triplets.sum()),
        "target tokens": sum(map(len, session.prompts.target_tokens)),
        "steps": trained["steps"],
        "fill": rows.fill,
        "loss": mean("loss"),
        "skipped": int(last["skipped"]),
        "held-out before": trained["held-out before"],
        "held-out after": trained["held-out after"],
        **trained["evaluated"],
        "GFLOP/s": done / seconds / 1e9,
        "training s": round(seconds, 2),
    }
    content = (json.dumps(summary, indent=2) + "\n").encode()
    journal.write(session.journal, f"{triplets.round_name(0)}/summary.json", "summary", 0, content)
    wrong = health.of_training(summary)
    for sentence in wrong:
        session.say(f"Warning: {sentence}")
    return wrong
