"""The rounds of self-play: the only file that knows what a round is.

A round samples D_t with the policy, packs D_O = D_t + D_(t-1) + ... into prefix trees, has every player score what it
has not scored yet, trains the policy on it, and pushes the result to the ring. Every stage leaves its result on disk
before the next begins, so a run that is started again goes on from the last finished one; what is damaged meanwhile is
made again (`recovery`).
"""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PyTree

from tpaw_jax.config import RunConfig
from tpaw_jax.data import packing
from tpaw_jax.generation import engine, generation_file
from tpaw_jax.observe import monitoring
from tpaw_jax.observe.health import Diverged
from tpaw_jax.runtime import processes
from tpaw_jax.runtime.host import Prefetch
from tpaw_jax.runtime.preemption import Preempted, PreemptionNotice
from tpaw_jax.selfplay import recovery, reporting, round_training, sft, triplets
from tpaw_jax.selfplay.session import Say, Session, open_session
from tpaw_jax.storage import files, ring
from tpaw_jax.storage.files import CorruptedFile
from tpaw_jax.storage.journal import RegeneratedDifferently
from tpaw_jax.training import cost, scoring
from tpaw_jax.types import Generations

MOST_DAMAGES = 20
"""Damaged files that a run meets before it gives up on the place where it lies."""


def run(
    config: RunConfig,
    say: Say = print,
    generations: Path | None = None,
    profiled: range = range(0),
    notice: PreemptionNotice | None = None,
    strict: bool = False,
) -> list[dict[str, Any]]:
    """Play all rounds, or what is left of them, and return the table of rounds.

    With `generations`, a file of another engine's responses, only the round that they answer is played. Steps in
    `profiled` of every stage are traced. A `strict` run stops at the end of a round in which something went wrong.

    Raises:
        FileNotFoundError, ValueError: model, data, generations or configuration cannot be used; the sentence names what
            to mend.
        FloatingPointError: too many steps in a row were not finite; the batch is saved.
        Preempted: `notice` told the run to stop; all that is finished is on disk.
        Diverged: the run is strict, and the last round shows a sign of divergence (`health.warnings`).
        CorruptedFile: what is read back from the disk is damaged again and again.
    """
    directory, notice = Path(config.directory), notice or PreemptionNotice()
    of_all = say if processes.is_main() else lambda text: None
    with files.locked(directory) if processes.is_main() else contextlib.nullcontext():
        for attempt in itertools.count(1):
            try:
                return _play(config, say, profiled, notice, generations, strict)
            except CorruptedFile as damage:
                if attempt == MOST_DAMAGES or directory.absolute() not in damage.path.absolute().parents:
                    raise
                recovery.quarantine(directory, damage, of_all)
            except RegeneratedDifferently as change:
                of_all(str(change))
    raise AssertionError("unreachable")


def _play(
    config: RunConfig, say: Say, profiled: range, notice: PreemptionNotice, generations: Path | None, strict: bool
) -> list[dict[str, Any]]:
    session, *policy = open_session(config, say, profiled, notice)
    try:
        if config.objective.loss == "sft":
            return sft.train(session, policy.pop(), strict)
        return _rounds(session, policy.pop(), generations, strict)  # which keeps no second name for it
    except (Preempted, CorruptedFile, Diverged):
        ring.finish_saves(session.ring)
        raise


def _rounds(
    session: Session, policy: PyTree[Array] | None, generations: Path | None, strict: bool
) -> list[dict[str, Any]]:
    config, kept, first = session.config, session.ring, session.first
    store = triplets.open_store(session.journal, session.prompts)
    if generations is not None and (first < max(kept.policies) or recovery.lost_policies(session.journal, first)):
        raise ValueError(
            f"{generations}: something of the run is lost, and is to be made again before another engine's responses "
            "can be taken. Run the same command without --generations until round "
            f"{max([*kept.policies, *recovery.lost_policies(session.journal, first)])} begins."
        )
    for t in range(first, config.rounds if generations is None else min(first + 1, config.rounds)):
        if t + 1 in kept.policies and t in store.generations:  # an earlier round, of which nothing is lost
            ring.finish_saves(kept)
            policy = None
            continue
        policy = policy or ring.restore_policy(kept, t, session.like)
        players, watch = ring.players(kept, t), monitoring.Stopwatch()
        session.say(reporting.manifest(session, t, players))
        session.say(reporting.expected_cost(session, store, players))
        if low := reporting.space(session):
            session.say(low)
        if generations is not None:
            store = take(session, store, generations, t)
        if config.data.responses == "rejected" and t not in store.generations:
            unknown = tuple(np.full(len(tokens), np.nan, np.float32) for tokens in session.prompts.rejected_tokens)
            store = triplets.append(store, Generations(t, session.prompts.rejected_tokens, unknown))
            reporting.save_texts(session, store, t)
        store = sample(session, store, policy, t, watch)
        if t + 1 in kept.policies:  # only its responses were lost
            ring.finish_saves(kept)
            policy = None
            continue
        with watch.time("packing"):
            window = [store.generations[r] for r in config.objective.opponents(t)]
            trees = packing.trees_of_window(session.prompts, window, store.sources)
            rows = packing.pack(trees, config.packing)
        with watch.time("scoring"):
            scored = score(session, store, rows, trees, players, policy, t)
            scores = triplets.team_scores(store, rows, players, config.objective.n_max)
        before = reporting.evaluated(session, policy, watch, " before") if t == 0 else {}
        policy, trained = round_training.train(session, rows, scores, players, policy, t, watch)
        session.profiler.stop()
        trained["evaluated"] = before | reporting.evaluated(session, policy, watch)
        with watch.time("other"):
            wrong = reporting.finish_round(session, store, rows, players, scored, trained, watch, t)
        with watch.time("ring"):
            ring.push(kept, policy, t + 1)
        if strict and wrong:
            raise Diverged(f"{' '.join(wrong)} The run is strict and stops here; theta_{t + 1} is in the ring.")
        files.write_json(triplets.round_directory(session.directory, t) / "timings.json", watch.report())
    ring.finish_saves(kept)
    processes.barrier("all rounds are played")
    table = reporting.rounds_table(session.directory, config.rounds)
    session.say(monitoring.table(table))
    return table


