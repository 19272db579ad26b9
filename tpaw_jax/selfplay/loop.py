"""The loop of self-play: sample -> pack -> score -> train -> push, round after round.

Sampling, scoring and training write their results to disk. `plan` decides from the journal which stages are left, so a
run that is started again resumes after its last finished stage, and regenerates what was lost or corrupted.
"""

import contextlib
from pathlib import Path
from typing import Any

from jaxtyping import Array, PyTree

from tpaw_jax.config import RunConfig
from tpaw_jax.observe.health import Diverged
from tpaw_jax.runtime import processes
from tpaw_jax.runtime.preemption import Preempted, PreemptionNotice
from tpaw_jax.selfplay import plan, round_store, round_summary, round_training, sft, stages
from tpaw_jax.selfplay.session import Say, Session, open_session
from tpaw_jax.storage import bucket, owner, recovery, ring
from tpaw_jax.storage.files import CorruptedFile
from tpaw_jax.storage.journal import RegeneratedDifferently

MAX_CORRUPTED_FILES = 20
"""Corrupted files after which a run stops: the storage cannot be trusted."""


def play(
    config: RunConfig,
    say: Say = print,
    generations: Path | None = None,
    *,
    profiled: range = range(0),
    notice: PreemptionNotice | None = None,
    strict: bool = False,
    verbose: bool = False,
) -> list[dict[str, Any]]:
    """Play all rounds that are left, and return their summaries.

    Args:
        config: the run.
        say: prints the progress, a text at a time.
        generations: a file of another engine's responses; the run plays the round they answer, then stops.
        profiled: the steps of each stage to trace.
        notice: asks the run to stop.
        strict: stop at the end of a round that shows a sign of divergence.
        verbose: print every metric of a round, not only the main ones.

    Raises:
        FileNotFoundError, ValueError: the model, data, generations or configuration cannot be used.
        FloatingPointError: too many consecutive steps had a non-finite loss or gradient; the last batch is saved.
        Preempted: `notice` asked the run to stop; everything finished is on disk.
        Diverged: the run is strict, and the last round shows a sign of divergence (`health.warnings`).
        CorruptedFile: file after file reads back corrupted.
    """
    directory, notice = bucket.open_path(config.directory), notice or PreemptionNotice()
    say = say if processes.is_main() else lambda text: None
    corrupted_files = 0
    remote = bucket.is_remote(directory)
    explained = bucket.explain_errors(directory, bucket.is_of_request) if remote else contextlib.nullcontext()
    own = owner.owned(directory, say) if processes.is_main() else contextlib.nullcontext(owner.Owner())
    with explained, own as proof:
        processes.barrier("the directory is owned")
        while True:
            try:
                return _play_session(*open_session(config, say, profiled, notice, verbose), generations, strict)
            except CorruptedFile as corrupted:
                corrupted_files += 1
                outside = bucket.absolute(directory) not in bucket.absolute(corrupted.path).parents
                if outside or corrupted_files >= MAX_CORRUPTED_FILES:
                    raise
                proof.check()
                recovery.quarantine(directory, corrupted, say)
            except RegeneratedDifferently as change:
                proof.check()
                say(str(change))


def _play_session(
    session: Session, loaded: dict[int, PyTree[Array]], generations: Path | None, strict: bool
) -> list[dict[str, Any]]:
    try:
        if session.config.objective.loss == "sft":
            return sft.train(session, loaded, strict)
        return play_rounds(session, loaded, generations, strict)
    except (Preempted, CorruptedFile, Diverged):
        with contextlib.suppress(RegeneratedDifferently):  # the next start reads it from the journal
            ring.finish_saves(session.ring)
        raise
    finally:
        for tracker in session.trackers:
            tracker.close()


def play_rounds(
    session: Session, loaded: dict[int, PyTree[Array]], generations: Path | None, strict: bool
) -> list[dict[str, Any]]:
    """Play the rounds that are left.

    `loaded` is {round: policy} for the one policy in memory, or empty. Being a dict, it lets a round take the policy
    without leaving a reference in the callers, whose memory would never be freed.
    """
    store, startup = round_store.open_store(session.journal, session.prompts), session.startup
    for todo in plan.rounds_to_play(session.ring, store, session.first, session.config.rounds, generations):
        t = todo.number
        this = stages.begin(session, store, todo, startup)
        policy = stages.load_policy(this, loaded)
        if todo.generate:
            store = stages.generate(this, store, policy, generations)
        if todo.train:
            trees, rows = stages.pack(this, store)
            scores, scoring_work = stages.score(this, store, trees, rows, policy)
            evaluated = stages.evaluate(this, policy, " before") if t == 0 else {}
            policy, trained = round_training.train(this, rows, scores, policy)
            evaluated |= stages.evaluate(this, policy)
            warnings = round_summary.finish(this, store, rows, scoring_work, trained, evaluated)
            stages.push(this, policy)
            if strict and warnings:
                raise Diverged(f"{' '.join(warnings)} The run is strict and stops here; theta_{t + 1} is in the ring.")
            loaded[t + 1], startup = policy, 0.0
        del policy  # before the next round's is restored: two may not fit into memory
    return stages.end(session)
