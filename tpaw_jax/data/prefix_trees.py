"""Prefix trees: a prompt with all its responses, and the prompts of a conversation on one trunk.

All triplets of a prompt share x and y, so a tree holds them once. Responses with identical tokens are held once and
counted by multiplicity. With `data.train_on: all`, the later prompts of a conversation begin with its earlier ones, so
their trees are joined to a segment, which holds the shared tokens once.

`Trees` and `Segments` hold millions of them as arrays of indices; a `Tree` or `Segment` is made when it is asked for.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self, overload

import numpy as np

from tpaw_jax.config import PackingConfig
from tpaw_jax.types import TARGET, Generations, Prompts, Ragged

NONE = -2
"""In place of a response's source: there is no response."""


@dataclasses.dataclass(frozen=True)
class Tree:
    """One prompt, its distinct responses, and the triplets that they form."""

    prompt: int  # index into Prompts
    prompt_tokens: np.ndarray
    sources: tuple[int, ...]  # for each response: TARGET, or the round that first sampled it
    responses: tuple[np.ndarray, ...]
    triplets: tuple[tuple[int, int, int], ...]  # (index of y, index of y_gen, multiplicity)
    index: int = 0  # of this tree in its `Trees`

    @property
    def length(self) -> int:
        """Row tokens that the tree occupies alone. A response's last token is only a label and takes no space."""
        return len(self.prompt_tokens) + sum(len(r) - 1 for r in self.responses)

    @property
    def predictions(self) -> int:
        """Number of predicted tokens, i.e. all tokens of all responses."""
        return sum(len(r) for r in self.responses)

    def fits(self, config: PackingConfig) -> bool:
        """Whether a row has room for the tree."""
        return _fits(self.length, self.predictions, len(self.responses), config)


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
        attended = _causal(trunk) + sum(n * fork + _causal(n) for fork, n in branches)
        triplets = sum(n for tree in self.trees for *_, n in tree.triplets)
        tokens = trunk + sum(n for _, n in branches)
        return Sizes(*map(np.asarray, (tokens, self.predictions, self.responses, triplets, attended)))

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
        return _fits(self.length, self.predictions, self.responses, config)


class Sizes(NamedTuple):
    """Sizes of trees or of segments, int64; arrays of the same shape."""

    tokens: np.ndarray  # of a row; a response's last token is only a label and takes no space
    predictions: np.ndarray  # predicted tokens
    responses: np.ndarray
    triplets: np.ndarray  # counted with multiplicity
    attended: np.ndarray  # (query, key) pairs that are not masked


