"""Prompts with their responses -> rows of prefix trees `[x | y | g ...]` in one fixed shape.

All triplets of a prompt share x and y, so a tree computes them once. Responses that are equal token for token are one
response, counted by multiplicity. Trees are put into rows first-fit-decreasing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from tpaw_jax.config import PackingConfig
from tpaw_jax.types import TARGET, Generations, Prompts, TeamScores, TreeBatch


@dataclasses.dataclass(frozen=True)
class Tree:
    """One prompt, the distinct responses to it, and the triplets among them."""

    prompt: int  # index into Prompts
    prompt_tokens: np.ndarray
    sources: tuple[int, ...]  # TARGET or the round that first sampled the response, one a response
    responses: tuple[np.ndarray, ...]
    triplets: tuple[tuple[int, int, int], ...]  # (response that is y, response that is y_gen, multiplicity)

    def places(self, alignment: int = 1) -> int:
        """Places that the tree takes in a row: the last token of a response is a label only.

        Prompt and responses take a multiple of `alignment` places each.
        """
        return sum(_aligned(n, alignment) for n in (len(self.prompt_tokens), *(len(r) - 1 for r in self.responses)))

    @property
    def predictions(self) -> int:
        """Tokens that are predicted."""
        return sum(len(r) for r in self.responses)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Packed rows on the host, and which (prompt, source) each response of a row is."""

    batch: TreeBatch  # numpy arrays with a leading axis over rows
    prompt_index: np.ndarray  # [rows, R] int32, -1 is padding
    source: np.ndarray  # [rows, R] int32

    def __len__(self) -> int:
        return len(self.prompt_index)

    @property
    def triplets(self) -> np.ndarray:
        """Triplets of each row, multiplicity counted, [rows]."""
        return np.asarray(self.batch.triplet_weight).sum(axis=-1)

    @property
    def fill(self) -> float:
        """Share of token places that hold a token."""
        return float((np.asarray(self.batch.segment_ids) > 0).mean()) if len(self) else 0.0


def first_sources(prompts: Prompts, generations: Sequence[Generations]) -> dict[int, np.ndarray]:
    """For every round, the source that first gave each prompt's response: TARGET, an earlier round, or itself.

    Equal responses share a source, so that each is computed and scored once.
    """
    seen = [{target.tobytes(): TARGET} for target in prompts.target_tokens]
    return {
        g.round: np.array(
            [seen[i].setdefault(tokens.tobytes(), g.round) for i, tokens in enumerate(g.tokens)], np.int32
        )
        for g in sorted(generations, key=lambda g: g.round)
    }


def trees_of_window(prompts: Prompts, window: Sequence[Generations], sources: dict[int, np.ndarray]) -> list[Tree]:
    """D_O as trees: the triplets of the rounds in `window`, one tree a prompt."""
    trees = []
    for i in range(len(prompts)):
        counts: dict[int, int] = {}
        tokens = {TARGET: prompts.target_tokens[i]}
        for generations in window:
            source = int(sources[generations.round][i])
            counts[source] = counts.get(source, 0) + 1
            tokens[source] = generations.tokens[i]
        order = tuple(tokens)
        triplets = tuple((0, order.index(source), n) for source, n in counts.items())
        trees.append(Tree(i, prompts.prompt_tokens[i], order, tuple(tokens.values()), triplets))
    return trees


def tree_of_responses(prompts: Prompts, prompt: int, responses: dict[int, np.ndarray]) -> Tree:
    """A tree without triplets, for scoring alone: `responses` by source."""
    return Tree(prompt, prompts.prompt_tokens[prompt], tuple(responses), tuple(responses.values()), ())


def pack(trees: Sequence[Tree], config: PackingConfig) -> Rows:
    """Trees into rows of `row_length` tokens and at most `max_responses_per_row` responses, first-fit-decreasing.

    A tree that is longer than a row is split into several that repeat x and y.

    Raises:
        ValueError: x, y and one generation together exceed a row; names the prompt and the lengths.
    """
    return _rows(_grouped(trees, config), config)


def check_rows(config: PackingConfig, shards: int, alignment: int) -> None:
    """Check that rows can be split over `shards` devices and be computed where attention wants `alignment`.

    Raises:
        ValueError: they cannot; names the key.
    """
    if config.alignment % alignment:
        raise ValueError(
            f"packing.alignment is {config.alignment}; rows of {config.row_length} tokens need a multiple of "
            f"{alignment} on TPU."
        )
    if config.rows_per_batch % shards:
        raise ValueError(
            f"packing.rows_per_batch is {config.rows_per_batch}; it must be a multiple of the {shards} devices that "
            "rows are split over."
        )


def row_count(trees: Sequence[Tree], config: PackingConfig) -> int:
    """The rows that `pack` makes of `trees`, without making them."""
    return len(_grouped(trees, config))