def sample(
    session: Session, store: triplets.Store, policy: PyTree[Array], t: int, watch: monitoring.Stopwatch
) -> triplets.Store:
    """The store with D_t, sampled unless it is there."""
    if t in store.generations:
        session.say(f"Round {t}: the {len(session.prompts)} responses are there.")
        return store
    directory, prompts = triplets.round_directory(session.directory, t), session.prompts
    mine, together = engine.local_share(session.sampler, len(prompts))
    with watch.time("sampling"), monitoring.progress(f"round {t} sampling", len(mine), "response") as bar:
        tokens = 0

        def show(requests: int, new_tokens: int) -> None:
            nonlocal tokens
            tokens += new_tokens
            session.profiler.step("sampling")
            session.notice.check(f"Round {t}: sampling stopped; what is sampled is kept")
            bar.update(requests)
            bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tokens/s", refresh=False)

        path, writes = directory / f"sampled_{jax.process_index():04d}.jsonl", processes.is_main() or not together
        if writes:
            generation_file.resume(path, prompts, session.say)
        processes.barrier("what was sampled before is whole")
        before = generation_file.of_all(sorted(directory.glob("sampled_*.jsonl")), prompts)
        finished = {n: before[i] for n, i in enumerate(mine) if i in before}
        if together:
            processes.check_same({"the responses that were sampled before": str(sorted(finished))})
        bar.update(len(finished))
        with generation_file.appending(path, prompts) as keep:
            made = engine.generate(
                session.sampler,
                policy,
                prompts.take(mine),
                seed=session.config.seed,
                round_number=t,
                stop_fn=session.stop_fn,
                finished=finished,
                on_finished=lambda responses: keep({int(mine[n]): r for n, r in responses.items()}) if writes else None,
                progress=show,
            )
        generations = made if together else engine.gather_from_processes(made, mine, t)
    with watch.time("ring"):  # the policy that sampled must be whole on disk before anything that follows from it
        ring.finish_saves(session.ring)
    with watch.time("other"):
        store = triplets.append(store, generations)
        for sampled in directory.glob("sampled_*.jsonl") if processes.is_main() else ():
            sampled.unlink()
        reporting.save_texts(session, store, t)
    return store


def take(session: Session, store: triplets.Store, path: Path, t: int) -> triplets.Store:
    """The store with another engine's responses as D_t, unless it is there."""
    if t in store.generations:
        return store
    longest, vocabulary = session.config.sampling.max_new_tokens, session.model.vocab_size
    given = generation_file.read(path, session.prompts, session.template, vocabulary, longest, t)
    session.say(
        f"Round {t}: {len(session.prompts)} responses from {path}; {given.retokenised} came as text and were "
        f"tokenised, {given.without_log_probs} came without log-probs."
    )
    store = triplets.append(store, given.generations)
    reporting.save_texts(session, store, t)
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
    the ring, but not on a pod: restoring is something that processes do together, and they must do all such things in
    one order.
    """
    unscored = {player: triplets.missing(store, player, trees) for player in players}
    work, config = cost.NOTHING, session.config.packing
    busy = [player for player in players if unscored[player]]
    for player in sorted(set(players) - set(busy)):
        session.say(f"Round {t}: player {player} has scored everything before.")
    load = lambda player: policy if player == t else ring.restore_policy(session.ring, player, session.like)
    with Prefetch(load, busy, depth=1 if jax.process_count() == 1 else 0) as loaded:
        for player in busy:
            params = next(loaded)
            own = rows if player == t else packing.pack(unscored[player], config)
            total = int((np.asarray(own.batch.segment_ids) > 0).sum())
            with monitoring.progress(f"round {t} player {player} scoring", total, "token") as bar:

                def show(batch: packing.Rows, bar: Any = bar) -> None:
                    session.profiler.step("scoring")
                    session.notice.check(f"Round {t}: scoring stopped; what earlier players have scored is kept")
                    bar.update(int((batch.batch.segment_ids > 0).sum()))

                log_probs = scoring.score(
                    session.scorer, params, own, config.rows_per_batch, config.scoring_batches, progress=show
                )
            del params  # at most this one, the next and the policy are in memory
            triplets.add_scores(store, t, player, own, log_probs)
            work += cost.of_rows(own)
    return work
