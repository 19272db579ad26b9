"""The rounds of self-play: the only file that knows what a round is.

A round samples D_t with the policy, packs D_O = D_t + D_(t-1) + ... into prefix trees, has every player score what it
has not scored yet, trains the policy on it, and pushes the result to the ring. Every stage leaves its result on disk
before the next begins, so a run that is started again goes on from the last finished one.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, PyTree

from tpaw_jax import (
    cost,
    durable,
    monitoring,
    packing,
    ring,
    sampling,
    scoring,
    sharding,
    train_step,
    triplets,
)
from tpaw_jax.config import RunConfig, of_round
from tpaw_jax.host import Ahead
from tpaw_jax.session import Say, Session, open_session
from tpaw_jax.train_step import StepScalars
from tpaw_jax.types import TeamScores, TrainState


class StepInputs(NamedTuple):
    """What one call of the step takes beside the state, on the device, and the tokens in it."""

    arguments: tuple[Any, ...]
    tokens: int


def run(config: RunConfig, say: Say = print) -> list[dict[str, Any]]:
    """Play all rounds, or what is left of them, and return the table of rounds.

    Raises:
        FileNotFoundError, ValueError: model, data or configuration cannot be used; the sentence names what to mend.
        FloatingPointError: too many steps in a row were not finite; the batch is saved.
    """
    session, policy = open_session(config, say)
    store = triplets.open_store(session.directory, session.prompts)
    for t in range(session.ring.policies[-1], config.rounds):
        players, watch = ring.players(session.ring, t), monitoring.Stopwatch()
        say(monitoring.manifest(t, config.rounds, _manifest(session, t, players)))
        say(_expected_cost(session, store, players))
        store = sample(session, store, policy, t, watch)
        with watch.time("packing"):
            window = store.window(t, config.objective.n_max)
            trees = packing.trees_of_window(session.prompts, window, store.sources)
            rows = packing.pack(trees, config.packing)
        with watch.time("scoring"):
            scored = score(session, store, rows, trees, players, policy, t)
            scores = triplets.team_scores(store, rows, players, config.objective.n_max)
        policy, trained = train(session, rows, scores, players, policy, t, watch)
        with watch.time("other"):
            _finish_round(session, store, rows, players, scored, trained, watch.seconds, t)
        with watch.time("ring"):
            ring.push(session.ring, policy, t + 1)
        durable.write_json(triplets.round_directory(session.directory, t) / "timings.json", watch.report())
    ring.settle(session.ring)
    table = rounds_table(session.directory, config.rounds)
    say(monitoring.table(table))
    return table


def sample(
    session: Session, store: triplets.Store, policy: PyTree[Array], t: int, watch: monitoring.Stopwatch
) -> triplets.Store:
    """The store with D_t, sampled unless it is there."""
    if t in store.generations:
        session.say(f"Round {t}: the {len(session.prompts)} responses are there, sampled before.")
        return store
    with watch.time("sampling"), monitoring.progress(f"round {t} sampling", len(session.prompts), "response") as bar:
        tokens = 0

        def show(requests: int, new_tokens: int) -> None:
            nonlocal tokens
            tokens += new_tokens
            bar.update(requests)
            bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tokens/s", refresh=False)

        generations = sampling.generate(
            session.sampler, policy, session.prompts, seed=session.config.seed, round_number=t, progress=show
        )
    with watch.time("ring"):  # the policy that sampled must be whole on disk before anything that follows from it
        ring.settle(session.ring)
    with watch.time("other"):
        store = triplets.append(store, generations)
        _save_texts(session, store, t)
    return store


def score(
    session: Session,
    store: triplets.Store,
    rows: packing.Rows,
    trees: list[packing.Tree],
    players: list[int],
    policy: PyTree[Array],
    t: int,
) -> cost.Work:
    """Have each player score what it has not scored, and return what that computed.

    The newest scores all of D_O on the round's own rows, the others D_t alone. While one scores, the next is read from
    the ring.
    """
    unscored = {player: triplets.missing(store, player, trees) for player in players}
    work, config = cost.NOTHING, session.config.packing
    busy = [player for player in players if unscored[player]]
    for player in sorted(set(players) - set(busy)):
        session.say(f"Round {t}: player {player} has scored everything before.")
    load = lambda player: policy if player == t else ring.restore_policy(session.ring, player, session.like)
    with Ahead(load, busy) as loaded:
        for player in busy:
            params = next(loaded)
            own = rows if player == t else packing.pack(unscored[player], config)
            total = int((np.asarray(own.batch.segment_ids) > 0).sum())
            with monitoring.progress(f"round {t} player {player} scoring", total, "token") as bar:
                show = lambda batch, bar=bar: bar.update(int((batch.batch.segment_ids > 0).sum()))
                log_probs = scoring.score(
                    session.scorer, params, own, config.rows_per_batch, config.scoring_batches, progress=show
                )
            del params  # at most this one, the next and the policy are in memory
            triplets.add_scores(store, t, player, own, log_probs)
            work += cost.of_rows(own)
    return work


def train(
    session: Session,
    rows: packing.Rows,
    scores: TeamScores,
    players: list[int],
    policy: PyTree[Array],
    t: int,
    watch: monitoring.Stopwatch,
) -> tuple[PyTree[Array], dict[str, Any]]:
    """Train theta_(t+1) from theta_t on D_O; also what the round's table says of it."""
    c = session.config
    per_step = packing.micro_batches_a_step(rows, c.train.batch_triplets, c.packing.rows_per_batch)
    size = per_step * c.packing.rows_per_batch
    plan = [
        order[i : i + size]
        for epoch in range(c.train.epochs)
        for order in [packing.epoch_order(rows, c.seed, t, epoch)]
        for i in range(0, len(order), size)
    ]
    rates = train_step.learning_rates(c.train, t, len(plan))
    with watch.time("held-out"):
        before = held_out_log_prob(session, policy)
    most = packing.most_micro_batches(c.train.batch_triplets, c.packing.rows_per_batch)

    places = train_step.input_shardings(session.mesh)

    def inputs(step: int, tolerance: float, dry_run: bool = False) -> StepInputs:
        batch, of_team, used = packing.step_batch(rows, scores, plan[step], c.packing.rows_per_batch, most)
        lam = of_round(c.objective.lam, t)
        scalars = StepScalars(rates[step], np.float32(lam), np.float32(tolerance), np.bool_(dry_run))
        tokens = int((np.asarray(batch.segment_ids) > 0).sum())
        return StepInputs(jax.device_put((batch, of_team, used, scalars), places), tokens)

    with watch.time("dry run"):
        state, first, noise = _first_state(session, policy, inputs, t)
    del policy  # the step donates it
    log = monitoring.open_metrics(session.directory, t, first, c.tensorboard)
    tolerance = 2 * noise if c.objective.tolerance < 0 else c.objective.tolerance
    record = StepRecorder(session, log, players, t)
    pending: tuple[int, StepInputs, dict[str, Array], float] | None = None

    with (
        watch.time("training"),
        monitoring.progress(f"round {t} training", len(plan), "step") as bar,
        Ahead(lambda step: inputs(step, tolerance), range(first, len(plan)), depth=2) as ahead,
    ):
        bar.update(first)
        for step in range(first, len(plan)):
            made, waited = next(ahead), ahead.waited
            state, metrics = session.step(state, *made.arguments)
            if pending is not None:  # one step late: the device is never awaited
                record(*pending)
            pending = step, made, metrics, waited
            bar.update()
            bar.set_postfix_str(record.speed, refresh=False)
            if (step + 1) % c.train.save_every_steps == 0 and step + 1 < len(plan):
                record(*pending)
                pending = None
                ring.save_training(session.ring, state, t, step + 1)
        if pending is not None:
            record(*pending)
    with watch.time("held-out"):
        after = held_out_log_prob(session, state.params)
    share = (len(plan) - first) / len(plan)  # of the round, trained by this process
    facts = {"steps": len(plan), "share": share, "noise": noise, "held-out before": before, "held-out after": after}
    return state.params, facts


