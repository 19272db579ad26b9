"""The stages of a round but training, in the order in which the loop runs them.

Sampling and scoring write their results to disk before they return. `push` saves in the background."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PyTree

from tpaw_jax.data import packing, prefix_trees
from tpaw_jax.data.packing import Rows
from tpaw_jax.data.prefix_trees import Trees
from tpaw_jax.generation import engine, generation_file
from tpaw_jax.observe import tables
from tpaw_jax.observe.profiling import Stopwatch
from tpaw_jax.observe.tables import progress
from tpaw_jax.runtime import processes
from tpaw_jax.runtime.host import Prefetch
from tpaw_jax.selfplay import round_store, round_summary
from tpaw_jax.selfplay.plan import RoundPlan
from tpaw_jax.selfplay.round_store import Store
from tpaw_jax.selfplay.session import Round, Session
from tpaw_jax.storage import files, ring
from tpaw_jax.training import cost, scoring
from tpaw_jax.types import Generations, Ragged, TeamScores


def begin(session: Session, store: Store, todo: RoundPlan, startup: float) -> Round:
    """Start a round: print its inputs, its expected cost and, if the disk may fill up, a warning.

    The round's stopwatch counts `startup`, the seconds in which the process got ready for it.
    """
    t = todo.number
    before = {"startup": startup} if startup else {}
    this = Round(session, t, session.config.objective.players(t), Stopwatch(before))
    session.say(round_summary.manifest(this))
    if todo.train:
        session.say(round_summary.expected_cost(this, store))
    if t in store.generations:
        session.say(f"Round {t}: all {len(session.prompts)} responses were sampled before.")
    if warning := round_summary.disk_warning(session):
        session.say(warning)
    return this


def load_policy(this: Round, loaded: dict[int, PyTree[Array]]) -> PyTree[Array]:
    """The round's policy: the one in memory if it is of this round, else restored from the ring."""
    policy = loaded.pop(this.number, None)
    loaded.clear()
    if policy is not None:
        return policy
    with this.watch.time("restoring"):
        return this.session.restore(this.number)


def generate(this: Round, store: Store, policy: PyTree[Array], given: Path | None) -> Store:
    """The store with D_t: sampled from the policy, read from the file `given`, or the records' rejected responses."""
    session = this.session
    if given is not None:
        generations = _read(this, given)
    elif session.config.data.responses == "rejected":
        rejected = session.prompts.rejected_tokens
        unknown = np.full(rejected.lengths.sum(), np.nan, np.float32)
        generations = Generations(this.number, rejected, Ragged.split(unknown, rejected.lengths))
    else:
        generations = _sample(this, policy)
    with this.watch.time("saving"):  # the policy must be on disk before anything that follows from it
        ring.finish_saves(session.ring)
    with this.watch.time("other"):
        store = round_store.append(store, generations)
        if processes.is_main():
            for sampled in this.directory.glob("sampled_*"):
                sampled.unlink(missing_ok=True)
        round_summary.save_texts(session, store, this.number)
    return store


def pack(this: Round, store: Store) -> tuple[Trees, Rows]:
    """D_O as prefix trees, one per prompt, and packed into rows."""
    config = this.session.config
    with this.watch.time("packing"):
        window = [store.generations[r] for r in config.objective.opponents(this.number)]
        trees = prefix_trees.trees_of_window(this.session.prompts, window, store.sources)
        return trees, packing.pack(trees, config.packing)


def score(this: Round, store: Store, trees: Trees, rows: Rows, policy: PyTree[Array]) -> tuple[TeamScores, cost.Work]:
    """The log-probs of all players on `rows`, and the work it took to complete them.

    The newest player scores all of D_O on the round's own rows; the others score only what they have not scored in
    earlier rounds. While one player scores, the next one is restored from the ring, except on a pod: restoring is a
    collective, and collectives must run in the same order on all processes.
    """
    session, t = this.session, this.number
    unscored = {player: round_store.missing(store, player, trees) for player in this.players}
    work, config = cost.NO_WORK, session.config.packing
    busy = [player for player in this.players if len(unscored[player])]
    for player in sorted(set(this.players) - set(busy)):
        session.say(f"Round {t}: player {player} has already scored every response.")
    load = lambda player: policy if player == t else session.restore(player)
    depth = 1 if jax.process_count() == 1 else 0
    with this.watch.time("scoring"), session.profiler.stage("scoring"):
        with Prefetch(load, busy, depth=depth) as loaded:
            for player in busy:
                params = next(loaded)
                own = rows if player == t else packing.pack(unscored[player], config)
                log_probs = _score_rows(this, player, params, own)
                del params  # so that at most this player, the next one and the policy are in memory
                round_store.add_scores(store, t, player, own, log_probs)
                work += cost.work_of_rows(own)
            this.watch.add("restoring", loaded.waited)
        return round_store.team_scores(store, rows, this.players, session.config.objective.n_max), work


