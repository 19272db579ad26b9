"""A round's training: theta_t to theta_(t+1) on D_O, batches made ahead, states saved, steps logged."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, PyTree

from tpaw_jax.config import RunConfig, of_round
from tpaw_jax.data import packing
from tpaw_jax.observe import monitoring
from tpaw_jax.runtime import processes, sharding
from tpaw_jax.runtime.host import Prefetch
from tpaw_jax.runtime.preemption import Preempted
from tpaw_jax.selfplay import triplets
from tpaw_jax.selfplay.session import Session
from tpaw_jax.storage import files, ring
from tpaw_jax.training import scoring, train_step
from tpaw_jax.training.batch_shapes import most_micro_batches
from tpaw_jax.training.train_step import StepScalars
from tpaw_jax.types import TeamScores, TrainState

STEPS_OF_A_ROUND = 1 << 24
"""Numbers that the steps of a round have for a pod's notice of preemption, those of later rounds above them."""

FACTS = ("steps", "share", "noise", "held-out before", "held-out after")
"""What training says of a round."""

MEASURED_FROM, MEASURED_TO = 3, 7
"""Steps of a round by which its speed is measured: after those that compile and fill the queue."""


class StepInputs(NamedTuple):
    """What one call of the step takes beside the state, on the device, and the tokens in it."""

    arguments: tuple[Any, ...]
    tokens: int


def train(
    session: Session,
    rows: packing.Rows,
    scores: TeamScores,
    players: list[int],
    policy: PyTree[Array],
    t: int,
    watch: monitoring.Stopwatch,
) -> tuple[PyTree[Array], dict[str, Any]]:
    """Train theta_(t+1) from theta_t on D_O; also what the round's table says of it.

    Raises:
        Preempted: the run was told to stop; the training state is on disk once the ring is settled.
    """
    c = session.config
    most, plan = most_micro_batches(c), rows_of_steps(rows, c, t)
    rates = train_step.learning_rates(c.train, t, len(plan))
    with watch.time("held-out"):
        before = held_out_log_prob(session, policy)
    places = train_step.input_shardings(session.mesh)

    def inputs(step: int, tolerance: float, dry_run: bool = False) -> StepInputs:
        batch, of_team, used = packing.step_batch(rows, scores, plan[step], c.packing.rows_per_batch, most)
        lam = np.float32(of_round(c.objective.lam, t))
        scalars = StepScalars(rates[step], lam, np.float32(tolerance), np.bool_(dry_run))
        tokens = int((np.asarray(batch.segment_ids) > 0).sum())
        return StepInputs(sharding.place((batch, of_team, used, scalars), places), tokens)

    with watch.time("dry run"):
        state, first, noise = _first_state(session, policy, inputs, t)
    del policy  # the step donates it
    log = monitoring.open_metrics(session.directory, t, first, c.tensorboard)
    tolerance = 2 * noise if c.objective.tolerance < 0 else c.objective.tolerance
    record = StepRecorder(session, log, players, t)
    an_epoch = len(plan) // c.train.epochs
    saves = SaveTimes(c.train.save_every_steps, c.train.save_every_minutes)

    with (
        watch.time("training"),
        monitoring.progress(f"round {t} training", len(plan), "step") as bar,
        Prefetch(lambda step: inputs(step, tolerance), range(first, len(plan)), depth=2) as ahead,
    ):
        bar.update(first)
        for step in range(first, len(plan)):
            made, waited = next(ahead), ahead.waited
            session.profiler.step("training")
            state, metrics = session.step(state, *made.arguments)
            record.push(step, made, metrics, waited)
            bar.update()
            bar.set_postfix_str(record.speed, refresh=False)
            told = session.notice.received_at(STEPS_OF_A_ROUND * t + step)
            if c.train.validate_each_epoch and (step + 1) % an_epoch == 0 and step + 1 < len(plan):
                record.validate(step, state.params)
            if told or (saves.due(step) and step + 1 < len(plan)):
                record.flush()
                ring.save_training(session.ring, state, t, step + 1)
            if told:
                where = f"Round {t}: training stopped after step {step + 1} of {len(plan)}"
                raise Preempted(f"{where}; the same command goes on there.")
        record.flush()
    if session.evaluator is not None:  # it takes a while, and a kill would cost the steps since the last save
        ring.save_training(session.ring, state, t, len(plan))
    with watch.time("held-out"):
        after = held_out_log_prob(session, state.params)
    own = (len(plan) - first) / len(plan)  # share of the round that this process has trained
    return state.params, dict(zip(FACTS, (len(plan), own, noise, before, after), strict=True))


def rows_of_steps(rows: packing.Rows, config: RunConfig, t: int) -> list[np.ndarray]:
    """The rows of every step of a round, over all epochs."""
    wanted = packing.micro_batches_a_step(rows, config.train.batch_triplets, config.packing.rows_per_batch)
    size = min(most_micro_batches(config), wanted) * config.packing.rows_per_batch
    orders = [packing.epoch_order(rows, config.seed, t, epoch) for epoch in range(config.train.epochs)]
    return [order[i : i + size] for order in orders for i in range(0, len(order), size)]