@dataclasses.dataclass(frozen=True, eq=False)
class Trees(Sequence[Tree]):
    """Many trees, as the indices of their prompts and responses.

    With `triplets`, each of `sources` is the y_gen of a triplet, and the tree holds the target too. Otherwise a tree
    holds the responses of `sources` alone, for scoring.
    """

    prompts: Prompts
    responses: Mapping[int, Ragged]  # by source: a response of each prompt
    prompt: np.ndarray  # [trees] int32: index into `prompts`
    sources: np.ndarray  # [trees, K] int32; NONE where a tree has fewer than K
    triplets: bool

    def __len__(self) -> int:
        return len(self.prompt)

    @overload
    def __getitem__(self, index: int) -> Tree: ...
    @overload
    def __getitem__(self, index: slice) -> "Trees": ...
    def __getitem__(self, index: int | slice) -> "Tree | Trees":
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        prompt = int(self.prompt[index])
        counts = Counter(source for source in self.sources[index].tolist() if source != NONE)
        order = tuple(dict.fromkeys([TARGET, *counts]) if self.triplets else counts)
        triplets = tuple((0, order.index(source), n) for source, n in counts.items()) if self.triplets else ()
        responses = tuple(self.responses[source][prompt] for source in order)
        return Tree(prompt, self.prompts.prompt_tokens[prompt], order, responses, triplets, int(index))

    def take(self, indices: Sequence[int] | np.ndarray) -> Self:
        """The trees at `indices`."""
        indices = np.asarray(indices, int)
        return dataclasses.replace(self, prompt=self.prompt[indices], sources=self.sources[indices])

    def only(self, chosen: np.ndarray) -> Self:
        """The responses that `chosen`, of the shape of `distinct`, is true for, without triplets."""
        some = chosen.any(axis=1)
        sources = np.where(chosen, self.distinct, NONE)[some]
        return dataclasses.replace(self, prompt=self.prompt[some], sources=sources, triplets=False)

    @functools.cached_property
    def distinct(self) -> np.ndarray:
        """The source of each response of each tree, in order, and NONE: [trees, most responses] int32."""
        target = np.full((len(self), 1), TARGET, np.int32)
        found = np.concatenate([target, self.sources], axis=1) if self.triplets else self.sources.copy()
        for k in range(1, found.shape[1]):
            found[(found[:, :k] == found[:, k : k + 1]).any(axis=1), k] = NONE
        return found

    @functools.cached_property
    def sizes(self) -> Sizes:
        """The sizes of every tree, [trees]."""
        present = self.distinct != NONE
        lengths = np.zeros(present.shape, np.int64)
        prompt = np.broadcast_to(self.prompt[:, None], present.shape)
        for source in np.unique(self.distinct[present]).tolist():
            here = self.distinct == source
            lengths[here] = self.responses[source].lengths[prompt[here]]
        trunk = self.prompts.prompt_tokens.lengths[self.prompt].astype(np.int64)
        branches = np.where(present, lengths - 1, 0)
        return Sizes(
            tokens=trunk + branches.sum(axis=1),
            predictions=lengths.sum(axis=1),
            responses=present.sum(axis=1),
            triplets=(self.sources != NONE).sum(axis=1) * self.triplets,
            attended=_causal(trunk) + (branches * trunk[:, None] + _causal(branches)).sum(axis=1),
        )


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


def first_sources(prompts: Prompts, generations: Sequence[Generations]) -> dict[int, np.ndarray]:
    """Map each round to the source where each of its responses first appeared: TARGET, an earlier round, or itself.

    Identical responses to a prompt share a source, so each is computed and scored once.

    Returns:
        round -> int32 sources, [prompts].
    """
    earlier, sources = {TARGET: prompts.target_tokens}, {}
    for g in sorted(generations, key=lambda g: g.round):
        found = np.full(len(prompts), g.round, np.int32)
        for source, texts in earlier.items():
            for i in np.flatnonzero((found == g.round) & (texts.lengths == g.tokens.lengths)).tolist():
                if texts[i].tobytes() == g.tokens[i].tobytes():
                    found[i] = source
        earlier[g.round], sources[g.round] = g.tokens, found
    return sources


def trees_of_window(
    prompts: Prompts, window: Sequence[Generations], sources: Mapping[int, np.ndarray] | None = None
) -> Trees:
    """Build one tree per prompt from the triplets of the rounds in `window` (D_O).

    `sources` is the result of `first_sources` over all rounds so far. By default it is computed from the window alone.
    """
    sources = first_sources(prompts, window) if sources is None else sources
    responses = {TARGET: prompts.target_tokens} | {g.round: g.tokens for g in window}
    of_rounds = np.stack([sources[g.round] for g in window], axis=1).astype(np.int32)
    return Trees(prompts, responses, np.arange(len(prompts), dtype=np.int32), of_rounds, True)


def trees_of_responses(prompts: Prompts, responses: Mapping[int, Ragged]) -> Trees:
    """Each prompt with its responses of some sources, without triplets. A response without tokens is left out."""
    lengths = np.stack([texts.lengths for texts in responses.values()], axis=1)
    sources = np.where(lengths > 0, np.array(list(responses), np.int32), NONE)
    return Trees(prompts, responses, np.arange(len(prompts), dtype=np.int32), sources, False)