def evaluate(this: Round, policy: PyTree[Array], suffix: str = "") -> dict[str, float]:
    """Accuracy per task, under the key `eval/NAME` and the suffix; empty unless `evaluation.each_round` is set."""
    session = this.session
    if session.evaluator is None:
        return {}
    stop = "Evaluation stopped; the training of the round is saved"
    with this.watch.time("evaluation"):
        results = session.evaluator.results(policy, lambda requests, tokens: session.notice.check(stop))
    for result in results:
        session.say(str(result))
    return {f"eval/{result.name}{suffix}": result.accuracy for result in results}


def push(this: Round, policy: PyTree[Array]) -> None:
    """Save the trained policy as the newest checkpoint of the ring; the save continues in the background."""
    with this.watch.time("saving"):
        ring.push(this.session.ring, this.session.trained(policy), this.number + 1)
    files.write_json(this.directory / "timings.json", this.watch.report())


def end(session: Session) -> list[dict[str, Any]]:
    """Wait for the last checkpoint, then print and return the summaries of all rounds."""
    ring.finish_saves(session.ring)
    processes.barrier("all rounds are finished")
    summaries = round_summary.read_all(session.directory, session.config.rounds)
    session.say(tables.round_table(summaries, session.verbose))
    return summaries


def _sample(this: Round, policy: PyTree[Array]) -> Generations:
    """One response per prompt. Finished responses are saved while others are still sampled; a resumed run keeps them.

    Each process samples its share of the prompts, unless devices of several processes share one copy of the model.
    """
    session, prompts = this.session, this.session.prompts
    indices, together = engine.local_share(session.sampler, len(prompts))
    path = this.directory / f"sampled_{jax.process_index():04d}.part"
    saves = processes.is_main() or not together
    with (
        this.watch.time("sampling"),
        session.profiler.stage("sampling"),
        progress(f"round {this.number} sampling", len(indices), "response") as bar,
    ):
        if saves:
            for part in this.directory.glob(f"{path.stem}*.part"):
                generation_file.repair(part, session.say)
        processes.barrier("partial responses are read")
        saved = generation_file.read_partial(sorted(this.directory.glob("sampled_*.part")), prompts, indices)
        finished = {n: saved[i] for n, i in enumerate(indices) if i in saved}
        if together:
            processes.check_same({"the responses that were sampled before": str(sorted(finished))})
        bar.update(len(finished))
        with generation_file.appender(path, prompts) as append:
            sampled = engine.generate(
                session.sampler,
                policy,
                prompts.take(indices),
                seed=session.config.seed,
                round_number=this.number,
                stop_fn=session.stop_fn,
                finished=finished,
                on_finished=lambda new: append({int(indices[n]): r for n, r in new.items()}) if saves else None,
                progress=_sampling_progress(this, bar),
            )
        if together:
            return sampled
        return generation_file.gather_from_processes(sampled, indices, this.number, session.directory)


def _sampling_progress(this: Round, bar: Any) -> Callable[[int, int], None]:
    tokens = 0

    def show(requests: int, new_tokens: int) -> None:
        nonlocal tokens
        tokens += new_tokens
        this.session.profiler.step()
        this.session.notice.check(f"Round {this.number}: sampling stopped; finished responses are saved")
        bar.update(requests)
        bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tokens/s", refresh=False)

    return show


def _read(this: Round, path: Path) -> Generations:
    """Another engine's responses."""
    session, t = this.session, this.number
    longest, vocabulary = session.config.sampling.max_new_tokens, session.model.vocab_size
    given = generation_file.read(path, session.prompts, session.template, vocabulary, longest, t)
    session.say(
        f"Round {t}: read {len(session.prompts)} responses from {path}; {given.retokenized} were text and have been "
        f"tokenized, {given.without_log_probs} had no log-probs."
    )
    return given.generations


def _score_rows(this: Round, player: int, params: PyTree[Array], rows: Rows) -> np.ndarray:
    session, config = this.session, this.session.config.packing
    tokens = lambda rows: int(rows.tokens.sum())
    with progress(f"round {this.number} player {player} scoring", tokens(rows), "token") as bar:

        def show(batch: Rows) -> None:
            session.profiler.step()
            session.notice.check(f"Round {this.number}: scoring stopped; the scores of finished players are saved")
            bar.update(tokens(batch))

        return scoring.score(session.scorer, params, rows, config.rows_per_batch, config.scoring_batches, progress=show)
