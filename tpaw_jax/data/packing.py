"""Pack prefix trees into rows of fixed shape: `[x | y | g ...]`, or the turns of a conversation on one trunk.

Segments are assigned to rows by first-fit-decreasing bin packing.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np

from tpaw_jax.config import PackingConfig
from tpaw_jax.data.prefix_trees import Segment, Tree, segments_of
from tpaw_jax.types import TeamScores, TreeBatch


@dataclasses.dataclass(frozen=True)
class Rows:
    """Packed rows on the host, with the prompt and source of each response."""

    batch: TreeBatch  # numpy arrays, rows on the leading axis
    prompt_index: np.ndarray  # [rows, R] int32, -1 is padding
    source: np.ndarray  # [rows, R] int32

    def __len__(self) -> int:
        return len(self.prompt_index)

    @property
    def triplets(self) -> np.ndarray:
        """Number of triplets in each row, counted with multiplicity, [rows]."""
        return np.asarray(self.batch.triplet_weight).sum(axis=-1)

    @property
    def fill(self) -> float:
        """Fraction of the rows' tokens that are not padding."""
        return float((np.asarray(self.batch.segment_ids) > 0).mean()) if len(self) else 0.0


def pack(trees: Sequence[Tree], config: PackingConfig) -> Rows:
    """Pack trees into rows of `row_length` tokens and at most `max_responses_per_row` responses.

    Trees are joined and split first, see `segments_of`. A `rows_per_batch` of 0 (automatic) counts as 1 throughout
    this module.

    Raises:
        ValueError: x, y and one generation do not fit into a row. Names the prompt and the lengths.
    """
    return _write_rows(_assign_to_rows(trees, config), config)


def check_rows(row_length: int, rows_per_batch: int, shards: int, multiple: int) -> None:
    """Check that batches split evenly over `shards` devices, whose rows need a `multiple` of tokens.

    Raises:
        ValueError: they do not. Names the configuration key.
    """
    if rows_per_batch % shards:
        raise ValueError(
            f"packing.rows_per_batch is {rows_per_batch}; it must be a multiple of the {shards} devices that rows are "
            "split over. A resumed run keeps its value: use a number of devices that divides it."
        )
    if row_length % multiple:
        raise ValueError(f"packing.row_length is {row_length}; attention on TPU needs a multiple of {multiple}.")


def row_count(trees: Sequence[Tree], config: PackingConfig) -> int:
    """Count the rows that `pack` would produce, without building them."""
    return len(_assign_to_rows(trees, config))


def _assign_to_rows(trees: Sequence[Tree], config: PackingConfig) -> list[list[Segment]]:
    """The segments of each row, by first-fit-decreasing over (tokens, predictions, responses)."""
    segments = segments_of(trees, config)
    needs = np.array([(s.length, s.predictions, s.responses) for s in segments], int)
    needs = needs.reshape(-1, 3)
    order = np.argsort(-needs[:, 0], kind="stable")
    free = np.empty((len(segments), 3), int)
    free[:] = config.row_length, config.row_length, config.max_responses_per_row
    members: list[list[Segment]] = []
    for i in order:
        row = int(np.argmax((free[: len(members) + 1] >= needs[i]).all(axis=1)))
        if row == len(members):
            members.append([])
        members[row].append(segments[i])
        free[row] -= needs[i]
    return members


def empty_like(rows: Rows, count: int) -> Rows:
    """Build `count` padding rows with the shapes of `rows`."""
    shape = lambda x: np.zeros((count, *x.shape[1:]), x.dtype)
    batch = jax.tree.map(shape, rows.batch)
    batch = batch.replace(response_ids=np.full_like(batch.response_ids, rows.prompt_index.shape[1]))
    return Rows(batch, np.full_like(shape(rows.prompt_index), -1), shape(rows.source))


def take(rows: Rows, indices: np.ndarray, size: int) -> Rows:
    """Select the rows at `indices` as a batch of `size` rows, padded with empty rows at the end."""
    return _pad(_select(rows, indices), size)


