"""Prefix trees: a prompt with all its responses, and the prompts of a conversation on one trunk.

All triplets of a prompt share x and y, so a tree holds them once. Responses with identical tokens are held once and
counted by multiplicity. With `data.train_on: all`, the later prompts of a conversation begin with its earlier ones, so
their trees are joined to a segment, which holds the shared tokens once.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from tpaw_jax.config import PackingConfig
from tpaw_jax.types import TARGET, Generations, Prompts


@dataclasses.dataclass(frozen=True)
class Tree:
    """One prompt, its distinct responses, and the triplets that they form."""

    prompt: int  # index into Prompts
    prompt_tokens: np.ndarray
    sources: tuple[int, ...]  # for each response: TARGET, or the round that first sampled it
    responses: tuple[np.ndarray, ...]
    triplets: tuple[tuple[int, int, int], ...]  # (index of y, index of y_gen, multiplicity)
    conversation: int | None = None  # trees of the same conversation may be joined; None: never

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


def first_sources(prompts: Prompts, generations: Sequence[Generations]) -> dict[int, np.ndarray]:
    """Map each round to the source where each of its responses first appeared: TARGET, an earlier round, or itself.

    Identical responses to a prompt share a source, so each is computed and scored once.

    Returns:
        round -> int32 sources, [prompts].
    """
    in_order = sorted(generations, key=lambda g: g.round)
    sources = {g.round: np.zeros(len(prompts), np.int32) for g in in_order}
    for i, target in enumerate(prompts.target_tokens):
        seen = {target.tobytes(): TARGET}
        for g in in_order:
            sources[g.round][i] = seen.setdefault(g.tokens[i].tobytes(), g.round)
    return sources


def trees_of_window(
    prompts: Prompts, window: Sequence[Generations], sources: dict[int, np.ndarray] | None = None
) -> list[Tree]:
    """Build one tree per prompt from the triplets of the rounds in `window` (D_O).

    `sources` is the result of `first_sources` over all rounds so far. By default it is computed from the window alone.
    """
    sources = first_sources(prompts, window) if sources is None else sources
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
        trees.append(dataclasses.replace(tree_of_responses(prompts, i, tokens), triplets=triplets))
    return trees


def tree_of_responses(prompts: Prompts, prompt: int, responses: dict[int, np.ndarray]) -> Tree:
    """Build a tree without triplets, for scoring only; `responses` maps source to tokens."""
    tokens, conversation = prompts.prompt_tokens[prompt], prompts.conversation_of(prompt)
    return Tree(prompt, tokens, tuple(responses), tuple(responses.values()), (), conversation)


def trees_of_targets(prompts: Prompts) -> list[Tree]:
    """Each prompt with its target as the only response."""
    return [
        dataclasses.replace(tree_of_responses(prompts, i, {TARGET: y}), triplets=((0, 0, 1),))
        for i, y in enumerate(prompts.target_tokens)
    ]


def segments_of(trees: Sequence[Tree], config: PackingConfig) -> list[Segment]:
    """Join the trees of each conversation where that saves tokens, to segments that fit into a row.

    A tree that does not fit into a row is split into several trees, each with its own copy of x and y.

    Raises:
        ValueError: x, y and one generation do not fit into a row. Names the prompt and the lengths.
    """
    alone = lambda tree: Segment((tree,), (len(tree.prompt_tokens),))
    conversations: dict[tuple[bool, int], list[Segment]] = {}
    for i, tree in enumerate(trees):
        key = (False, i) if tree.conversation is None else (True, tree.conversation)
        conversations.setdefault(key, []).extend(alone(part) for part in _split(tree, config))
    segments = []
    for parts in conversations.values():
        segments += parts if len(parts) == 1 else _join(parts, config)
    return segments


def _fits(tokens: int, predictions: int, responses: int, config: PackingConfig) -> bool:
    return max(tokens, predictions) <= config.row_length and responses <= config.max_responses_per_row


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


def _split(tree: Tree, config: PackingConfig) -> list[Tree]:
    """The tree itself, or several trees with x, y and as many of the generations as fit into a row."""
    if tree.fits(config):
        return [tree]
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