def _grouped(trees: Sequence[Tree], config: PackingConfig) -> list[list[Tree]]:
    """The trees of each row."""
    pieces = [piece for tree in trees for piece in _split(tree, config)]
    places = [piece.places(config.alignment) for piece in pieces]
    order = sorted(range(len(pieces)), key=lambda i: (-places[i], i))
    # A row has as many places for predictions as for tokens; the third capacity is its number of responses.
    needs = np.array([[n, t.predictions, len(t.responses)] for n, t in zip(places, pieces, strict=True)], int).reshape(
        -1, 3
    )
    free = np.empty((len(pieces), 3), int)
    free[:] = config.row_length, config.row_length, config.max_responses_per_row
    members: list[list[Tree]] = []
    for i in order:
        row = int(np.argmax((free[: len(members) + 1] >= needs[i]).all(axis=1)))
        if row == len(members):
            members.append([])
        members[row].append(pieces[i])
        free[row] -= needs[i]
    return members


def fullest_row_length(trees: Sequence[Tree], config: PackingConfig, lengths: Sequence[int]) -> int:
    """The row length of `lengths` whose rows take the fewest tokens; the shortest of equal ones.

    For a set of trees that will not change. Where each round brings others, long rows are full whatever comes.

    Raises:
        ValueError: none of them holds every tree.
    """
    longest = max(tree.places(config.alignment) for tree in trees)
    fitting = [length for length in sorted(lengths) if length >= longest]
    if not fitting:
        raise ValueError(f"The longest tree has {longest} tokens; none of the row lengths {list(lengths)} holds it.")
    slots = lambda length: length * row_count(trees, dataclasses.replace(config, row_length=length))
    return min(fitting, key=slots)


def empty_like(rows: Rows, count: int) -> Rows:
    """`count` rows of padding in the shape of `rows`."""
    shape = lambda x: np.zeros((count, *x.shape[1:]), x.dtype)
    batch = jax.tree.map(shape, rows.batch)
    batch = batch.replace(responses=np.full_like(batch.responses, rows.prompt_index.shape[1]))
    return Rows(batch, np.full_like(shape(rows.prompt_index), -1), shape(rows.source))


def take(rows: Rows, indices: np.ndarray, size: int) -> Rows:
    """The rows at `indices` as a batch of `size` rows, filled up with padding rows."""
    return _fill(_take(rows, indices), size)


def micro_batches_a_step(rows: Rows, batch_triplets: int, rows_per_batch: int) -> int:
    """Full micro-batches whose triplets come closest to `batch_triplets`, at least one."""
    return micro_batches_of(float(rows.triplets.mean()), batch_triplets, rows_per_batch)


def micro_batches_of(triplets_a_row: float, batch_triplets: int, rows_per_batch: int) -> int:
    """The same of rows with so many triplets on average."""
    return max(1, round(batch_triplets / (max(triplets_a_row, 1.0) * rows_per_batch)))


def most_micro_batches(batch_triplets: int, longest_triplet: int, config: PackingConfig) -> int:
    """Micro-batches that a step has room for: those that `micro_batches_a_step` asks for where rows hold the least.

    First-fit leaves rows half full or fuller, all but one of them, so a row of many holds `row_length` / (2
    `longest_triplet`) triplets, x, y and y_gen of `longest_triplet` tokens each, or half of the responses it may.
    """
    least = min(config.row_length / longest_triplet, config.max_responses_per_row / 2) / 2
    return max(1, round(batch_triplets / (max(1.0, least) * config.rows_per_batch)))


def epoch_order(rows: Rows, seed: int, round_number: int, epoch: int) -> np.ndarray:
    """The order in which an epoch visits the rows; a function of its arguments alone."""
    return np.random.default_rng((seed, round_number, epoch)).permutation(len(rows))