BatchTriplets = int | Literal["auto"]
"""`train.batch_triplets`: the triplets of a step, or as many as one batch of rows has."""


def rows_per_step(triplets_per_row: float, batch_triplets: BatchTriplets, config: PackingConfig, most: int) -> int:
    """Choose the rows of a step, at least one, so that it has about `batch_triplets` triplets.

    Args:
        triplets_per_row: the mean over the rows of a round.
        batch_triplets: triplets wanted; with auto, the step is one batch of rows.
        config: the shape of rows and batches.
        most: the micro-batches that a step has room for.
    """
    if batch_triplets == "auto":
        return max(1, config.rows_per_batch)
    return min(most * max(1, config.rows_per_batch), max(1, round(batch_triplets / max(triplets_per_row, 1.0))))


def most_micro_batches(batch_triplets: BatchTriplets, longest_triplet: int, config: PackingConfig) -> int:
    """Return the micro-batches that a step has room for, which fixes its shape: enough for almost any data.

    A full row holds at least `row_length / longest_triplet` triplets, or `max_responses_per_row / 2` if that is less.
    First-fit leaves at most one row less than half full, so the mean is at least half of that. `longest_triplet` is the
    largest number of tokens that x, y and y_gen can have together.
    """
    if batch_triplets == "auto":
        return 1
    fewest = max(1.0, min(config.row_length / longest_triplet, config.max_responses_per_row / 2) / 2)
    return max(1, round(batch_triplets / (fewest * max(1, config.rows_per_batch))))


def epoch_order(rows: Rows, seed: int, round_number: int, epoch: int) -> np.ndarray:
    """Return the order in which an epoch visits the rows. It depends only on the arguments."""
    return np.random.default_rng((seed, round_number, epoch)).permutation(len(rows))


