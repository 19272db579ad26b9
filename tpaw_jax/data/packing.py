"""Pack prefix trees into rows of fixed shape: `[x | y | g ...]`, or the turns of a conversation on one trunk.

Segments are assigned to rows by first-fit-decreasing bin packing.
"""

import dataclasses
import functools
from typing import Literal

import jax
import numpy as np

from tpaw_jax.config import PackingConfig
from tpaw_jax.data.prefix_trees import NONE, Sizes, Tree, Trees, trees_of_targets
from tpaw_jax.data.segments import Segment, Segments, segments_of
from tpaw_jax.types import NOTHING, Prompts, Ragged, TeamScores, TreeBatch


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Which segments each row holds. The arrays of rows are written where they are needed: `take(...).batch`."""

    segments: Segments
    members: Ragged  # the indices of each row's segments
    config: PackingConfig

    def __len__(self) -> int:
        return len(self.members)

    @functools.cached_property
    def prompt_index(self) -> np.ndarray:
        """The prompt of each response, [rows, R] int32; -1 is padding."""
        return self._responses[0]

    @functools.cached_property
    def source(self) -> np.ndarray:
        """The source of each response, [rows, R] int32."""
        return self._responses[1]

    @functools.cached_property
    def sizes(self) -> Sizes:
        """The sizes of all segments of each row, added up, [rows] int64."""
        ends, members = np.cumsum(self.members.lengths), self.members.flat()

        def of_rows(values: np.ndarray) -> np.ndarray:
            total = np.concatenate([[0], np.cumsum(values[members], dtype=np.int64)])
            return total[ends] - total[ends - self.members.lengths]

        return Sizes(*map(of_rows, self.segments.sizes))

    @property
    def tokens(self) -> np.ndarray:
        """Number of tokens in each row, without padding, [rows]."""
        return self.sizes.tokens

    @property
    def predictions(self) -> np.ndarray:
        """Number of predicted tokens in each row, [rows]."""
        return self.sizes.predictions

    @property
    def triplets(self) -> np.ndarray:
        """Number of triplets in each row, counted with multiplicity, [rows] float32."""
        return self.sizes.triplets.astype(np.float32)

    @property
    def fill(self) -> float:
        """Fraction of the rows' tokens that are not padding."""
        return float(self.tokens.sum() / (len(self) * self.config.row_length)) if len(self) else 0.0

    @functools.cached_property
    def batch(self) -> TreeBatch:
        """All rows as numpy arrays, rows on the leading axis: 32 bytes per token. Meant for a few rows, see `take`."""
        return _write_rows(self)

    @functools.cached_property
    def _responses(self) -> tuple[np.ndarray, np.ndarray]:
        """Prompt and source of each response, [rows, R]."""
        trees, of_segments = self.segments.trees, self.segments.members.take(self.members.flat())
        index = of_segments.flat()
        present = trees.distinct[index] != NONE
        row = np.repeat(np.repeat(np.arange(len(self)), self.members.lengths), of_segments.lengths)
        row = np.repeat(row, present.sum(axis=1))
        column = np.arange(len(row)) - np.searchsorted(row, row)
        shape = (len(self), self.config.max_responses_per_row)
        prompt, source = np.full(shape, -1, np.int32), np.zeros(shape, np.int32)
        prompt[row, column] = np.broadcast_to(trees.prompt[index][:, None], present.shape)[present]
        source[row, column] = trees.distinct[index][present]
        return prompt, source


def pack(trees: Trees, config: PackingConfig) -> Rows:
    """Pack trees into rows of `row_length` tokens and at most `max_responses_per_row` responses.

    Trees are joined and split first, see `segments_of`. A `rows_per_batch` of 0 (automatic) counts as 1 throughout
    this module.

    Raises:
        ValueError: x, y and one generation do not fit into a row. Names the prompt and the lengths.
    """
    segments = segments_of(trees, config)
    sizes = segments.sizes
    longest_first = np.argsort(-sizes.tokens, kind="stable")
    bins = Bins((config.row_length, config.row_length, config.max_responses_per_row))
    needs = zip(*(values[longest_first].tolist() for values in sizes[:3]), strict=True)
    row = np.fromiter((bins.add(need) for need in needs), np.int64, len(segments))
    by_row = np.argsort(row, kind="stable")
    return Rows(segments, Ragged.split(longest_first[by_row], np.bincount(row)), config)


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


def empty(config: PackingConfig, count: int) -> Rows:
    """Build `count` padding rows."""
    trees = trees_of_targets(Prompts(np.zeros(0, np.int32), NOTHING, NOTHING))
    return Rows(segments_of(trees, config), Ragged.zeros(np.zeros(count)), config)


