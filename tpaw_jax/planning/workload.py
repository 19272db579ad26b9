"""What the rounds of a run compute, at assumed lengths of prompts and responses, or at those of its data."""

import functools
import math
from typing import NamedTuple

import jax
import numpy as np

from tpaw_jax.config import RunConfig
from tpaw_jax.data import dataset, packing, prefix_trees, templates
from tpaw_jax.models import ModelConfig, hub
from tpaw_jax.models.attention import Visibility, rules
from tpaw_jax.models.layer_stacks import places_of, stacks_of
from tpaw_jax.training import cost
from tpaw_jax.training.cost import Work
from tpaw_jax.types import NOTHING, Generations, Prompts, Ragged, TreeBatch

MEDIANS, SPREADS = (160, 280, 240), (0.7, 0.6, 0.5)
"""Median (tokens) and sigma of the assumed log-normal lengths of x, y and y_gen in chats, for data.max_length 1024."""

ROWS_AT_ONCE = 256
"""Rows of 8,192 tokens whose attention is planned at once: 256 MiB."""

SAMPLE = 1024
"""Prompts that are drawn and packed to estimate a round."""


class Lengths(NamedTuple):
    """The lengths of a run's data, tokens."""

    prompts: np.ndarray
    targets: np.ndarray


class RoundEstimate(NamedTuple):
    """The work of one round."""

    rows: float  # of D_O, one epoch
    triplets_per_row: float
    scored_rows: float  # of all players
    tree_flops: float  # FLOPs of scoring and training as packed trees, without recomputation
    padded_pair_flops: float  # the same as padded pairs, with references in each step


class Workload(NamedTuple):
    """The rounds of a run at assumed lengths."""

    prompts: int
    prompt_tokens: float  # of all prompts
    new_tokens: float  # of all responses of a round
    rounds: tuple[RoundEstimate, ...]
    row: Work  # average row of the last round, real tokens only
    computed: Work  # the same row as a TPU computes it: with padding, in full head chunks and attention matmuls
    triplets_per_row: float  # of the last round
    fill: float  # share of the last round's token positions that are not padding

    @property
    def tokens_per_sequence(self) -> int:
        """Average tokens of a prompt and its response."""
        return math.ceil((self.prompt_tokens + self.new_tokens) / self.prompts)


def lengths_of_data(config: RunConfig, vocabulary: int) -> Lengths:
    """Read and tokenize the configuration's data.

    Raises:
        FileNotFoundError, ValueError: the tokenizer or the data cannot be used.
    """
    tokenizer = hub.load_tokenizer(config.policy.tokenizer or config.policy.path)
    template = templates.make_template(tokenizer, config.data, vocabulary)
    prompts, _, _ = dataset.load(config.data, template, config.seed)
    return Lengths(prompts.prompt_tokens.lengths, prompts.target_tokens.lengths)


def assumed(config: RunConfig, model: ModelConfig, prompts: int, lengths: Lengths | None = None) -> Workload:
    """Estimate the rounds of a run on `prompts` prompts, from a packed sample of assumed lengths, or of `lengths`."""
    sample, new_tokens = draw_lengths(config, min(SAMPLE, prompts), lengths)
    scale = prompts / len(sample)
    rounds = [_round(config, model, sample, new_tokens, t) for t in range(config.rounds)]
    rows = rounds[-1][1]
    share = _share_in_windows(rows, model)
    computed = _computed(rows, config, model)
    return Workload(
        prompts=prompts,
        prompt_tokens=float(sample.prompt_tokens.lengths.mean()) * prompts,
        new_tokens=float(new_tokens.mean()) * prompts,
        rounds=tuple(_scaled(of_sample, scale) for of_sample, _ in rounds),
        row=_in_windows(_useful(rows), share) * (1 / len(rows)),
        computed=computed * (1 / len(rows)),
        triplets_per_row=float(rows.triplets.mean()),
        fill=rows.fill,
    )


def random_window(
    config: RunConfig, vocabulary: int, size: int, lengths: Lengths | None = None
) -> tuple[Prompts, list[Generations]]:
    """`size` prompts of random tokens, and the opponents' responses, newest first, of lengths as in `draw_lengths`."""
    blank, of_responses = draw_lengths(config, size, lengths)
    rng = np.random.default_rng((config.seed, 1))
    fill = lambda lengths: Ragged.of(rng.integers(0, vocabulary, n).astype(np.int32) for n in lengths)
    prompts = Prompts(blank.ids, fill(blank.prompt_tokens.lengths), fill(blank.target_tokens.lengths))
    rounds = reversed(range(len(of_responses)))
    return prompts, [Generations(t, fill(of_responses[t]), NOTHING) for t in rounds]


