"""Prefix trees: layout, packing, and the tokens they save."""

import sys

import numpy as np
import pytest
from conftest import ROOT, random_conversations, random_prompts
from hypothesis import given, settings
from hypothesis import strategies as st

from tpaw_jax.config import PackingConfig
from tpaw_jax.data import packing, prefix_trees, segments
from tpaw_jax.models.attention import Visibility, visible
from tpaw_jax.types import NOTHING, TARGET, Generations, Prompts, Ragged, TeamScores

sys.path.insert(0, str(ROOT / "benchmarks"))
import common


def pack_window(seed, count, n_max=3, draw=random_prompts, **config):
    prompts, rounds = draw(np.random.default_rng(seed), count)
    window = rounds[::-1][:n_max]
    trees = prefix_trees.trees_of_window(prompts, window, prefix_trees.first_sources(prompts, rounds))
    return prompts, rounds, trees, packing.pack(trees, PackingConfig(**{"row_length": 160, **config}))


def test_sources_default_to_those_of_the_window():
    prompts, rounds, *_ = pack_window(0, 4)
    expected = prefix_trees.trees_of_window(prompts, rounds, prefix_trees.first_sources(prompts, rounds))
    for tree, other in zip(prefix_trees.trees_of_window(prompts, rounds), expected, strict=True):
        assert (tree.sources, tree.triplets) == (other.sources, other.triplets)


def test_automatic_rows_per_batch_count_as_one():
    _, _, trees, rows = pack_window(0, 4)
    for name, array in vars(packing.pack(trees, PackingConfig(row_length=160)).batch).items():
        np.testing.assert_array_equal(array, getattr(rows.batch, name))
    one, automatic = (PackingConfig(row_length=160, rows_per_batch=n) for n in (1, 0))
    assert packing.most_micro_batches(8, 40, automatic) == packing.most_micro_batches(8, 40, one)
    assert packing.empty_step(automatic, 3, 2)[0].tokens.shape == (2, 1, 160)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(2, 12),
    row_length=st.sampled_from([160, 300, 512]),
    draw=st.sampled_from([random_prompts, random_conversations]),
)
def test_rows_hold_every_triplet_once_and_nothing_else(seed, count, row_length, draw):
    prompts, rounds, _, rows = pack_window(seed, count, draw=draw, row_length=row_length)
    seen = np.asarray(visible(Visibility.of(rows.batch)))
    found = []
    for row in range(len(rows)):
        b = {name: np.asarray(getattr(rows.batch, name)[row]) for name in rows.batch.__dataclass_fields__}
        texts = {}
        for response in np.unique(b["response_ids"][b["response_ids"] < rows.prompt_index.shape[1]]):
            of_response = b["response_ids"] == response
            texts[response] = b["labels"][of_response].tolist()
            prompt = prompts.prompt_tokens[rows.prompt_index[row, response]].tolist()
            # A token is predicted from the prompt and the response's tokens before it, each at its position.
            for i, place in enumerate(b["hidden_index"][of_response]):
                context = seen[row, place]
                assert b["tokens"][context].tolist() == prompt + texts[response][:i]
                assert b["positions"][context].tolist() == list(range(len(prompt) + i))
        for target, generated, weight in zip(
            b["triplet_target"], b["triplet_generated"], b["triplet_weight"], strict=True
        ):
            i = rows.prompt_index[row, target]
            found += [(int(i), tuple(texts[target]), tuple(texts[generated]))] * int(weight)
    expected = [
        (i, tuple(prompts.target_tokens[i].tolist()), tuple(g.tokens[i].tolist()))
        for g in rounds
        for i in range(len(prompts))
    ]
    assert sorted(found) == sorted(expected)


def test_sources_of_a_new_round_follow_from_those_of_the_rounds_before():
    prompts, rounds = random_prompts(np.random.default_rng(4), 30)
    empty = np.zeros(0, np.int32)
    rounds[2] = Generations(2, [*rounds[0].tokens[:3], *rounds[2].tokens[3:]], NOTHING)
    prompts = Prompts(prompts.ids, prompts.prompt_tokens, [*prompts.target_tokens[:29], empty])
    almost = [np.append(tokens[:-1], tokens[-1] + 1).astype(np.int32) for tokens in rounds[1].tokens[5:9]]
    rounds.append(Generations(3, [*rounds[2].tokens[:5], *almost, *rounds[1].tokens[9:29], empty], NOTHING))
    whole = prefix_trees.first_sources(prompts, rounds)
    known: dict = {}
    for n in range(4):
        known = prefix_trees.first_sources(prompts, rounds[: n + 1], known)
    expected = []
    for i in range(30):
        seen = {bytes(prompts.target_tokens[i]): TARGET}
        expected.append([seen.setdefault(bytes(g.tokens[i]), g.round) for g in rounds])
    for r in range(4):
        assert whole[r].tolist() == known[r].tolist() == [row[r] for row in expected]
    assert {0, 1, 2, TARGET} <= set(whole[3].tolist())


