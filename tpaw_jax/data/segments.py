"""Segments: trees on one trunk, such as the prompts of a conversation.

With `data.train_on: all`, the later prompts of a conversation begin with its earlier ones, so their trees are joined to
a segment, which holds the shared tokens once. Other trees are segments of their own. `Segments` holds millions of
segments as arrays of indices; a `Segment` is made when it is asked for.
"""

import dataclasses
import itertools
from array import array
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np

from tpaw_jax.config import PackingConfig
from tpaw_jax.data.prefix_trees import NONE, Sizes, Tree, Trees, causal_pairs, has_room
from tpaw_jax.types import Ragged


@dataclasses.dataclass(frozen=True)
class Segment:
    """Trees that share a trunk: the longest of their prompts.

    The responses of a tree attend to the trunk up to the tree's fork, where the tree's prompt diverges from the trunk.
    The rest of that prompt, if any, is repeated before each response. A response that is already in the trunk takes no
    tokens; with most templates, that is every target but the last.
    """

    trees: tuple[Tree, ...]  # by fork
    forks: tuple[int, ...]  # tokens of the trunk that each tree's prompt begins with; the last is the whole trunk

    @property
    def trunk(self) -> np.ndarray:
        """The tokens of the longest prompt."""
        return self.trees[-1].prompt_tokens

    @property
    def predictions(self) -> int:
        """Number of predicted tokens of all trees."""
        return sum(tree.predictions for tree in self.trees)

    @property
    def responses(self) -> int:
        """Number of responses of all trees."""
        return sum(len(tree.responses) for tree in self.trees)

    def branches(self) -> Iterator[tuple[int, np.ndarray]]:
        """For each response, in order: its tree's fork, and the tokens of its branch; none if the trunk contains it.

        A response's last token is only a label, so it is in no branch.
        """
        for tree, fork in zip(self.trees, self.forks, strict=True):
            rest = tree.prompt_tokens[fork:]
            for response in tree.responses:
                branch = np.concatenate([rest, response[:-1]])
                in_trunk = not len(rest) and np.array_equal(self.trunk[fork : fork + len(branch)], branch)
                yield fork, branch[:0] if in_trunk else branch

    def branch_lengths(self) -> list[tuple[int, int]]:
        """The fork and the number of tokens of each branch, as of `branches`."""
        if len(self.trees) == 1:
            return [(self.forks[0], len(response) - 1) for response in self.trees[0].responses]
        return [(fork, len(branch)) for fork, branch in self.branches()]

    @property
    def length(self) -> int:
        """Row tokens that the segment occupies."""
        return len(self.trunk) + sum(n for _, n in self.branch_lengths())

    @property
    def sizes(self) -> "Sizes":
        """The segment's sizes."""
        trunk, branches = len(self.trunk), self.branch_lengths()
        attended = causal_pairs(trunk) + sum(n * fork + causal_pairs(n) for fork, n in branches)
        triplets = sum(n for tree in self.trees for *_, n in tree.triplets)
        tokens = trunk + sum(n for _, n in branches)
        return Sizes(tokens, self.predictions, self.responses, triplets, attended)

    def joined_by(self, tree: Tree) -> "Segment":
        """The segment with another tree, whose prompt is not longer than the trunk."""
        tokens = tree.prompt_tokens
        differs = np.flatnonzero(self.trunk[: len(tokens)] != tokens)
        fork = int(differs[0]) if len(differs) else len(tokens)
        place = sum(f < fork for f in self.forks)
        insert = lambda values, value: (*values[:place], value, *values[place:])
        return Segment(insert(self.trees, tree), insert(self.forks, fork))

    def fits(self, config: PackingConfig) -> bool:
        """Whether a row has room for the segment."""
        return has_room(self.length, self.predictions, self.responses, config)


@dataclasses.dataclass(frozen=True, eq=False)
class Segments(Sequence[Segment]):
    """Many segments, as the indices of their trees."""

    trees: Trees
    members: Ragged  # the indices of each segment's trees, by fork
    forks: Ragged  # see `Segment`
    sizes: Sizes  # [segments]

    def __len__(self) -> int:
        return len(self.members)

    @overload
    def __getitem__(self, index: int) -> Segment: ...
    @overload
    def __getitem__(self, index: slice) -> list[Segment]: ...
    def __getitem__(self, index: int | slice) -> "Segment | list[Segment]":
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        trees = tuple(self.trees[i] for i in self.members[index].tolist())
        return Segment(trees, tuple(self.forks[index].tolist()))


def segments_of(trees: Trees, config: PackingConfig) -> Segments:
    """Join the trees of each conversation where that saves tokens, to segments that fit into a row.

    A tree that does not fit into a row is split into several trees, each with its own copy of x and y.

    Raises:
        ValueError: x, y and one generation do not fit into a row. Names the prompt and the lengths.
    """
    trees, group = _split(trees, config)
    if trees.prompts.conversations is not None:
        group = trees.prompts.conversations[trees.prompt]
    _, first, of_tree, counts = np.unique(group, return_index=True, return_inverse=True, return_counts=True)
    alone = np.flatnonzero(counts[of_tree] == 1)
    one = np.ones(len(alone), np.int32)
    trunk = trees.prompts.prompt_tokens.lengths[trees.prompt]
    segments = Segments(trees, Ragged.split(alone, one), Ragged.split(trunk[alone], one), trees.sizes.take(alone))
    if len(alone) == len(trees):
        return segments
    joined, begins = _join_groups(trees, first[of_tree], config)
    in_order = np.argsort(np.concatenate([alone, begins]), kind="stable")
    both = lambda one, other: Ragged.split(np.concatenate([one.flat(), other.flat()]), _lengths(one, other))
    return Segments(
        trees,
        both(segments.members, joined.members).take(in_order),
        both(segments.forks, joined.forks).take(in_order),
        Sizes(*(np.concatenate(pair)[in_order] for pair in zip(segments.sizes, joined.sizes, strict=True))),
    )