def trees_of_targets(prompts: Prompts) -> Trees:
    """Each prompt with its target as the only response, in a triplet with itself."""
    sources = np.full((len(prompts), 1), TARGET, np.int32)
    return Trees(prompts, {TARGET: prompts.target_tokens}, np.arange(len(prompts), dtype=np.int32), sources, True)


def segments_of(trees: Trees, config: PackingConfig) -> Segments:
    """Join the trees of each conversation where that saves tokens, to segments that fit into a row.

    A tree that does not fit into a row is split into several trees, each with its own copy of x and y.

    Raises:
        ValueError: x, y and one generation do not fit into a row. Names the prompt and the lengths.
    """
    trees = _split(trees, config)
    if trees.prompts.conversations is not None and len(trees):
        return _join(trees, config)
    one = np.ones(len(trees), np.int32)
    trunk = trees.prompts.prompt_tokens.lengths[trees.prompt]
    return Segments(trees, Ragged.split(np.arange(len(trees)), one), Ragged.split(trunk, one), trees.sizes)


def _fits(tokens: int, predictions: int, responses: int, config: PackingConfig) -> bool:
    return max(tokens, predictions) <= config.row_length and responses <= config.max_responses_per_row


def _causal(length: Any) -> Any:
    """(query, key) pairs of causal attention."""
    return length * (length + 1) // 2


def _join(trees: Trees, config: PackingConfig) -> Segments:
    """The segments of the trees' conversations, in the order in which these begin."""
    conversation = np.asarray(trees.prompts.conversations)[trees.prompt]
    _, first, of_tree = np.unique(conversation, return_index=True, return_inverse=True)
    by_conversation = np.argsort(first[of_tree], kind="stable")
    counts = np.bincount(first[of_tree])
    members, forks, sizes = [], [], []
    for group in np.split(by_conversation, np.cumsum(counts[counts > 0])[:-1]):
        alone = [Segment((tree,), (len(tree.prompt_tokens),)) for tree in map(trees.__getitem__, group.tolist())]
        for segment in _join_conversation(alone, config):
            members.append(np.array([tree.index for tree in segment.trees]))
            forks.append(np.array(segment.forks, np.int32))
            sizes.append(segment.sizes)
    together = Sizes(*map(np.array, zip(*sizes, strict=True)))
    return Segments(trees, Ragged.of(members, np.int64), Ragged.of(forks), together)


def _join_conversation(parts: Sequence[Segment], config: PackingConfig) -> list[Segment]:
    """Join each tree, longest prompts first, to the first segment where it fits and takes fewer tokens than alone."""
    segments: list[Segment] = []
    for part in sorted(parts, key=lambda part: -len(part.trunk)) if len(parts) > 1 else parts:
        for i, segment in enumerate(segments):
            joined = segment.joined_by(part.trees[0])
            saves = joined.length < segment.length + part.length
            if saves and joined.fits(config):
                segments[i] = joined
                break
        else:
            segments.append(part)
    return segments


def _split(trees: Trees, config: PackingConfig) -> Trees:
    """The trees, of which those that do not fit into a row are split."""
    sizes = trees.sizes
    too_long = np.maximum(sizes.tokens, sizes.predictions) > config.row_length
    too_many = sizes.responses > config.max_responses_per_row
    split = {i: _parts(trees[i], config) for i in np.flatnonzero(too_long | too_many).tolist()}
    if not split:
        return trees
    counts = np.ones(len(trees), int)
    counts[list(split)] = [len(parts) for parts in split.values()]
    whole = trees.take(np.repeat(np.arange(len(trees)), counts))
    places = np.cumsum(counts) - counts
    for i, parts in split.items():
        for place, part in enumerate(parts, start=places[i]):
            sources = [part.sources[g] for _, g, n in part.triplets for _ in range(n)] or part.sources
            whole.sources[place] = NONE
            whole.sources[place, : len(sources)] = sources
    return whole


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