def test_equal_responses_are_computed_once_and_counted():
    prompts, rounds, trees, _ = pack_window(0, 4)
    sources = prefix_trees.first_sources(prompts, rounds)
    assert sources[1][0] == 0  # round 1 repeats round 0's response to prompt 0
    assert sources[1][1] == TARGET  # and the target of prompt 1
    assert len(trees[0].responses) == 2  # y and one generation, sampled in all three rounds
    assert trees[0].triplets == ((0, 1, 3),)
    assert (0, 0, 2) in trees[1].triplets  # y against itself keeps its gradient, twice
    assert sum(n for _, _, n in trees[1].triplets) == 3


def test_a_response_may_repeat_one_of_a_round_that_left_the_window():
    prompts, rounds = random_prompts(np.random.default_rng(0), 6)
    tokens = [rounds[0].tokens[i] if i % 2 else rounds[2].tokens[i] for i in range(6)]
    newest = Generations(3, tokens, NOTHING)
    sources = prefix_trees.first_sources(prompts, [*rounds, newest])
    assert 0 in sources[3]
    trees = prefix_trees.trees_of_window(prompts, [newest, rounds[2], rounds[1]], sources)
    for i, tree in enumerate(trees):
        texts = dict(zip(tree.sources, map(bytes, tree.responses), strict=True))
        for g in (newest, *rounds[1:]):
            assert texts[sources[g.round][i]] == bytes(g.tokens[i])
        assert (trees.sizes.tokens[i], trees.sizes.predictions[i]) == (tree.length, tree.predictions)
    alone = trees.only(trees.distinct == 0)  # of a player that has scored all but what round 0 sampled
    assert [tree.sources for tree in alone] == [(0,)] * len(alone)
    rows = packing.pack(alone, PackingConfig(row_length=160))
    labels = sorted(rows.batch.labels[rows.batch.response_ids < 64].tolist())
    of_round_0 = [tree.responses[tree.sources.index(0)] for tree in trees if 0 in tree.sources]
    assert labels == sorted(np.concatenate(of_round_0).tolist())


@pytest.mark.parametrize(("row_length", "most", "tokens"), [(60, 64, [59, 59, 59]), (200, 8, [74, 53])])
def test_the_parts_of_a_tree_that_does_not_fit_share_its_prompt(row_length, most, tokens):
    prompts = Prompts(np.zeros(1, np.int32), [np.arange(50, dtype=np.int32)], [np.zeros(1, np.int32)])
    responses = {k: Ragged.of([np.full(4, k, np.int32)]) for k in range(9)}
    config = PackingConfig(row_length=row_length, max_responses_per_row=most)
    found = segments.segments_of(prefix_trees.trees_of_responses(prompts, responses), config)
    assert [segment.length for segment in found] == tokens == found.sizes.tokens.tolist()


def test_the_sizes_of_segments_are_those_of_each():
    for draw in (random_prompts, random_conversations):
        _, _, trees, rows = pack_window(5, 9, draw=draw)
        for i, tree in enumerate(trees):
            expected = (tree.length, tree.predictions, len(tree.responses), sum(n for *_, n in tree.triplets))
            assert tuple(trees.sizes.take(i))[:4] == expected
        for i, segment in enumerate(rows.segments):
            assert tuple(rows.segments.sizes.take(i)) == segment.sizes


def test_the_last_token_of_a_response_takes_no_space():
    prompts, _, trees, rows = pack_window(3, 5)
    assert sum(t.length for t in trees) == (np.asarray(rows.batch.segment_ids) > 0).sum()
    one = prefix_trees.trees_of_targets(prompts)[0]
    assert one.length == len(prompts.prompt_tokens[0]) + len(prompts.target_tokens[0]) - 1


def test_a_tree_longer_than_a_row_is_split_and_one_that_cannot_be_is_an_error():
    _, _, trees, _ = pack_window(1, 6)
    longest = max(trees, key=lambda t: t.length)
    alone = trees.take([longest.index])
    parts = packing.pack(alone, PackingConfig(row_length=longest.length - 1))
    assert len(parts) >= 2
    assert parts.triplets.sum() == sum(n for *_, n in longest.triplets)
    with pytest.raises(ValueError, match=f"Prompt {longest.prompt}: .* exceed a row of 8 tokens"):
        packing.pack(alone, PackingConfig(row_length=8))


