"""The FLOPs of a round, computed before it runs: with prefix trees, and with padded pairs and live references.

Model FLOPs are counted: a multiply-add is two, and a backward pass costs two forward passes. Recomputation by
rematerialization or by the chunked head is not counted.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tpaw_jax.config import PackingConfig, RunConfig
from tpaw_jax.data import packing, prefix_trees
from tpaw_jax.data.packing import Rows
from tpaw_jax.data.prefix_trees import Sizes, Trees
from tpaw_jax.data.segments import segments_of
from tpaw_jax.models.layer_stacks import stacks_of
from tpaw_jax.models.model_config import ModelConfig
from tpaw_jax.types import NOTHING, Generations, Prompts, Ragged

BASELINE_BATCH_SIZE = 8
"""Triplets in a batch of padded pairs, each padded to the longest of the batch: SPIN's batch size per device."""


class Work(NamedTuple):
    """The work of a forward pass over some sequences."""

    tokens: float  # tokens in the layers, including padding
    predictions: float  # tokens in the output head
    attended: float  # (query, key) pairs that are not masked

    def __add__(self, other: "Work") -> "Work":  # type: ignore[override]
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def __mul__(self, passes: float) -> "Work":  # type: ignore[override]
        return Work(*(passes * a for a in self))


class RoundWork(NamedTuple):
    """The work of a round's scoring and training, in units of forward passes."""

    scoring: Work
    training: Work

    @property
    def total(self) -> Work:
        """Scoring and training together."""
        return self.scoring + self.training


NO_WORK = Work(0, 0, 0)


def flops(model: ModelConfig, work: Work) -> float:
    """Return the FLOPs of `work`: 2 per weight and token, 2 D V per prediction, 4 N H per pair and layer.

    Of a mixture of experts, only the weights of a token's own experts count.
    """
    layers = 0.0
    for own in stacks_of(model).values():
        attention, kv = own.num_heads * own.head_dim, own.num_kv_heads * own.head_dim
        projected = 0 if own.reads_keys else kv * (1 if own.keys_as_values else 2)
        features = 3 * own.active_size + own.num_experts + 3 * own.token_features
        weights = model.hidden_size * (2 * attention + projected + features)
        layers += own.num_layers * (2 * weights * work.tokens + 4 * attention * work.attended)
    return layers + 2 * model.hidden_size * model.vocab_size * work.predictions


def with_backward(work: Work, adapters: bool) -> Work:
    """Count a forward and a backward pass, which costs two forward passes.

    If adapters alone are trained, products with frozen weights cost one: that for the gradient of their input.
    """
    weights = 2 if adapters else 3
    return Work(weights * work.tokens, weights * work.predictions, 3 * work.attended)


def work_of_trees(trees: Trees, config: PackingConfig) -> Work:
    """Count a pass over trees, without the padding of their rows."""
    return _total(segments_of(trees, config).sizes)


def work_of_rows(rows: Rows) -> Work:
    """Count a pass over packed rows. The layers compute padding too; attention and the head skip it."""
    return _total(rows.sizes)._replace(tokens=len(rows) * rows.config.row_length)


def _total(sizes: Sizes) -> Work:
    return Work(*(float(values.sum()) for values in (sizes.tokens, sizes.predictions, sizes.attended)))


def work_of_padded_pairs(prompts: Prompts, window: Sequence[Generations], batch: int) -> Work:
    """Count a pass over padded pairs: each triplet as two sequences, x y and x y_gen.

    Sequences are padded to the longest in each batch of `batch` triplets. Logits are computed for all tokens, as in
    SPIN, TRL and Tunix. Attention is counted as causal.
    """
    x, y = prompts.prompt_tokens.lengths, prompts.target_tokens.lengths
    longer = np.concatenate([x + np.maximum(y, generations.tokens.lengths) for generations in window])
    starts = np.arange(0, len(longer), batch)
    longest = np.maximum.reduceat(longer, starts).astype(np.int64)
    sequences = 2 * np.diff(starts, append=len(longer))
    tokens = float((sequences * longest).sum())
    return Work(tokens, tokens, float((sequences * longest * (longest + 1) // 2).sum()))


def padded_pairs_of_round(
    prompts: Prompts, window: Sequence[Generations], players: int, config: RunConfig
) -> RoundWork:
    """Count a round with padded pairs, where every step runs the forward pass of every player."""
    one_epoch, epochs = work_of_padded_pairs(prompts, window, BASELINE_BATCH_SIZE), config.train.epochs
    return RoundWork(one_epoch * (epochs * players), with_backward(one_epoch, config.policy.lora.used) * epochs)


def round_work(
    prompts: Prompts,
    generations: Mapping[int, Generations],
    sources: Mapping[int, np.ndarray],
    players: Sequence[int],
    config: RunConfig,
) -> tuple[RoundWork, RoundWork]:
    """Count round `players[0]` with prefix trees and with padded pairs.

    The newest player scores D_O; the other players score only D_t. If D_t is not sampled yet, its lengths are assumed
    to be those of D_(t-1), or of the targets in round 0.

    Args:
        prompts: prompts and targets.
        generations: the generations so far, by round.
        sources: the result of `prefix_trees.first_sources`.
        players: the rounds of the players, newest first.
        config: the run's configuration.

    Returns:
        The work with trees, and with pairs.
    """
    t = players[0]
    newest = generations.get(t)
    if newest is None:
        similar = generations[t - 1].tokens if t else prompts.target_tokens
        lengths = np.minimum(similar.lengths, config.sampling.max_new_tokens)
        newest = Generations(t, Ragged.zeros(lengths), NOTHING)
    window = [newest, *(generations[r] for r in config.objective.opponents(t)[1:])]
    sources = {t: np.full(len(prompts), t), **sources}
    padded = lambda trees: work_of_rows(packing.pack(trees, config.packing))
    one_epoch = padded(prefix_trees.trees_of_window(prompts, window, sources))
    newest_alone = padded(prefix_trees.trees_of_responses(prompts, {t: newest.tokens}))
    scored = one_epoch + newest_alone * (len(players) - 1)
    trees = RoundWork(scored, with_backward(one_epoch, config.policy.lora.used) * config.train.epochs)
    return trees, padded_pairs_of_round(prompts, window, len(players), config)