def held_out_log_prob(session: Session, policy: PyTree[Array]) -> float | None:
    """Mean log-prob of the held-out targets, nats a token."""
    rows = session.held_out
    if not len(rows):
        return None
    config = session.config.packing
    log_probs = scoring.score(session.scorer, policy, rows, config.rows_per_batch, config.scoring_batches)
    tokens = np.sum(np.asarray(rows.batch.responses) < rows.prompt_index.shape[1])
    return float(log_probs.sum() / tokens)


def _first_state(
    session: Session, policy: PyTree[Array], inputs: Callable[..., StepInputs], t: int
) -> tuple[TrainState, int, float]:
    """A fresh training state or the saved one of this round, the step to go on from, and the noise of the scores.

    The noise is how far the train step's program and the newest player's scores disagree while theta = theta_t, nats
    times lam: the largest |P_t| of the first step, computed by the compiled step itself with nothing updated. It is 0
    where both round alike. It is measured anew when a round goes on, since the machine may be another.
    """
    state = train_step.init_state(policy, session.optimizer, session.mesh)
    state, metrics = session.step(state, *inputs(0, 0.0, dry_run=True).arguments)
    noise = float(metrics["newest_max_abs_reward"])
    noise = noise if np.isfinite(noise) else 0.0
    saved = [step for round_number, step in session.ring.training_states if round_number == t]
    if not saved:
        return state, 0, noise
    session.say(f"Round {t}: training goes on after step {saved[-1]}.")
    like = sharding.abstract(state)
    del state  # two states at once may not fit
    return ring.restore_training(session.ring, t, saved[-1], like), saved[-1], noise


@dataclasses.dataclass
class SaveTimes:
    """When the training state is saved: every so many steps, fewer where they would take more than so many minutes.

    How many steps are so many minutes is measured once a round, by process 0 for all.
    """

    steps: int
    minutes: float
    seen: int = 0
    since: float = 0.0

    def due(self, step: int) -> bool:
        """Whether to save after this step; asked once after every step."""
        self.seen += 1
        if self.seen == MEASURED_FROM:
            self.since = time.perf_counter()
        if self.seen == MEASURED_TO:
            seconds = (time.perf_counter() - self.since) / (MEASURED_TO - MEASURED_FROM)
            of_all = processes.all_gather(seconds=np.array([seconds]))[0]["seconds"]
            self.steps = max(1, int(min(self.steps, 60 * self.minutes / float(of_all[0]))))
        return (step + 1) % self.steps == 0


@dataclasses.dataclass
class StepRecorder:
    """Logs finished steps with their speed, and stops the run where too many in a row were not finite."""

    session: Session
    log: monitoring.MetricsLog
    players: list[int]
    round: int
    last: float = dataclasses.field(default_factory=time.perf_counter)
    last_waited: float = 0.0
    speed: str = ""
    pending: tuple[int, StepInputs, dict[str, Array], float] | None = None

    def push(self, step: int, inputs: StepInputs, metrics: dict[str, Array], waited: float) -> None:
        """Log the step before this one, so that the device is never awaited."""
        self.flush()
        self.pending = step, inputs, metrics, waited

    def flush(self) -> None:
        """Log the step that waits to be, if one does."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            self._log(*pending)

    def validate(self, step: int, policy: PyTree[Array]) -> None:
        """Log the held-out targets' log-prob after a step; the next step's speed does not count it."""
        self.flush()
        self.log.write(round=self.round, step=step, **{"held-out": held_out_log_prob(self.session, policy)})
        self.last = time.perf_counter()

    def _log(self, step: int, inputs: StepInputs, metrics: dict[str, Array], waited: float) -> None:
        record = monitoring.step_record(jax.device_get(metrics), self.players)
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        speed = {
            "tokens_per_second": inputs.tokens / seconds,
            "triplets_per_second": record["triplets"] / seconds,
            "input_wait_share": (waited - self.last_waited) / seconds,  # of the step's time, waiting for its batch
        }
        self.last_waited = waited
        self.speed = f"{speed['triplets_per_second']:.2f} triplets/s, {speed['tokens_per_second']:.0f} tokens/s"
        self.log.write(round=self.round, step=step, **record, **speed)
        limit = self.session.config.train.max_skipped_in_a_row
        if record["skipped_in_a_row"] >= limit:
            place = triplets.round_directory(self.session.directory, self.round)
            path = place / f"not_finite_step_{step:08d}.npz"
            batch, scores, *_ = jax.device_get(inputs.arguments)
            files.write_arrays(path, log_probs=scores.log_probs, **dataclasses.asdict(batch))
            raise FloatingPointError(
                f"Round {self.round}, step {step}: the loss or gradient was not finite in {limit} steps in a row. The "
                f"last batch is saved in {path}. Look at that batch, or start over in another directory "
                "with a lower train.learning_rate."
            )