def test_the_turns_of_a_conversation_share_what_they_begin_with():
    ids = lambda first, count: np.arange(first, first + count, dtype=np.int32)
    dialog = ids(0, 100)
    start, end = (10, 40, 80), (20, 55, 100)  # of the three targets
    prompts = Prompts(
        np.arange(4, dtype=np.int32),
        (*(dialog[:n] for n in start), ids(500, 30)),  # the last prompt begins otherwise, for example: it was truncated
        (*(dialog[a:b] for a, b in zip(start, end, strict=True)), ids(600, 5)),
        conversations=np.zeros(4, np.int32),
    )
    config = PackingConfig(row_length=256)
    trees = prefix_trees.trees_of_targets(prompts)
    joined, alone = segments.segments_of(trees, config)
    assert joined.length == 99  # of the targets, only the last takes tokens, all but its end
    assert alone.length == 34
    responses = Ragged.of(np.full(6, 7 + i, np.int32) for i in range(4))
    trees = prefix_trees.trees_of_responses(prompts, {0: responses})
    assert [s.length for s in segments.segments_of(trees, config)] == [80 + 3 * 5, 30 + 5]
    one_by_one = segments.segments_of(trees, PackingConfig(row_length=89))  # the third response does not fit
    assert [len(s.trees) for s in one_by_one] == [1, 2, 1]


def test_what_a_prompt_adds_to_the_shared_part_is_repeated_before_each_response():
    history, lead = np.arange(50, dtype=np.int32), np.array([900, 901], np.int32)
    prompts = Prompts(
        np.arange(2, dtype=np.int32),
        (np.concatenate([history[:30], lead]), np.concatenate([history, lead])),
        (history[30:40], history[:9]),
        conversations=np.array([5, 5], np.int32),
    )
    config = PackingConfig(row_length=256)
    found = segments.segments_of(prefix_trees.trees_of_targets(prompts), config)
    assert [s.length for s in found] == [52 + (2 + 9) + 8]
    # 20 leads of 2 tokens: no fewer than the 30 that are shared
    nothing = np.zeros(0, np.int32)
    many = {r: Ragged.of([np.full(9, r, np.int32), history[:9] if r == 0 else nothing]) for r in range(20)}
    trees = prefix_trees.trees_of_responses(prompts, many)
    assert [s.length for s in segments.segments_of(trees, config)] == [52 + 8, 32 + 20 * 8]


def test_rows_are_well_filled():
    _, _, _, rows = pack_window(2, 60, row_length=512)
    assert rows.fill > 0.85


def test_a_step_has_the_rows_that_come_nearest_to_its_triplets():
    two, automatic = PackingConfig(rows_per_batch=2), PackingConfig()
    assert packing.rows_per_step(21.2, 64, two, most=4) == 3
    assert packing.rows_per_step(21.2, 64, two, most=1) == 2  # all that a step has room for
    assert packing.rows_per_step(21.2, 64, automatic, most=4) == 3
    assert packing.rows_per_step(500.0, 64, two, most=4) == 1
    assert packing.rows_per_step(0.4, 8, two, most=9) == 8  # rows of rejected responses may hold no triplet
    assert packing.rows_per_step(21.2, "auto", PackingConfig(rows_per_batch=16), most=1) == 16
    assert packing.most_micro_batches("auto", 1280, two) == 1


def test_steps_are_padded_to_full_batches_and_scores_follow_their_rows():
    _, _, _, rows = pack_window(4, 20)
    order = packing.epoch_order(rows, seed=1, round_number=0, epoch=0)
    assert sorted(order) == list(range(len(rows)))
    assert (order != packing.epoch_order(rows, seed=1, round_number=0, epoch=1)).any()
    scores = TeamScores(np.arange(3 * len(rows) * 64, dtype=np.float32).reshape(3, len(rows), 64), np.ones(3, bool))
    batch, chosen, used = packing.step_batch(rows, scores, order[:3], rows_per_batch=2, most_micro_batches=4)
    assert used == 2
    assert batch.tokens.shape == (4, 2, 160)
    np.testing.assert_array_equal(batch.tokens.reshape(8, 160)[:3], rows.batch.tokens[order[:3]])
    np.testing.assert_array_equal(chosen.log_probs[1, :, 0], scores.log_probs[:, order[2]])
    assert batch.triplet_weight.reshape(8, -1)[3:].sum() == 0


