"""Prefix trees: a prompt with all its responses.

All triplets of a prompt share x and y, so a tree holds them once. Responses with identical tokens are held once and
counted by multiplicity. `Trees` holds millions of trees as arrays of indices; a `Tree` is made when it is asked for.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
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
        return has_room(self.length, self.predictions, len(self.responses), config)


class Sizes(NamedTuple):
    """The sizes of a tree or segment, or of several: int64 arrays of the same shape."""

    tokens: Any  # of a row; a response's last token is only a label and takes no space
    predictions: Any  # predicted tokens
    responses: Any
    triplets: Any  # counted with multiplicity
    attended: Any  # (query, key) pairs that are not masked

    def take(self, indices: np.ndarray) -> "Sizes":
        """The sizes at `indices`."""
        return Sizes(*(values[indices] for values in self))


@dataclasses.dataclass(frozen=True, eq=False)
class Trees(Sequence[Tree]):
    """Many trees, as the indices of their prompts and responses.

    With `triplets`, each of `sources` is the y_gen of a triplet, and the tree holds the target too. Otherwise a tree
    holds the responses of `sources` alone, for scoring.
    """

    prompts: Prompts
    responses: Mapping[int, Ragged]  # by TARGET and round: a response to each prompt
    prompt: np.ndarray  # [trees] int32: index into `prompts`
    sources: np.ndarray  # [trees, K] int32; NONE where a tree has fewer than K
    found_in: np.ndarray  # [trees, K] int32: the key of `responses` that holds each response
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
        found_in = {TARGET: TARGET} if self.triplets else {}
        for source, key in zip(self.sources[index].tolist(), self.found_in[index].tolist(), strict=True):
            if source != NONE:
                found_in.setdefault(source, key)
        order = tuple(found_in)
        triplets = tuple((0, order.index(source), n) for source, n in counts.items()) if self.triplets else ()
        responses = tuple(self.responses[key][prompt] for key in found_in.values())
        return Tree(prompt, self.prompts.prompt_tokens[prompt], order, responses, triplets, int(index))

    def take(self, indices: Sequence[int] | np.ndarray) -> Self:
        """The trees at `indices`."""
        indices = np.asarray(indices, int)
        prompt, sources, found_in = (values[indices] for values in (self.prompt, self.sources, self.found_in))
        return dataclasses.replace(self, prompt=prompt, sources=sources, found_in=found_in)

    def only(self, chosen: np.ndarray) -> "Trees":
        """The responses that `chosen`, of the shape of `distinct`, is true for, without triplets."""
        some = chosen.any(axis=1)
        sources = np.where(chosen, self.distinct, NONE)[some]
        return Trees(self.prompts, self.responses, self.prompt[some], sources, self._keys[some], triplets=False)

    @functools.cached_property
    def distinct(self) -> np.ndarray:
        """The source of each response of each tree, in order, and NONE: [trees, most responses] int32."""
        found = self._with_target(self.sources)
        for k in range(1, found.shape[1]):
            found[(found[:, :k] == found[:, k : k + 1]).any(axis=1), k] = NONE
        return found

    def _with_target(self, values: np.ndarray) -> np.ndarray:
        target = np.full((len(self), 1), TARGET, np.int32)
        return np.concatenate([target, values], axis=1) if self.triplets else values.copy()

    @property
    def _keys(self) -> np.ndarray:
        """The key of `responses` for each of `distinct`."""
        return self._with_target(self.found_in)

    @functools.cached_property
    def sizes(self) -> Sizes:
        """The sizes of every tree, [trees]."""
        present = self.distinct != NONE
        lengths = np.zeros(present.shape, np.int64)
        prompt = np.broadcast_to(self.prompt[:, None], present.shape)
        keys = self._keys
        for key in np.unique(keys[present]).tolist():
            here = present & (keys == key)
            lengths[here] = self.responses[key].lengths[prompt[here]]
        trunk = self.prompts.prompt_tokens.lengths[self.prompt].astype(np.int64)
        branches = np.where(present, lengths - 1, 0)
        return Sizes(
            tokens=trunk + branches.sum(axis=1),
            predictions=lengths.sum(axis=1),
            responses=present.sum(axis=1),
            triplets=(self.sources != NONE).sum(axis=1) * self.triplets,
            attended=causal_pairs(trunk) + (branches * trunk[:, None] + causal_pairs(branches)).sum(axis=1),
        )


def first_sources(
    prompts: Prompts, generations: Sequence[Generations], known: Mapping[int, np.ndarray] | None = None
) -> dict[int, np.ndarray]:
    """Map each round to the source where each of its responses first appeared: TARGET, an earlier round, or itself.

    Identical responses to a prompt share a source, so each is computed and scored once. `known` is the result for the
    first of the rounds.

    Returns:
        round -> int32 sources, [prompts].
    """
    sources = dict(known or {})
    texts = {TARGET: prompts.target_tokens} | {g.round: g.tokens for g in sorted(generations, key=lambda g: g.round)}
    for number, tokens in texts.items():
        if number == TARGET or number in sources:
            continue
        found = np.full(len(prompts), number, np.int32)
        for source in [earlier for earlier in texts if earlier < number]:
            candidates = (found == number) & (True if source == TARGET else sources[source] == source)
            found[_equal(texts[source], tokens, np.flatnonzero(candidates))] = source
        sources[number] = found
    return sources


def _equal(one: Ragged, other: Ragged, indices: np.ndarray) -> np.ndarray:
    """Those of the indices at which the items are equal."""
    indices = indices[one.lengths[indices] == other.lengths[indices]]
    for place in (0, 0.5):  # few differ in neither token
        a, b = (values.starts[indices] + (place * values.lengths[indices]).astype(int) for values in (one, other))
        filled = one.lengths[indices] > 0
        same = ~filled
        same[filled] = one.buffer[a[filled]] == other.buffer[b[filled]]
        indices = indices[same]
    return indices[[one[i].tobytes() == other[i].tobytes() for i in indices.tolist()]]


def trees_of_window(
    prompts: Prompts, window: Sequence[Generations], sources: Mapping[int, np.ndarray] | None = None
) -> Trees:
    """Build one tree per prompt from the triplets of the rounds in `window` (D_O).

    `sources` is the result of `first_sources` over all rounds so far. By default it is computed from the window alone.
    """
    sources = first_sources(prompts, window) if sources is None else sources
    responses = {TARGET: prompts.target_tokens} | {g.round: g.tokens for g in window}
    of_rounds = np.stack([sources[g.round] for g in window], axis=1).astype(np.int32)
    found_in = np.broadcast_to(np.array([g.round for g in window], np.int32), of_rounds.shape)
    return Trees(prompts, responses, np.arange(len(prompts), dtype=np.int32), of_rounds, found_in, True)


def trees_of_responses(prompts: Prompts, responses: Mapping[int, Ragged]) -> Trees:
    """Each prompt with its responses of some sources, without triplets. A response without tokens is left out."""
    lengths = np.stack([texts.lengths for texts in responses.values()], axis=1)
    sources = np.where(lengths > 0, np.array(list(responses), np.int32), NONE)
    return Trees(prompts, responses, np.arange(len(prompts), dtype=np.int32), sources, sources, False)


def trees_of_targets(prompts: Prompts) -> Trees:
    """Each prompt with its target as the only response, in a triplet with itself."""
    sources = np.full((len(prompts), 1), TARGET, np.int32)
    responses = {TARGET: prompts.target_tokens}
    return Trees(prompts, responses, np.arange(len(prompts), dtype=np.int32), sources, sources, True)


def has_room(tokens: int, predictions: int, responses: int, config: PackingConfig) -> bool:
    """Whether a row has room for so much."""
    return max(tokens, predictions) <= config.row_length and responses <= config.max_responses_per_row


def causal_pairs(length: Any) -> Any:
    """(query, key) pairs of causal attention."""
    return length * (length + 1) // 2