def held_out_log_prob(session: Session, policy: PyTree[Array]) -> float | None:
    """Mean log-prob of the held-out targets, nats a token."""
    rows = session.held_out
    if not len(rows):
        return None
    config = session.config.packing
    log_probs = scoring.score(session.scorer, policy, rows, config.rows_per_batch, config.scoring_batches)
    tokens = np.sum(np.asarray(rows.batch.responses) < rows.prompt_index.shape[1])
    return float(log_probs.sum() / tokens)


def rounds_table(directory: Path, rounds: int) -> list[dict[str, Any]]:
    """The table of the finished rounds."""
    files = [triplets.round_directory(directory, t) / "summary.json" for t in range(rounds)]
    return [json.loads(file.read_text()) for file in files if file.exists()]


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
class StepRecorder:
    """Logs finished steps with their speed, and stops the run where too many in a row were not finite."""

    session: Session
    log: monitoring.MetricsLog
    players: list[int]
    round: int
    last: float = dataclasses.field(default_factory=time.perf_counter)
    last_waited: float = 0.0
    speed: str = ""

    def __call__(self, step: int, inputs: StepInputs, metrics: dict[str, Array], waited: float) -> None:
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
            durable.write_arrays(path, log_probs=scores.log_probs, **dataclasses.asdict(batch))
            raise FloatingPointError(
                f"Round {self.round}, step {step}: the loss or gradient was not finite in {limit} steps in a row. The "
                f"last batch is saved in {path}. Look at the data of that batch, or begin again in another directory "
                "with a lower train.learning_rate."
            )