@pytest.mark.parametrize(("rows_per_batch", "room"), [(1, 20), (16, 1), (256, 1)])
def test_a_step_has_room_for_the_micro_batches_that_rounds_ask_for(rows_per_batch, room):
    config = PackingConfig(rows_per_batch=rows_per_batch)
    most = packing.most_micro_batches(64, 1024 + 256, config)
    assert most == room
    for responses in (1, 2, 3):  # rounds 0, 1 and 2
        longest = trees_of_lengths(np.full(400, 512), np.full(400, 512), np.full((400, responses), 256))
        for trees in (longest, ultrachat_like(2000, 1, 0)):
            rows = packing.pack(trees, config)
            wanted = packing.rows_per_step(float(rows.triplets.mean()), 64, config, most=100)
            assert wanted <= most * rows_per_batch


def first_fit(needs, capacity):
    """The bin of each item, by trying every bin."""
    free, chosen = [], []
    for item in needs:
        room = (k for k, left in enumerate(free) if all(have >= need for have, need in zip(left, item, strict=True)))
        place = next(room, len(free))
        if place == len(free):
            free.append(list(capacity))
        free[place] = [have - need for have, need in zip(free[place], item, strict=True)]
        chosen.append(place)
    return chosen


@settings(deadline=None, max_examples=60)
@given(
    items=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 9), st.integers(0, 3)), max_size=80),
    decreasing=st.booleans(),
)
def test_bins_are_those_of_first_fit(items, decreasing):
    """Also where each need has room in a bin of its own, but none has room for all of them."""
    items = sorted(items, reverse=True) if decreasing else items
    bins = packing.Bins((12, 9, 3))
    assert [bins.add(item) for item in items] == first_fit(items, (12, 9, 3))
    for free in bins._free:  # a node that says more than is below it costs only time
        assert free[1 : len(free) // 2] == [max(pair) for pair in zip(free[2::2], free[3::2], strict=True)]


def test_an_item_that_no_bin_can_hold_is_refused():
    with pytest.raises(ValueError, match=r"needs \(3, 5, 1\) does not fit into a bin of \(4, 4, 4\)"):
        packing.Bins((4, 4, 4)).add((3, 5, 1))


def trees_of_lengths(x, y, generated):
    """Trees of distinct responses of zeros; `generated` is [trees, rounds]."""
    prompts = Prompts(np.arange(len(x), dtype=np.int32), Ragged.zeros(x), Ragged.zeros(y))
    window = [Generations(t, Ragged.zeros(lengths), NOTHING) for t, lengths in enumerate(generated.T)]
    sources = {g.round: np.full(len(x), g.round) for g in window}
    return prefix_trees.trees_of_window(prompts, window, sources)


def ultrachat_like(count, scale, seed):
    """Trees of three generations: log-normal lengths, cut at 512, 512 and 256 tokens times `scale`."""
    rng = np.random.default_rng(seed)
    of = lambda median, sigma, cap, shape: np.clip(
        np.round(rng.lognormal(np.log(median * scale), sigma, shape)), 4, cap * scale
    ).astype(int)
    x, y, g = of(160, 0.7, 512, count), of(280, 0.6, 512, count), of(240, 0.5, 256, (count, 3))
    return trees_of_lengths(x, y, g)


def test_rows_of_the_default_length_are_full_at_the_papers_scale():
    assert packing.pack(ultrachat_like(2000, 1, 0), PackingConfig()).fill >= 0.97


@pytest.mark.parametrize("seed", range(3))
def test_a_small_set_is_packed_full_in_rows_of_the_right_length(seed):
    trees = ultrachat_like(24, 0.25, seed)
    length = common.fullest_row_length(trees, PackingConfig(), range(768, 2049, 64))
    assert packing.pack(trees, PackingConfig(row_length=length)).fill >= 0.92


def test_row_lengths_below_the_longest_tree_are_an_error():
    with pytest.raises(ValueError, match=r"longest tree has \d+ tokens, more than every row length in \[64\]"):
        common.fullest_row_length(ultrachat_like(3, 0.25, 0), PackingConfig(), [64])


def test_rows_suit_the_devices():
    packing.check_rows(row_length=256, rows_per_batch=4, shards=2, multiple=128)
    with pytest.raises(ValueError, match=r"rows_per_batch is 3; it must be a multiple of the 2 devices"):
        packing.check_rows(256, 3, 2, 128)
    with pytest.raises(ValueError, match=r"row_length is 200; attention on TPU needs a multiple of 128"):
        packing.check_rows(200, 4, 2, 128)
