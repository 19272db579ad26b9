"""The responses of all rounds and every player's scores of them, in memory and on disk.

A frozen player's log-prob of a response never changes, so each player scores each response once. Each stage writes one
file atomically: `round_0002/generations.npz`, `round_0002/scores_of_player_0001.npz`. A file that the journal does not
list is ignored.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tpaw_jax.data.packing import Rows
from tpaw_jax.data.prefix_trees import NONE, Trees, first_sources
from tpaw_jax.runtime import processes
from tpaw_jax.storage import array_files, journal
from tpaw_jax.storage.journal import Journal
from tpaw_jax.types import NOTHING, TARGET, Generations, Prompts, Ragged, TeamScores


@dataclasses.dataclass(frozen=True)
class Store:
    """The results of the rounds so far. `scores[player][source]` is [prompts] nats, NaN where not scored yet.

    The sampler's log-probs of responses stay on disk (`sampler_log_probs`): only summaries read them. `add_scores`
    fills `scores` in place; `append` returns a new store.
    """

    journal: Journal
    prompts: Prompts
    generations: dict[int, Generations]
    sources: dict[int, np.ndarray]  # the source that first gave each prompt's response of a round
    scores: dict[int, dict[int, np.ndarray]]

    def copies_of_target(self, round_number: int) -> int:
        """How many responses of a round equal their target: many mean that the policy reproduces its data."""
        return int((self.sources[round_number] == TARGET).sum())


def open_store(opened: Journal, prompts: Prompts) -> Store:
    """The store of a run, with every file that its journal lists as complete.

    Raises:
        CorruptedFile: a file cannot be read.
        ValueError: a file belongs to other prompts.
    """
    generations = {}
    for name in opened.names("sampling"):
        found = _read_generations(opened.directory / name, prompts)
        generations[found.round] = found
    sources = first_sources(prompts, list(generations.values()))
    store = Store(opened, prompts, generations, sources, {})
    for name in opened.names("scoring"):
        arrays = array_files.read(opened.directory / name)
        _merge(store, player_of(Path(name)), arrays["prompt_index"], arrays["source"], arrays["log_probs"])
    return store


def append(store: Store, generations: Generations) -> Store:
    """The store with a round's responses, which are on disk when it returns.

    Raises:
        RegeneratedDifferently: they were lost, and differ from what they were.
    """
    arrays: dict[str, np.ndarray] = {}
    same = hashlib.sha256()
    if processes.is_main():
        arrays = {
            "round": np.asarray(generations.round, np.int32),
            "prompt_ids": store.prompts.ids,
            "lengths": generations.tokens.lengths,
            "tokens": generations.tokens.flat(),
            "log_probs": generations.log_probs.flat(),
        }
        same.update(arrays["lengths"])
        same.update(arrays["tokens"])
    name = generations_name(generations.round)
    journal.write(store.journal, name, "sampling", generations.round, arrays, same.hexdigest())
    kept = Generations(generations.round, generations.tokens, NOTHING)
    together = {**store.generations, generations.round: kept}
    before = {r: sources for r, sources in store.sources.items() if r < generations.round}
    sources = first_sources(store.prompts, list(together.values()), before)
    return dataclasses.replace(store, generations=together, sources=sources)


def sampler_log_probs(store: Store, round_number: int) -> Ragged:
    """The log-probs of each token of a round's responses under the policy that sampled them, in nats, from disk.

    Raises:
        CorruptedFile: the file cannot be read.
    """
    arrays = array_files.read(store.journal.directory / generations_name(round_number), "lengths", "log_probs")
    return Ragged.split(arrays["log_probs"], arrays["lengths"])


def missing(store: Store, player: int, trees: Trees) -> Trees:
    """The responses that `player` has not scored yet, as trees."""
    unscored = np.zeros(trees.distinct.shape, bool)
    for source in np.unique(trees.distinct).tolist():
        if source != NONE:
            of_prompt = np.isnan(_column(store, player, source))
            unscored |= (trees.distinct == source) & of_prompt[trees.prompt][:, None]
    return trees.only(unscored)


def add_scores(store: Store, round_number: int, player: int, rows: Rows, log_probs: np.ndarray) -> None:
    """Store the log-probs that `player` gave the responses of `rows`; they are on disk when it returns."""
    real, name = rows.prompt_index >= 0, scores_name(round_number, player)
    found = {
        "prompt_index": rows.prompt_index[real],
        "source": rows.source[real],
        "log_probs": log_probs[real].astype(np.float32),
    }
    _merge(store, player, **found)
    if store.journal.is_complete(name):  # some scores of this file were lost and have just been recomputed
        before = array_files.read(store.journal.directory / name)
        found = {key: np.concatenate([before[key], values]) for key, values in found.items()}
    journal.write(store.journal, name, "scoring", round_number, found)


def team_scores(store: Store, rows: Rows, players: Sequence[int], n_max: int) -> TeamScores:
    """The log-probs of `players`, newest first, on `rows`: [n_max, rows, R] nats, missing players masked.

    Raises:
        ValueError: a score is missing or not finite.
    """
    log_probs = np.zeros((n_max, *rows.prompt_index.shape), np.float32)
    real = rows.prompt_index >= 0
    for j, player in enumerate(players):
        for source in np.unique(rows.source[real]):
            here = real & (rows.source == source)
            log_probs[j][here] = _column(store, player, int(source))[rows.prompt_index[here]]
        if not np.isfinite(log_probs[j]).all():
            row, response = np.argwhere(~np.isfinite(log_probs[j]))[0]
            prompt, source = rows.prompt_index[row, response], rows.source[row, response]
            raise ValueError(
                f"{store.journal.directory}: player {player} has no finite score for prompt {prompt}, "
                f"{'the target' if source == TARGET else f'the response of round {source}'}."
            )
    return TeamScores(log_probs, np.arange(n_max) < len(players))


def round_directory(directory: Path, round_number: int) -> Path:
    """The directory of a round's files."""
    return directory / round_name(round_number)


def round_name(round_number: int) -> str:
    """The name of a round's directory."""
    return f"round_{round_number:04d}"


def generations_name(round_number: int) -> str:
    """The name of a round's responses in the journal."""
    return f"{round_name(round_number)}/generations.npz"


def scores_name(round_number: int, player: int) -> str:
    """The name of the scores that `player` computed in a round, in the journal."""
    return f"{round_name(round_number)}/scores_of_player_{player:04d}.npz"


def player_of(path: Path) -> int:
    """The player of a file of scores."""
    return int(path.stem.removeprefix("scores_of_player_"))


def _column(store: Store, player: int, source: int) -> np.ndarray:
    of_player = store.scores.setdefault(player, {})
    if source not in of_player:
        of_player[source] = np.full(len(store.prompts), np.nan, np.float32)
    return of_player[source]


def _merge(store: Store, player: int, prompt_index: np.ndarray, source: np.ndarray, log_probs: np.ndarray) -> None:
    for one in np.unique(source):
        here = source == one
        _column(store, player, int(one))[prompt_index[here]] = log_probs[here]


def _read_generations(path: Path, prompts: Prompts) -> Generations:
    arrays = array_files.read(path, "prompt_ids", "lengths", "tokens", "round")
    if not np.array_equal(arrays["prompt_ids"], prompts.ids):
        raise ValueError(
            f"{path}: its {len(arrays['prompt_ids'])} responses answer other prompts than the {len(prompts)} of this "
            "configuration. Restore the data and the seed with which the run began, or choose another directory."
        )
    tokens = Ragged.split(arrays["tokens"], arrays["lengths"])
    return Generations(int(arrays["round"]), tokens, NOTHING)