def _finish_round(
    session: Session,
    store: triplets.Store,
    rows: packing.Rows,
    players: list[int],
    scored: cost.Work,
    trained: dict[str, Any],
    seconds: dict[str, float],
    t: int,
) -> None:
    """Write the round's line of the table and say it, with what the round computed and saved."""
    trees, pairs = _round_work(session, store, players)
    computed, in_pairs = cost.flops(session.model, trees.total), cost.flops(session.model, pairs.total)
    done = cost.flops(session.model, scored + trees.training * trained["share"])  # by this process
    busy = seconds["scoring"] + seconds["training"]
    session.say(
        f"Measured: {done / 1e12:.3g} TFLOP in {busy:.3g} s of scoring and training, {done / busy / 1e9:.3g} GFLOP/s; "
        f"padded pairs with {len(players)} live references compute {in_pairs / computed:.1f} x as much."
    )
    records = monitoring.read_metrics(session.directory, t)
    last_epoch = records[-max(1, len(records) // session.config.train.epochs) :]
    mean = lambda name: float(np.average([r[name] for r in last_epoch], weights=[r["triplets"] for r in last_epoch]))
    lengths = [len(tokens) for tokens in store.generations[t].tokens]
    summary = {
        "round": t,
        "players": len(players),
        "triplets": int(rows.triplets.sum()),
        "steps": trained["steps"],
        "fill": rows.fill,
        "P_t at step 0": trained["noise"],
        "loss": mean("loss"),
        "chosen": mean("rewards/chosen"),
        "rejected": mean("rewards/rejected"),
        "margin": mean("rewards/margins"),
        "accuracy": mean("rewards/accuracies"),
        "alpha=eta": mean(f"player_{t}/alpha_is_eta"),
        "skipped": int(records[-1]["skipped"]),
        "response tokens": float(np.mean(lengths)),
        "echoes": store.echoes(t),
        "held-out before": trained["held-out before"],
        "held-out after": trained["held-out after"],
        "TFLOP": computed / 1e12,
        "TFLOP in pairs": in_pairs / 1e12,
        "saving": in_pairs / computed,
        "GFLOP/s": done / busy / 1e9,
        **{f"{stage} s": round(value, 2) for stage, value in seconds.items() if stage not in ("ring", "other")},
    }
    durable.write_json(triplets.round_directory(session.directory, t) / "summary.json", summary)
    session.say(monitoring.table([summary]) + "\n")


def _round_work(session: Session, store: triplets.Store, players: list[int]) -> tuple[cost.RoundWork, cost.RoundWork]:
    return cost.round_work(session.prompts, store.generations, store.sources, players, session.config)


def _expected_cost(session: Session, store: triplets.Store, players: list[int]) -> str:
    """A sentence: what scoring and training should compute, in trees and in padded pairs with live references."""
    trees, pairs = _round_work(session, store, players)
    tera = lambda work: f"{cost.flops(session.model, work) / 1e12:.3g}"
    return (
        f"Expected: {tera(trees.total)} TFLOP in trees ({tera(trees.scoring)} scoring, {tera(trees.training)} "
        f"training; {trees.total.tokens:.3g} token places); as padded pairs with {len(players)} live references "
        f"{tera(pairs.total)} TFLOP ({pairs.total.tokens:.3g} places), "
        f"{cost.flops(session.model, pairs.total) / cost.flops(session.model, trees.total):.1f} x as much."
    )


def _manifest(session: Session, t: int, players: list[int]) -> dict[str, Any]:
    c, size = session.config, len(session.prompts)
    place = c.policy.path if t == 0 else session.directory / "ring" / "policies" / f"{t:05d}"
    return {
        "policy from": f"theta_{t} = {place}",
        "players": ", ".join(f"theta_{j}" for j in players),
        "opponents": ", ".join(f"D_{j}" for j in players),
        "triplets": f"{size * len(players)} = {size} prompts x {len(players)} rounds",
        "learning rate": f"{of_round(c.train.learning_rate, t):g} ({c.train.optimizer}, {c.train.schedule})",
        "lam, eta, gamma": f"{of_round(c.objective.lam, t):g}, {c.objective.eta:g}, {c.objective.gamma:g}",
    }


def _save_texts(session: Session, store: triplets.Store, t: int) -> None:
    """The first prompts with their target and response as text, in samples.jsonl and shown."""
    decode = lambda tokens: session.template.tokenizer.decode(tokens, skip_special_tokens=True)
    chosen = range(min(session.config.sample_texts, len(session.prompts)))
    texts = [
        {
            "prompt": decode(session.prompts.prompt_tokens[i]),
            "target": decode(session.prompts.target_tokens[i]),
            "response": decode(store.generations[t].tokens[i]),
        }
        for i in chosen
    ]
    lines = "".join(json.dumps(text, ensure_ascii=False) + "\n" for text in texts)
    durable.write_bytes(triplets.round_directory(session.directory, t) / "samples.jsonl", lines.encode())
    for text in texts:
        session.say("\n".join(f"  {name:<8}  {_short(value)}" for name, value in text.items()))


def _short(text: str, most: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"
