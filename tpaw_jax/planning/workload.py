"""What the rounds of a run have to compute, before there is any data: at assumed lengths of prompts and responses."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import numpy as np

from tpaw_jax.config import RunConfig
from tpaw_jax.data import packing
from tpaw_jax.models import ModelConfig, splash_attention
from tpaw_jax.models.attention import Visibility
from tpaw_jax.training import cost
from tpaw_jax.training.cost import BACKWARD, Work
from tpaw_jax.types import Generations, Prompts

MEDIANS, SPREADS = (160, 280, 240), (0.7, 0.6, 0.5)
"""Of the lengths of x, y and y_gen where data.max_length is 1024, tokens: assumed, log-normal, of chats' order."""

SAMPLE = 1024
"""Prompts that are drawn and packed for it."""


class Round(NamedTuple):
    """What one round has to do."""

    rows: float  # of D_O, once
    scored_rows: float
    trees: float  # FLOPs of scoring and training, nothing computed again
    pairs: float  # the same as padded pairs with live references


class Workload(NamedTuple):
    """The rounds of a run at assumed lengths."""

    prompts: int
    prompt_tokens: float  # of all prompts
    new_tokens: float  # of all responses of a round
    rounds: tuple[Round, ...]
    row: Work  # of a row of the last round: its tokens
    computed: Work  # and what a device computes of it: every place, whole chunks of predictions, whole attention blocks
    triplets_a_row: float  # of the last round
    fill: float
    blocks: float  # of attention, as a share of causal attention's

    @property
    def tokens_of_sequence(self) -> int:
        """Of a prompt and its response, on average."""
        return math.ceil((self.prompt_tokens + self.new_tokens) / self.prompts)


def assumed(config: RunConfig, model: ModelConfig, prompts: int) -> Workload:
    """The rounds of a run on `prompts` prompts of assumed lengths, from a sample that is packed as the run packs it."""
    data, sampled, c = config.data, min(SAMPLE, prompts), config.packing
    rng, scale = np.random.default_rng(config.seed), data.max_length / 1024
    draw = lambda i, shape: np.round(rng.lognormal(np.log(MEDIANS[i] * scale), SPREADS[i], shape)).astype(int)
    x = np.clip(draw(0, sampled), 4, data.max_prompt_length)
    y = np.clip(draw(1, sampled), 2, data.max_length - x)
    g = np.clip(
        draw(2, (config.objective.opponent_rounds or config.objective.n_max, sampled)),
        2,
        config.sampling.max_new_tokens,
    )
    blank = lambda sizes: tuple(np.zeros(n, np.int32) for n in sizes)
    of_sample = Prompts(np.arange(sampled, dtype=np.int32), blank(x), blank(y))
    by_round = [Generations(t, blank(sizes), ()) for t, sizes in enumerate(g)]

    def one_round(t: int) -> tuple[Round, packing.Rows]:
        players = min(t + 1, config.objective.n_max)
        window = by_round[: len(config.objective.opponents(t))][::-1]
        sources = {r.round: np.full(sampled, r.round) for r in window}  # no two responses are equal
        rows = packing.pack(packing.trees_of_window(of_sample, window, sources), c)
        of_newest = [packing.tree_of_responses(of_sample, i, {t: r}) for i, r in enumerate(window[0].tokens)]
        others = (players - 1) * packing.row_count(of_newest, c)
        one_epoch, passes = _useful(rows), 1 + config.train.epochs * (1 + BACKWARD)
        trees = cost.flops(model, one_epoch * passes + cost.of_trees(of_newest) * (players - 1))
        pairs = cost.flops(model, cost.pairs_of_round(of_sample, window, players, config.train.epochs).total)
        times = prompts / sampled
        whole = Round(times * len(rows), times * (len(rows) + others), times * trees, times * pairs)
        return whole, rows

    rounds = [one_round(t) for t in range(config.rounds)]
    rows = rounds[-1][1]
    computed, blocks = _computed(rows, config)
    each = 1 / len(rows)
    return Workload(
        prompts=prompts,
        prompt_tokens=float(x.mean()) * prompts,
        new_tokens=float(g.mean()) * prompts,
        rounds=tuple(r for r, _ in rounds),
        row=_useful(rows) * each,
        computed=computed * each,
        triplets_a_row=float(rows.triplets.mean()),
        fill=rows.fill,
        blocks=blocks,
    )


def _useful(rows: packing.Rows) -> Work:
    """Of the tokens of rows, without padding."""
    tokens = float((np.asarray(rows.batch.segment_ids) > 0).sum())
    return cost.of_rows(rows)._replace(tokens=tokens)


def _computed(rows: packing.Rows, config: RunConfig) -> tuple[Work, float]:
    """What a TPU computes of rows, and its attention blocks as a share of causal attention's."""
    batch, chunk, length = rows.batch, config.policy.head_chunk, config.packing.row_length
    live = (np.asarray(batch.responses) < rows.prompt_index.shape[1]).sum(axis=1)
    rules = jax.jit(splash_attention.plan)(Visibility(batch.segment_ids, batch.branch_ids))
    seen = np.asarray(rules.blocks)
    query, keys = length // seen.shape[1], length // seen.shape[2]
    causal = sum(math.ceil((i + 1) * query / keys) for i in range(seen.shape[1]))
    predictions = float(np.minimum(np.ceil(live / chunk) * chunk, length).sum())
    work = Work(len(rows) * length, predictions, float(seen.sum()) * query * keys)
    return work, float(seen.sum() / (causal * len(rows)))
