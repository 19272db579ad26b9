"""The training of a round, theta_t to theta_(t+1) on D_O: prefetched batches, saved states, logged steps."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, PyTree

from tpaw_jax.config import RunConfig, of_round
from tpaw_jax.data import packing
from tpaw_jax.observe import metrics
from tpaw_jax.observe.tables import progress
from tpaw_jax.runtime import processes, sharding
from tpaw_jax.runtime.host import Prefetch
from tpaw_jax.runtime.preemption import Preempted
from tpaw_jax.selfplay.round_store import round_directory
from tpaw_jax.selfplay.session import Round, Session
from tpaw_jax.storage import array_files, ring
from tpaw_jax.training import learning_rate, scoring, train_step
from tpaw_jax.training.batch_shapes import most_micro_batches
from tpaw_jax.training.train_step import StepScalars
from tpaw_jax.types import TeamScores, TrainState, TreeBatch

STEP_ID_STRIDE = 1 << 24
"""A pod's preemption service numbers steps over the whole run: step s of round t is t * STEP_ID_STRIDE + s."""

TIMED_FROM, TIMED_TO = 3, 7
"""The steps between which `SaveSchedule` times a round: after those that compile and fill the queue."""


class Trained(NamedTuple):
    """What the training of a round reports."""

    steps: int
    share: float  # fraction of the round's steps that ran since the last start
    noise: float  # largest |P_t| before the first update, nats times lam
    held_out_before: float | None  # mean log-prob of held-out targets, nats per token
    held_out_after: float | None


class StepInputs(NamedTuple):
    """The device arguments of one train step beside the state, and what they are on the host."""

    arguments: tuple[Any, ...]
    batch: TreeBatch
    scores: TeamScores
    tokens: int  # in the batch


MakeInputs = Callable[[int, float, bool], StepInputs]
"""(step, tolerance, dry_run) -> inputs."""


def train(this: Round, rows: packing.Rows, scores: TeamScores, policy: PyTree[Array]) -> tuple[PyTree[Array], Trained]:
    """Train theta_(t+1) from theta_t on D_O. Donates `policy`.

    Raises:
        Preempted: the run was asked to stop; the training state is on disk once the ring has finished its saves.
        FloatingPointError: too many consecutive steps had a non-finite loss or gradient.
    """
    session, t, config = this.session, this.number, this.session.config
    step_rows = rows_of_steps(rows, config, t, session.journal.whole_batches)
    _say_batch(session, rows, step_rows, t)
    make_inputs = _make_inputs(session, rows, scores, step_rows, t)
    with this.watch.time("held-out"):
        before = held_out_log_prob(session, policy)
    with this.watch.time("dry run"):
        state, first, noise = _first_state(this, policy, make_inputs)
    del policy  # the step donates it
    tolerance = 2 * noise if config.objective.tolerance < 0 else config.objective.tolerance
    with this.watch.time("training"), session.profiler.stage("training"):
        state = _run_steps(this, state, first, len(step_rows), lambda step: make_inputs(step, tolerance, False))
    if session.evaluator is not None:  # a kill during the evaluation must not cost the last steps
        with this.watch.time("saving"):
            ring.save_training(session.ring, state, t, len(step_rows))
    with this.watch.time("held-out"):
        after = held_out_log_prob(session, session.whole(state.params))
    share = (len(step_rows) - first) / len(step_rows)
    return session.whole(state.params), Trained(len(step_rows), share, noise, before, after)


def _make_inputs(
    session: Session, rows: packing.Rows, scores: TeamScores, step_rows: list[np.ndarray], t: int
) -> MakeInputs:
    """A function that assembles the inputs of a step and moves them to the device."""
    config = session.config
    most = most_micro_batches(config)
    scale = learning_rate.scale(config, _triplets_per_step(rows, step_rows))
    rates = scale * learning_rate.of_steps(config.train, t, len(step_rows))
    lam = np.float32(of_round(config.objective.lam, t))
    shardings = train_step.input_shardings(session.mesh, config.mesh.context)

    def make(step: int, tolerance: float, dry_run: bool) -> StepInputs:
        batch, team, used = packing.step_batch(rows, scores, step_rows[step], config.packing.rows_per_batch, most)
        scalars = StepScalars(rates[step], lam, np.float32(tolerance), np.bool_(dry_run), np.int32(t))
        tokens = int(rows.tokens[step_rows[step]].sum())
        return StepInputs(sharding.place((batch, team, used, scalars), shardings), batch, team, tokens)

    return make


