"""The cost model against counting by hand: the dense mask, XLA's own count, and pairs laid out one by one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_prompts
from plain import triplets_of

from tpaw_jax.config import PackingConfig, RunConfig, config_file
from tpaw_jax.data import packing, prefix_trees
from tpaw_jax.models import Transformer
from tpaw_jax.models.attention import Visibility, visible
from tpaw_jax.training import cost
from tpaw_jax.types import TARGET

CONFIG = PackingConfig(row_length=160, max_responses_per_row=12)


@pytest.fixture
def packed():
    prompts, rounds = random_prompts(np.random.default_rng(3), 9)
    sources = prefix_trees.first_sources(prompts, rounds)
    trees = prefix_trees.trees_of_window(prompts, rounds[::-1], sources)
    return prompts, rounds, sources, trees, packing.pack(trees, CONFIG)


def test_rows_are_counted_as_the_mask_counts_them(packed):
    *_, rows = packed
    batch = rows.batch
    work = cost.work_of_rows(rows)
    mask = np.asarray(visible(Visibility.of(batch)))
    assert work.tokens == batch.tokens.size
    assert work.attended == mask[np.asarray(batch.segment_ids) > 0].sum()
    assert work.predictions == sum(len(r) for tree in packed[3] for r in tree.responses)


def test_trees_are_rows_without_padding(packed):
    *_, trees, rows = packed
    alone, together = cost.work_of_trees(trees, CONFIG), cost.work_of_rows(rows)
    assert alone[1:] == together[1:]
    assert alone.tokens == pytest.approx(together.tokens * rows.fill)


def test_pairs_are_counted_as_they_are_laid_out(packed):
    prompts, rounds, *_ = packed
    expected = 0
    for start in range(0, 27, 8):
        group = triplets_of(prompts, rounds)[start : start + 8]
        expected += 2 * len(group) * max(len(x) + max(len(y), len(g)) for x, y, g in group)
    assert (
        cost.work_of_padded_pairs(prompts, rounds, 8).tokens
        == cost.work_of_padded_pairs(prompts, rounds, 8).predictions
        == expected
    )


@pytest.mark.parametrize("length", [32, 128])
def test_flops_are_those_of_the_compiled_matmuls(stories, length):
    """One layer, since XLA counts a scan's body once; its count has the softmax and the norms too, a few per cent."""
    one_layer = dataclasses.replace(
        stories[0], num_layers=1, hidden_size=256, intermediate_size=1024, num_heads=8, num_kv_heads=4, head_dim=32
    )
    model = Transformer(one_layer)
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    compiled = jax.jit(lambda p, x: model.apply({"params": p}, x)).lower(params, tokens).compile()
    counted = compiled.cost_analysis()["flops"]
    dense = cost.Work(length, length, length * length)  # the einsum computes what the mask hides
    assert cost.flops(one_layer, dense) < counted < 1.06 * cost.flops(one_layer, dense)


def test_a_round_costs_its_scoring_once_and_three_passes_an_epoch(packed):
    prompts, rounds, sources, _, rows = packed
    run = RunConfig(packing=PackingConfig(row_length=160, max_responses_per_row=12))
    generations = {g.round: g for g in rounds}
    in_trees, in_pairs = cost.round_work(prompts, generations, sources, [2, 1, 0], run)
    of_newest = prefix_trees.trees_of_responses(prompts, {2: rounds[2].tokens})
    newest_alone = cost.work_of_rows(packing.pack(of_newest, run.packing))
    one_epoch = cost.work_of_rows(rows)
    assert in_trees.training == one_epoch * 6
    assert in_trees.scoring == one_epoch + newest_alone * 2
    pairs = cost.work_of_padded_pairs(prompts, rounds[::-1], cost.BASELINE_BATCH_SIZE)
    assert in_pairs.total == pairs * 12  # two epochs of three players, forward and backward


def test_what_is_not_sampled_yet_is_expected_as_long_as_the_round_before(packed):
    prompts, rounds, sources, *_ = packed
    run = config_file.parse(RunConfig, {"packing": {"row_length": 256}, "sampling": {"max_new_tokens": 20}}, "test")
    before = {r.round: r for r in rounds[:2]}
    ahead, _ = cost.round_work(prompts, before, {r: sources[r] for r in (0, 1)}, [2, 1, 0], run)
    lengths = lambda tokens: sum(min(len(r), 20) for r in tokens)
    distinct = sum(
        len(r) for tree in prefix_trees.trees_of_window(prompts, rounds[:2], sources) for r in tree.responses
    )
    assert ahead.training.predictions == 6 * (distinct + lengths(rounds[1].tokens))
    first, _ = cost.round_work(prompts, {}, {}, [0], run)
    targets = sum(len(y) for y in prompts.target_tokens)
    assert first.scoring.predictions == targets + lengths(prompts.target_tokens)
    assert TARGET not in before