def take(rows: Rows, indices: np.ndarray, size: int) -> Rows:
    """Select the rows at `indices` as a batch of `size` rows, padded with empty rows at the end."""
    chosen, padding = rows.members.take(indices), np.zeros(size - len(indices), int)
    starts, lengths = (np.concatenate([values, padding]) for values in (chosen.starts, chosen.lengths))
    return dataclasses.replace(rows, members=Ragged(chosen.buffer, starts, lengths))


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
    batch = take(rows, indices, total).batch
    split = lambda x: x.reshape(most_micro_batches, rows_per_batch, *x.shape[1:])
    players, _, responses = scores.log_probs.shape
    padded = np.zeros((players, total, responses), np.float32)
    padded[:, : len(indices)] = scores.log_probs[:, indices]
    log_probs = np.moveaxis(padded.reshape(players, most_micro_batches, rows_per_batch, responses), 0, 1)
    mask = np.broadcast_to(scores.player_mask, (most_micro_batches, len(scores.player_mask)))
    return jax.tree.map(split, batch), TeamScores(log_probs, mask), np.int32(used)


def empty_step(config: PackingConfig, players: int, micro_batches: int) -> tuple[TreeBatch, TeamScores, np.int32]:
    """Build step inputs without any rows, as `step_batch` would: they have a step's shapes and dtypes."""
    rows = empty(config, 0)
    scores = TeamScores(np.zeros((players, *rows.prompt_index.shape), np.float32), np.ones(players, bool))
    return step_batch(rows, scores, np.arange(0), config.rows_per_batch, micro_batches)


Needs = tuple[int, int, int]
"""How much an item needs of each resource."""


class Bins:
    """First-fit bin packing in O(n log n): each item goes into the first bin that has room for it.

    A binary tree over the bins holds in each node the most of every resource that a bin below it has left. Subtrees
    without room are skipped, so finding a bin and updating the path above it take O(log bins) in the usual case where
    one resource decides.
    """

    def __init__(self, capacity: Needs) -> None:
        self._capacity, self._leaves = capacity, 1
        self._free = [[c, c] for c in capacity]  # of each resource: a heap, whose index 0 is unused

    def add(self, needs: Needs) -> int:
        """Put an item into the first bin with room for all its needs, and return the bin.

        Raises:
            ValueError: the item does not fit into an empty bin.
        """
        if any(need > c for need, c in zip(needs, self._capacity, strict=True)):
            raise ValueError(f"An item that needs {needs} does not fit into a bin of {self._capacity}.")
        while (leaf := self._first(needs)) is None:
            self._double()
        for free, need in zip(self._free, needs, strict=True):
            _take(free, leaf, need)
        return leaf - self._leaves

    def _first(self, needs: Needs) -> int | None:
        """The leftmost leaf with room. A node may have room for each need in another bin, so a subtree can fail."""
        (x, y, z), (of_x, of_y, of_z), leaves = needs, self._free, self._leaves
        node = 1
        while True:
            if of_x[node] >= x and of_y[node] >= y and of_z[node] >= z:
                if node >= leaves:
                    return node
                node *= 2
            else:
                while node & 1:  # a right child, or the root: its parent's subtree is done
                    node >>= 1
                if node == 0:
                    return None
                node += 1

    def _double(self) -> None:
        """Make room for as many bins again."""
        old, self._leaves = self._leaves, 2 * self._leaves
        for resource, c in enumerate(self._capacity):
            free = [c] * (2 * self._leaves)
            free[self._leaves : self._leaves + old] = self._free[resource][old : 2 * old]
            for node in range(self._leaves - 1, 0, -1):
                free[node] = max(free[2 * node], free[2 * node + 1])
            self._free[resource] = free


def _take(free: list[int], leaf: int, need: int) -> None:
    """Take from a leaf, and update the nodes above it."""
    before = free[leaf]
    most = free[leaf] = before - need
    node = leaf
    while node > 1:
        beside = free[node ^ 1]
        if beside >= before:  # the bin was not the one with the most
            return
        most = beside if beside > most else most
        node >>= 1
        free[node] = most


def _write_rows(rows: Rows) -> TreeBatch:
    count, length, most = len(rows), rows.config.row_length, rows.config.max_responses_per_row
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
    for row, members in enumerate(rows.members):
        writer = _RowWriter(batch, row)
        for index in members:
            writer.write(rows.segments[index])
    return batch


class _RowWriter:
    """Writes segments into one row of a batch, one after the other."""

    def __init__(self, batch: TreeBatch, row: int):
        self.batch = jax.tree.map(lambda x: x[row], batch)  # views, so that writing to them changes `batch`
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
            for response in tree.responses:
                self._predictions(tree, response, written[0])
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

    def _predictions(self, tree: Tree, response: np.ndarray, places: np.ndarray) -> None:
        """Write what is predicted of a response, from the places of its prompt and of itself."""
        read = len(tree.prompt_tokens) - 1
        predicted = slice(self.prediction, self.prediction + len(response))
        self.batch.hidden_index[predicted] = places[read : read + len(response)]
        self.batch.labels[predicted] = response
        self.batch.response_ids[predicted] = self.response
        self.prediction, self.response = self.prediction + len(response), self.response + 1