def _run_steps(
    this: Round, state: TrainState, first: int, steps: int, make_inputs: Callable[[int], StepInputs]
) -> TrainState:
    """Run the steps from `first` on. The device never waits for the host: inputs are prefetched, metrics come late."""
    session, t, config = this.session, this.number, this.session.config.train
    saves = SaveSchedule(config.save_every_steps, config.save_every_minutes)
    log = metrics.open_metrics(session.directory, t, first, session.trackers)
    this.watch.add_past("lost steps", log.lost_seconds)
    with (
        progress(f"round {t} training", steps, "step") as bar,
        Prefetch(make_inputs, range(first, steps), depth=2) as batches,
    ):
        recorder = StepRecorder(session, log, this.players, t)
        bar.update(first)
        for step in range(first, steps):
            inputs, waited = next(batches), batches.waited
            with session.profiler.step():
                state, step_metrics = session.step(state, *inputs.arguments, *session.frozen)
            recorder.push(step, inputs, step_metrics, waited)
            bar.update()
            bar.set_postfix_str(recorder.speed, refresh=False)
            preempted, last = session.notice.received_at(STEP_ID_STRIDE * t + step), step + 1 == steps
            if config.validate_each_epoch and (step + 1) % (steps // config.epochs) == 0 and not last:
                recorder.flush()
                with this.watch.time("held-out"):
                    recorder.validate(step, session.whole(state.params))
            if preempted or (saves.due(step) and not last):
                recorder.flush()
                with this.watch.time("saving"):
                    log.flush()
                    ring.save_training(session.ring, state, t, step + 1)
            if preempted:
                where = f"Round {t}: training stopped after step {step + 1} of {steps}"
                raise Preempted(f"{where}; run the same command to resume there.")
        recorder.flush()
    log.flush()
    this.watch.add("input wait", batches.waited)
    return state


def rows_of_steps(rows: packing.Rows, config: RunConfig, t: int, whole_batches: bool = False) -> list[np.ndarray]:
    """The indices of the rows of each step of a round, over all epochs.

    With `whole_batches`, a step has a multiple of `packing.rows_per_batch` rows, as in runs begun with version 0.1.
    """
    batch, most = config.packing.rows_per_batch, most_micro_batches(config)
    size = packing.rows_per_step(float(rows.triplets.mean()), config.train.batch_triplets, config.packing, most)
    if whole_batches:
        wanted = float(config.train.batch_triplets) / (max(float(rows.triplets.mean()), 1.0) * batch)
        size = batch * min(most, max(1, round(wanted)))
    orders = [packing.epoch_order(rows, config.seed, t, epoch) for epoch in range(config.train.epochs)]
    return [order[i : i + size] for order in orders for i in range(0, len(order), size)]


def _triplets_per_step(rows: packing.Rows, step_rows: list[np.ndarray]) -> float:
    return float(rows.triplets.mean()) * len(step_rows[0])


def _say_batch(session: Session, rows: packing.Rows, step_rows: list[np.ndarray], t: int) -> None:
    """Say how a scaled learning rate came about, and what a batch of rows wastes."""
    config, size = session.config, len(step_rows[0])
    triplets, batch = _triplets_per_step(rows, step_rows), config.packing.rows_per_batch
    if config.train.batch_triplets == "auto":
        session.say(
            f"Round {t}: steps of {triplets:.0f} triplets, because train.batch_triplets is auto. The learning rate is "
            f"{learning_rate.scale(config, triplets):.3g} times train.learning_rate."
        )
    elif (idle := 1 - size / (-(-size // batch) * batch)) > 0.25 and len(rows) > size:
        session.say(
            f"Warning: Round {t}: a step of {triplets:.0f} triplets has {size} rows, but the devices compute {batch} "
            f"rows at a time: {idle:.0%} of what they compute is padding. A shorter packing.row_length pads less; "
            "on TPU, 0 with mesh.preset auto finds it."
        )


def held_out_log_prob(session: Session, policy: PyTree[Array]) -> float | None:
    """Mean log-prob of the held-out targets, nats per token; None without held-out prompts."""
    rows = session.held_out
    if not len(rows):
        return None
    config = session.config.packing
    log_probs = scoring.score(session.scorer, policy, rows, config.rows_per_batch, config.scoring_batches)
    return float(log_probs.sum()) / int(rows.predictions.sum())


def _first_state(this: Round, policy: PyTree[Array], make_inputs: MakeInputs) -> tuple[TrainState, int, float]:
    """The training state to begin with, fresh or restored; the step to begin at; and the noise of the scores.

    The noise is the largest |P_t| of the first step, nats times lam, computed by the compiled step without an update.
    In exact arithmetic it is 0, because theta = theta_t; what is left is rounding between train step and scorer. A
    resumed round measures it again, since the machine may be another.
    """
    session, t = this.session, this.number
    state = train_step.init_state(session.trained(policy), session.optimizer, session.mesh)
    state, step_metrics = session.step(state, *make_inputs(0, 0.0, True).arguments, *session.frozen)
    noise = float(step_metrics["newest_max_abs_reward"])
    noise = noise if np.isfinite(noise) else 0.0
    saved = [step for round_number, step in session.ring.training_states if round_number == t]
    if not saved:
        return state, 0, noise
    session.say(f"Round {t}: training resumes after step {saved[-1]}.")
    like = sharding.abstract(state)
    del state  # two states may not fit into memory
    with this.watch.time("restoring"):
        return ring.restore_training(session.ring, t, saved[-1], like), saved[-1], noise


@dataclasses.dataclass
class SaveSchedule:
    """When to save the training state: every `steps` steps, or every `minutes` minutes if that comes first.

    Process 0 measures the speed once per round, for all processes.
    """

    steps: int
    minutes: float
    seen: int = 0
    since: float = 0.0

    def due(self, step: int) -> bool:
        """Whether to save after this step; call it once after every step."""
        self.seen += 1
        if self.seen == TIMED_FROM:
            self.since = time.perf_counter()
        if self.seen == TIMED_TO:
            seconds = (time.perf_counter() - self.since) / (TIMED_TO - TIMED_FROM)
            measured = processes.all_gather(seconds=np.array([seconds]))[0]["seconds"]
            self.steps = max(1, int(min(self.steps, 60 * self.minutes / float(measured[0]))))
        return (step + 1) % self.steps == 0


@dataclasses.dataclass
class StepRecorder:
    """Logs finished steps with their speed, and stops the run after too many consecutive non-finite steps."""

    session: Session
    log: metrics.MetricsLog
    players: list[int]
    round: int
    last: float = dataclasses.field(default_factory=time.perf_counter)
    last_waited: float = 0.0
    speed: str = ""
    pending: tuple[int, StepInputs, dict[str, Array], float] | None = None

    def push(self, step: int, inputs: StepInputs, step_metrics: dict[str, Array], waited: float) -> None:
        """Log the step before this one: its metrics are ready, so nothing waits for the device."""
        self.flush()
        self.pending = step, inputs, step_metrics, waited

    def flush(self) -> None:
        """Log the pending step."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            self._log(*pending)

    def validate(self, step: int, policy: PyTree[Array]) -> None:
        """Log the held-out log-prob after a step, outside the measured step time."""
        self.flush()
        self.log.write(round=self.round, step=step, **{"held-out": held_out_log_prob(self.session, policy)})
        self.last = time.perf_counter()

    def _log(self, step: int, inputs: StepInputs, step_metrics: dict[str, Array], waited: float) -> None:
        record = metrics.step_record(jax.device_get(step_metrics), self.players)
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        speed = {
            "tokens_per_second": inputs.tokens / seconds,
            "triplets_per_second": record["triplets"] / seconds,
            "input_wait_share": (waited - self.last_waited) / seconds,  # of the step's time
        }
        self.last_waited = waited
        self.speed = f"{speed['triplets_per_second']:.2f} triplets/s, {speed['tokens_per_second']:.0f} tokens/s"
        self.log.write(round=self.round, step=step, **record, **speed)
        if record["skipped_in_a_row"] >= self.session.config.train.max_skipped_in_a_row:
            self.log.flush()
            self._stop(step, inputs)

    def _stop(self, step: int, inputs: StepInputs) -> None:
        limit = self.session.config.train.max_skipped_in_a_row
        path = round_directory(self.session.directory, self.round) / f"not_finite_step_{step:08d}.npz"
        if processes.is_main():  # the devices of each process hold a part of the batch only
            array_files.write(path, log_probs=inputs.scores.log_probs, **dataclasses.asdict(inputs.batch))
        raise FloatingPointError(
            f"Round {self.round}, step {step}: the loss or gradient was not finite in {limit} steps in a row. The last "
            f"batch is saved in {path}. Look at that batch, or start over in another directory with a lower "
            "train.learning_rate."
        )