def step_batch(
    rows: Rows, scores: TeamScores, indices: np.ndarray, rows_per_batch: int, most_micro_batches: int
) -> tuple[TreeBatch, TeamScores, np.int32]:
    """The rows of one step as micro-batches [A, B, ...] with scores [A, J, B, R], and how many of the A are used."""
    used = -(-len(indices) // rows_per_batch)
    total = most_micro_batches * rows_per_batch
    batch = _fill(_take(rows, indices), total).batch
    split = lambda x: x.reshape(most_micro_batches, rows_per_batch, *x.shape[1:])
    players, _, responses = scores.log_probs.shape
    padded = np.zeros((players, total, responses), np.float32)
    padded[:, : len(indices)] = scores.log_probs[:, indices]
    log_probs = np.moveaxis(padded.reshape(players, most_micro_batches, rows_per_batch, responses), 0, 1)
    mask = np.broadcast_to(scores.player_mask, (most_micro_batches, len(scores.player_mask)))
    return jax.tree.map(split, batch), TeamScores(log_probs, mask), np.int32(used)


def empty_step(config: PackingConfig, players: int, micro_batches: int) -> tuple[TreeBatch, TeamScores, np.int32]:
    """What `step_batch` gives for no rows at all: the shapes of a step."""
    rows = pack([], config)
    scores = TeamScores(np.zeros((players, *rows.prompt_index.shape), np.float32), np.ones(players, bool))
    return step_batch(rows, scores, np.arange(0), config.rows_per_batch, micro_batches)


def _take(rows: Rows, indices: np.ndarray) -> Rows:
    batch = jax.tree.map(lambda x: x[indices], rows.batch)
    return Rows(batch, rows.prompt_index[indices], rows.source[indices])


def _fill(rows: Rows, size: int) -> Rows:
    if len(rows) == size:
        return rows
    padding = empty_like(rows, size - len(rows))
    both = lambda a, b: np.concatenate([a, b])
    batch = jax.tree.map(both, rows.batch, padding.batch)
    return Rows(batch, both(rows.prompt_index, padding.prompt_index), both(rows.source, padding.source))


def _split(tree: Tree, config: PackingConfig) -> list[Tree]:
    """The tree itself, or trees of as many generations as fit a row, each with x and y."""
    if _fits(tree, config):
        return [tree]
    parts: list[Tree] = []
    if not tree.triplets:
        parts = [_subtree(tree, [k], ()) for k in range(len(tree.responses))]
    held: list[tuple[int, int, int]] = []
    for triplet in tree.triplets:
        if held and not _fits(_with_triplets(tree, [*held, triplet]), config):
            parts.append(_with_triplets(tree, held))
            held = []
        held.append(triplet)
    if held:
        parts.append(_with_triplets(tree, held))
    for part in parts:
        if not _fits(part, config):
            raise ValueError(
                f"Prompt {tree.prompt}: {len(part.prompt_tokens)} prompt tokens with responses of "
                f"{', '.join(str(len(r)) for r in part.responses)} tokens exceed a row of {config.row_length} tokens "
                f"and {config.max_responses_per_row} responses; raise packing.row_length or lower the length limits."
            )
    return parts


def _with_triplets(tree: Tree, triplets: Sequence[tuple[int, int, int]]) -> Tree:
    keep = list(dict.fromkeys(r for target, generated, _ in triplets for r in (target, generated)))
    renumbered = tuple((keep.index(t), keep.index(g), n) for t, g, n in triplets)
    return _subtree(tree, keep, renumbered)


def _subtree(tree: Tree, keep: Sequence[int], triplets: tuple[tuple[int, int, int], ...]) -> Tree:
    kept = tuple(tree.sources[k] for k in keep), tuple(tree.responses[k] for k in keep)
    return Tree(tree.prompt, tree.prompt_tokens, *kept, triplets)


def _fits(tree: Tree, config: PackingConfig) -> bool:
    long = max(tree.places(config.alignment), tree.predictions) > config.row_length
    return not long and len(tree.responses) <= config.max_responses_per_row


def _rows(members: Sequence[Sequence[Tree]], config: PackingConfig) -> Rows:
    count, length, most = len(members), config.row_length, config.max_responses_per_row
    ints = lambda n, value=0: np.full((count, n), value, np.int32)
    batch = TreeBatch(
        tokens=ints(length),
        positions=ints(length),
        segment_ids=ints(length),
        branch_ids=ints(length),
        sources=ints(length),
        labels=ints(length),
        responses=ints(length, most),
        triplet_target=ints(most),
        triplet_generated=ints(most),
        triplet_weight=np.zeros((count, most), np.float32),
    )
    rows = Rows(batch, ints(most, -1), ints(most))
    for row, trees in enumerate(members):
        _write_row(rows, row, trees, config.alignment)
    return rows


def _write_row(rows: Rows, row: int, trees: Sequence[Tree], alignment: int) -> None:
    """Lay the trees of one row out, one after the other, into the arrays of `rows`."""
    b = jax.tree.map(lambda x: x[row], rows.batch)  # views
    token, prediction, response, triplet = 0, 0, 0, 0
    for segment, tree in enumerate(trees, start=1):
        first_response, prompt_length = response, len(tree.prompt_tokens)
        trunk = slice(token, token + prompt_length)
        b.tokens[trunk] = tree.prompt_tokens
        b.positions[trunk] = np.arange(prompt_length)
        b.segment_ids[trunk] = segment
        last_of_prompt = token + prompt_length - 1
        token += _aligned(prompt_length, alignment)
        for branch, tokens in enumerate(tree.responses, start=1):
            read = len(tokens) - 1
            place = slice(token, token + read)
            b.tokens[place] = tokens[:-1]
            b.positions[place] = prompt_length + np.arange(read)
            b.segment_ids[place] = segment
            b.branch_ids[place] = branch
            predicted = slice(prediction, prediction + len(tokens))
            b.sources[predicted] = np.concatenate([[last_of_prompt], np.arange(token, token + read)])
            b.labels[predicted] = tokens
            b.responses[predicted] = response
            rows.prompt_index[row, response] = tree.prompt
            rows.source[row, response] = tree.sources[branch - 1]
            token += _aligned(read, alignment)
            prediction, response = prediction + len(tokens), response + 1
        for target, generated, weight in tree.triplets:
            b.triplet_target[triplet] = first_response + target
            b.triplet_generated[triplet] = first_response + generated
            b.triplet_weight[triplet] = weight
            triplet += 1


def _aligned(places: int, alignment: int) -> int:
    return -(-places // max(1, alignment)) * max(1, alignment)