def _lengths(*items: Ragged) -> np.ndarray:
    return np.concatenate([some.lengths for some in items])


def _join_groups(trees: Trees, begins: np.ndarray, config: PackingConfig) -> tuple[Segments, np.ndarray]:
    """The segments of each group of several trees, and the index of the tree with which their group begins.

    `begins` has that index for each tree. Groups are in order.
    """
    members, forks, member_counts, sizes, begin = (array("q") for _ in range(5))
    by_group = np.argsort(begins, kind="stable")
    bounds = np.flatnonzero(np.diff(begins[by_group], prepend=-1, append=-1))
    for low, high in itertools.pairwise(bounds.tolist()):
        if high - low == 1:
            continue
        group = [trees[i] for i in by_group[low:high].tolist()]
        for segment in _join([Segment((tree,), (len(tree.prompt_tokens),)) for tree in group], config):
            members.extend(tree.index for tree in segment.trees)
            forks.extend(segment.forks)
            member_counts.append(len(segment.trees))
            sizes.extend(segment.sizes)
            begin.append(group[0].index)
    counts = np.array(member_counts, np.int32)
    of_segments = Sizes(*np.array(sizes, np.int64).reshape(-1, len(Sizes._fields)).T)
    in_segments = lambda values, dtype: Ragged.split(np.array(values, dtype), counts)
    segments = Segments(trees, in_segments(members, np.int64), in_segments(forks, np.int32), of_segments)
    return segments, np.array(begin, np.int64)


def _join(parts: Sequence[Segment], config: PackingConfig) -> list[Segment]:
    """Join each tree, longest prompts first, to the first segment where it fits and takes fewer tokens than alone."""
    segments: list[Segment] = []
    for part in sorted(parts, key=lambda part: -len(part.trunk)):
        for i, segment in enumerate(segments):
            joined = segment.joined_by(part.trees[0])
            saves = joined.length < segment.length + part.length
            if saves and joined.fits(config):
                segments[i] = joined
                break
        else:
            segments.append(part)
    return segments


def _split(trees: Trees, config: PackingConfig) -> tuple[Trees, np.ndarray]:
    """The trees, of which those that do not fit into a row are split, and which tree each was."""
    sizes = trees.sizes
    too_long = np.maximum(sizes.tokens, sizes.predictions) > config.row_length
    too_many = sizes.responses > config.max_responses_per_row
    split = {i: _parts(trees[i], config) for i in np.flatnonzero(too_long | too_many).tolist()}
    if not split:
        return trees, np.arange(len(trees))
    counts = np.ones(len(trees), int)
    counts[list(split)] = [len(parts) for parts in split.values()]
    origin = np.repeat(np.arange(len(trees)), counts)
    whole = trees.take(origin)
    places = np.cumsum(counts) - counts
    for i, parts in split.items():
        for place, part in enumerate(parts, start=places[i]):
            kept = [part.sources[g] for _, g, _ in part.triplets] or part.sources
            whole.sources[place, ~np.isin(whole.sources[place], kept)] = NONE
    return whole, origin


def _parts(tree: Tree, config: PackingConfig) -> list[Tree]:
    """Several trees with x, y and as many of the generations as fit into a row."""
    parts: list[Tree] = []
    if not tree.triplets:
        parts = [_subtree(tree, [k], ()) for k in range(len(tree.responses))]
    current: list[tuple[int, int, int]] = []
    for triplet in tree.triplets:
        if current and not _with_triplets(tree, [*current, triplet]).fits(config):
            parts.append(_with_triplets(tree, current))
            current = []
        current.append(triplet)
    if current:
        parts.append(_with_triplets(tree, current))
    for part in parts:
        if not part.fits(config):
            raise ValueError(
                f"Prompt {tree.prompt}: {len(part.prompt_tokens)} prompt tokens with responses of "
                f"{', '.join(str(len(r)) for r in part.responses)} tokens exceed a row of {config.row_length} tokens "
                f"and {config.max_responses_per_row} responses. Raise packing.row_length or lower the length limits."
            )
    return parts


def _with_triplets(tree: Tree, triplets: Sequence[tuple[int, int, int]]) -> Tree:
    keep = list(dict.fromkeys(r for target, generated, _ in triplets for r in (target, generated)))
    renumbered = tuple((keep.index(t), keep.index(g), n) for t, g, n in triplets)
    return _subtree(tree, keep, renumbered)


def _subtree(tree: Tree, keep: Sequence[int], triplets: tuple[tuple[int, int, int], ...]) -> Tree:
    sources, responses = tuple(tree.sources[k] for k in keep), tuple(tree.responses[k] for k in keep)
    return dataclasses.replace(tree, sources=sources, responses=responses, triplets=triplets)