def step_batch(
    rows: Rows, scores: TeamScores, indices: np.ndarray, rows_per_batch: int, most_micro_batches: int
) -> tuple[TreeBatch, TeamScores, np.int32]:
    """Build the inputs of one train step from the rows at `indices`.

    Args:
        rows: all rows of the round.
        scores: their scores, log-probs [J, rows, R] and mask [J].
        indices: the rows of the step.
        rows_per_batch: rows B of a micro-batch.
        most_micro_batches: micro-batches A of the step's fixed shape.

    Returns:
        The batch [A, B, ...], its scores (log-probs [A, J, B, R], mask [A, J]), and how many of the A micro-batches
        contain rows.
    """
    rows_per_batch = max(1, rows_per_batch)
    used = -(-len(indices) // rows_per_batch)
    total = most_micro_batches * rows_per_batch
    batch = _pad(_select(rows, indices), total).batch
    split = lambda x: x.reshape(most_micro_batches, rows_per_batch, *x.shape[1:])
    players, _, responses = scores.log_probs.shape
    padded = np.zeros((players, total, responses), np.float32)
    padded[:, : len(indices)] = scores.log_probs[:, indices]
    log_probs = np.moveaxis(padded.reshape(players, most_micro_batches, rows_per_batch, responses), 0, 1)
    mask = np.broadcast_to(scores.player_mask, (most_micro_batches, len(scores.player_mask)))
    return jax.tree.map(split, batch), TeamScores(log_probs, mask), np.int32(used)


def empty_step(config: PackingConfig, players: int, micro_batches: int) -> tuple[TreeBatch, TeamScores, np.int32]:
    """Build step inputs without any rows, as `step_batch` would: they have a step's shapes and dtypes."""
    rows = pack([], config)
    scores = TeamScores(np.zeros((players, *rows.prompt_index.shape), np.float32), np.ones(players, bool))
    return step_batch(rows, scores, np.arange(0), config.rows_per_batch, micro_batches)


def _select(rows: Rows, indices: np.ndarray) -> Rows:
    batch = jax.tree.map(lambda x: x[indices], rows.batch)
    return Rows(batch, rows.prompt_index[indices], rows.source[indices])


def _pad(rows: Rows, size: int) -> Rows:
    if len(rows) == size:
        return rows
    padding = empty_like(rows, size - len(rows))
    both = lambda a, b: np.concatenate([a, b])
    batch = jax.tree.map(both, rows.batch, padding.batch)
    return Rows(batch, both(rows.prompt_index, padding.prompt_index), both(rows.source, padding.source))


def _write_rows(members: Sequence[Sequence[Segment]], config: PackingConfig) -> Rows:
    count, length, most = len(members), config.row_length, config.max_responses_per_row
    ints = lambda n, value=0: np.full((count, n), value, np.int32)
    batch = TreeBatch(
        tokens=ints(length),
        positions=ints(length),
        segment_ids=ints(length),
        branch_ids=ints(length),
        prompt_end=ints(length),
        hidden_index=ints(length),
        labels=ints(length),
        response_ids=ints(length, most),
        triplet_target=ints(most),
        triplet_generated=ints(most),
        triplet_weight=np.zeros((count, most), np.float32),
    )
    rows = Rows(batch, ints(most, -1), ints(most))
    for row, segments in enumerate(members):
        writer = _RowWriter(rows, row)
        for segment in segments:
            writer.write(segment)
    return rows


class _RowWriter:
    """Writes segments into one row of `rows`, one after the other."""

    def __init__(self, rows: Rows, row: int):
        self.batch = jax.tree.map(lambda x: x[row], rows.batch)  # views, so that writing to them changes `rows`
        self.prompt_index, self.source = rows.prompt_index[row], rows.source[row]
        self.segment, self.token, self.prediction, self.response, self.triplet = 0, 0, 0, 0, 0

    def write(self, segment: Segment) -> None:
        """Write the tokens of a segment, then what its trees predict."""
        self.segment += 1
        trunk = self._tokens(segment.trunk, 0)  # the places of the trunk's tokens in the row
        written = []
        for number, (fork, tokens) in enumerate(segment.branches(), start=1):
            branch = self._tokens(tokens, fork, number, trunk[fork - 1] + 1)
            written.append(np.concatenate([trunk[:fork], branch]) if len(branch) else trunk)
        for tree in segment.trees:
            first = self.response
            for source, response in zip(tree.sources, tree.responses, strict=True):
                self._predictions(tree, source, response, written[0])
                written = written[1:]
            for target, generated, weight in tree.triplets:
                self.batch.triplet_target[self.triplet] = first + target
                self.batch.triplet_generated[self.triplet] = first + generated
                self.batch.triplet_weight[self.triplet] = weight
                self.triplet += 1

    def _tokens(self, tokens: np.ndarray, position: int, branch: int = 0, prompt_end: int = 0) -> np.ndarray:
        """Write tokens, the first of them at `position` of its sequence; return their places in the row."""
        span = slice(self.token, self.token + len(tokens))
        self.batch.tokens[span] = tokens
        self.batch.positions[span] = np.arange(position, position + len(tokens))
        self.batch.segment_ids[span] = self.segment
        self.batch.branch_ids[span] = branch
        self.batch.prompt_end[span] = prompt_end
        self.token += len(tokens)
        return np.arange(span.start, span.stop)

    def _predictions(self, tree: Tree, source: int, response: np.ndarray, places: np.ndarray) -> None:
        """Write what is predicted of a response, from the places of its prompt and of itself."""
        read = len(tree.prompt_tokens) - 1
        predicted = slice(self.prediction, self.prediction + len(response))
        self.batch.hidden_index[predicted] = places[read : read + len(response)]
        self.batch.labels[predicted] = response
        self.batch.response_ids[predicted] = self.response
        self.prompt_index[self.response], self.source[self.response] = tree.prompt, source
        self.prediction, self.response = self.prediction + len(response), self.response + 1
