"""What a round computes, counted before it runs: in prefix trees, and in padded pairs with live references.

Model FLOPs: a multiplication and an addition are two, a backward pass is two forward passes, and what rematerialisation
or the chunked head computes again is not counted. Counts are of one epoch's rows or pairs, times the passes over them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tpaw_jax.config import RunConfig
from tpaw_jax.data import packing
from tpaw_jax.data.packing import Rows, Tree
from tpaw_jax.models.transformer import ModelConfig
from tpaw_jax.types import Generations, Prompts

BACKWARD = 2
"""Forward passes that a backward pass costs."""

PAIRS = 8
"""Triplets of a batch of padded pairs, padded to the longest of them: SPIN's batch a device."""


class Work(NamedTuple):
    """What one pass over some sequences computes."""

    tokens: float  # places in the layers, padding included
    predictions: float  # places in the head
    pairs: float  # of a query and a key that it sees

    def __add__(self, other: Work) -> Work:  # type: ignore[override]
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def __mul__(self, passes: float) -> Work:  # type: ignore[override]
        return Work(*(passes * a for a in self))


class RoundWork(NamedTuple):
    """Forward passes over D_O that a round's scoring and training amount to."""

    scoring: Work
    training: Work

    @property
    def total(self) -> Work:
        """Both together."""
        return self.scoring + self.training


NOTHING = Work(0, 0, 0)


def flops(model: ModelConfig, work: Work) -> float:
    """FLOPs of `work`: 2 a weight and token in the layers, 2 D V a prediction, 4 N H a pair and layer."""
    attention = model.num_heads * model.head_dim
    weights = (
        2 * model.hidden_size * attention
        + 2 * model.hidden_size * model.num_kv_heads * model.head_dim
        + 3 * model.hidden_size * model.intermediate_size
    )
    of_layers = model.num_layers * (2 * weights * work.tokens + 4 * attention * work.pairs)
    return of_layers + 2 * model.hidden_size * model.vocab_size * work.predictions


def of_trees(trees: Sequence[Tree]) -> Work:
    """A pass over trees, without the padding of the rows they are packed in."""
    work = NOTHING
    for tree in trees:
        prompt, read = len(tree.prompt_tokens), [len(r) - 1 for r in tree.responses]
        pairs = _causal(prompt) + sum(n * prompt + _causal(n) for n in read)
        work += Work(tree.places(), tree.predictions, pairs)
    return work


def of_rows(rows: Rows) -> Work:
    """A pass over packed rows, padding included in the layers; head and attention skip it."""
    segments = np.asarray(rows.batch.segment_ids)
    predictions = int((np.asarray(rows.batch.responses) < rows.prompt_index.shape[1]).sum())
    # A token sees as many keys as its position says, and itself: its prompt and its own response up to it.
    pairs = int((np.asarray(rows.batch.positions) + 1)[segments > 0].sum())
    return Work(segments.size, predictions, pairs)


def of_pairs(prompts: Prompts, window: Sequence[Generations], batch: int) -> Work:
    """A pass over every triplet as two sequences, x y and x y_gen, padded to the longest of each `batch` triplets.

    Logits are computed at every place, as SPIN, TRL and Tunix do; attention is counted as causal.
    """
    longest = [
        len(prompts.prompt_tokens[i]) + max(len(prompts.target_tokens[i]), len(generations.tokens[i]))
        for generations in window
        for i in range(len(prompts))
    ]
    work = NOTHING
    for start in range(0, len(longest), batch):
        group = longest[start : start + batch]
        places = 2 * len(group) * max(group)
        work += Work(places, places, 2 * len(group) * _causal(max(group)))
    return work


def pairs_of_round(prompts: Prompts, window: Sequence[Generations], players: int, epochs: int) -> RoundWork:
    """A round as padded pairs, with every player's live forward pass in every step."""
    one_epoch = of_pairs(prompts, window, PAIRS)
    return RoundWork(one_epoch * (epochs * players), one_epoch * (epochs * (1 + BACKWARD)))


def round_work(
    prompts: Prompts,
    generations: Mapping[int, Generations],
    sources: Mapping[int, np.ndarray],
    players: Sequence[int],
    config: RunConfig,
) -> tuple[RoundWork, RoundWork]:
    """What the round of `players[0]` computes in trees and in padded pairs: the newest player scores D_O, others D_t.

    Where D_t is not sampled yet, its lengths are taken to be those of D_(t-1), or those of the targets.
    """
    t = players[0]
    newest = generations.get(t)
    if newest is None:
        like = generations[t - 1].tokens if t else prompts.target_tokens
        most = config.sampling.max_new_tokens
        newest = Generations(t, tuple(np.zeros(min(len(r), most), np.int32) for r in like), ())
    window = [newest, *(generations[r] for r in config.objective.opponents(t)[1:])]
    sources = {t: np.full(len(prompts), t), **sources}
    length = config.packing.row_length
    padded = lambda trees: of_trees(trees)._replace(tokens=length * packing.row_count(trees, config.packing))
    one_epoch = padded(packing.trees_of_window(prompts, window, sources))
    of_newest = padded([packing.tree_of_responses(prompts, i, {t: r}) for i, r in enumerate(newest.tokens)])
    scored = one_epoch + of_newest * (len(players) - 1)
    trees = RoundWork(scored, one_epoch * (config.train.epochs * (1 + BACKWARD)))
    return trees, pairs_of_round(prompts, window, len(players), config.train.epochs)


def _causal(length: int) -> float:
    return length * (length + 1) / 2