def draw_lengths(config: RunConfig, size: int, lengths: Lengths | None = None) -> tuple[Prompts, np.ndarray]:
    """Prompts and targets, all token 0, and the lengths of their responses, [opponents, size].

    With the lengths of data, responses are as long as targets of other prompts, as a fine-tuned model's are.
    """
    rng, scale = np.random.default_rng(config.seed), config.data.max_length / 1024
    opponents = config.objective.opponent_rounds or config.objective.n_max
    if lengths is not None:
        chosen = rng.choice(len(lengths.prompts), size, replace=size > len(lengths.prompts))
        x, y, g = lengths.prompts[chosen], lengths.targets[chosen], rng.choice(lengths.targets, (opponents, size))
    else:
        draw = lambda i, shape: np.round(rng.lognormal(np.log(MEDIANS[i] * scale), SPREADS[i], shape)).astype(int)
        x, y, g = draw(0, size), draw(1, size), draw(2, (opponents, size))
        x = np.clip(x, 4, config.data.max_prompt_length)
        y = np.clip(y, 2, config.data.max_length - x)
    g = np.clip(g, 2, config.sampling.max_new_tokens)
    return Prompts(np.arange(size, dtype=np.int32), Ragged.zeros(x), Ragged.zeros(y)), g


def _round(
    config: RunConfig, model: ModelConfig, sample: Prompts, new_tokens: np.ndarray, t: int
) -> tuple[RoundEstimate, packing.Rows]:
    """Round t on the sample alone, and its packed rows."""
    players = min(t + 1, config.objective.n_max)
    opponents = len(config.objective.opponents(t))
    window = [Generations(i, Ragged.zeros(new_tokens[i]), NOTHING) for i in reversed(range(opponents))]
    sources = {r.round: np.full(len(sample), r.round) for r in window}  # assume that no two responses are equal
    rows = packing.pack(prefix_trees.trees_of_window(sample, window, sources), config.packing)
    newest = prefix_trees.trees_of_responses(sample, {t: window[0].tokens})
    forward = _useful(rows)
    trained = cost.with_backward(forward, config.policy.lora.used) * config.train.epochs
    work = forward + trained + cost.work_of_trees(newest, config.packing) * (players - 1)
    padded_pairs = cost.padded_pairs_of_round(sample, window, players, config).total
    share = _share_in_windows(rows, model)
    trees, pairs = (cost.flops(model, _in_windows(one, share)) for one in (work, padded_pairs))
    scored = len(rows) + (players - 1) * len(packing.pack(newest, config.packing))
    return RoundEstimate(len(rows), float(rows.triplets.mean()), scored, trees, pairs), rows


def _scaled(sample: RoundEstimate, scale: float) -> RoundEstimate:
    """The round of `scale` times as many prompts as the sample."""
    return RoundEstimate(*(scale * value for value in sample))._replace(triplets_per_row=sample.triplets_per_row)


def _useful(rows: packing.Rows) -> Work:
    """The work of the rows' real tokens, without padding."""
    return cost.work_of_rows(rows)._replace(tokens=float(rows.tokens.sum()))


def _share_in_windows(rows: packing.Rows, model: ModelConfig) -> float:
    """The share of query-key pairs that are within the window of a layer, averaged over the heads of all layers."""
    windows, sizes = _attention_of_layers(model)
    if set(windows) == {None}:
        return 1.0
    batch = rows.batch
    seen = batch.positions[batch.segment_ids > 0].astype(np.int64) + 1
    of_layers = [np.minimum(seen, seen.max() if window is None else window).sum() for window in windows]
    return float(np.average(of_layers, weights=sizes) / seen.sum())


def _attention_of_layers(model: ModelConfig) -> tuple[list[int | None], list[int]]:
    """The window of each layer, and the size of its heads."""
    stacks = stacks_of(model)
    return [kind.window for kind in model.layer_kinds], [stacks[stack].head_dim for stack, _ in places_of(model)]


def _in_windows(work: Work, share: float) -> Work:
    return work._replace(attended=work.attended * share)


def _in_blocks(batch: TreeBatch) -> Visibility:
    pad = lambda x: np.pad(np.asarray(x), ((0, 0), (0, -x.shape[1] % rules.QUERIES)))
    return Visibility(*map(pad, Visibility.of(batch)))


def _computed(rows: packing.Rows, config: RunConfig, model: ModelConfig) -> Work:
    """The work of rows as a TPU computes them; rows of other devices are padded to blocks of queries."""
    batch, chunk, length = rows.batch, config.policy.head_chunk, config.packing.row_length
    live = (np.asarray(batch.response_ids) < rows.prompt_index.shape[1]).sum(axis=1)
    per_matmul = config.policy.attention_chunks
    some = min(len(rows), max(1, ROWS_AT_ONCE * 8192**2 // length**2))
    pieces = [packing.take(rows, np.arange(i, min(i + some, len(rows))), some).batch for i in range(0, len(rows), some)]
    windows, sizes = _attention_of_layers(model)
    matmuls = {}
    for window in set(windows):
        planned = jax.jit(functools.partial(rules.plan, chunks=per_matmul, window=window))
        matmuls[window] = np.concatenate([planned(_in_blocks(piece)).matmuls for piece in pieces])[: len(rows)].sum()
    predictions = float(np.minimum(np.ceil(live / chunk) * chunk, length).sum())
    pairs = (
        float(np.average([matmuls[window] for window in windows], weights=sizes))
        * rules.QUERIES
        * rules.CHUNK
        * per_matmul
    )
    return Work(len(rows) * length, predictions, pairs)
