"""The store: whole on disk, each (player, response) scored once, damage found."""

import numpy as np
import pytest
from conftest import random_prompts

from tpaw_jax.config import PackingConfig
from tpaw_jax.data import packing, prefix_trees
from tpaw_jax.selfplay import round_store
from tpaw_jax.storage import journal
from tpaw_jax.types import Prompts

PACKING = PackingConfig(row_length=160, max_responses_per_row=12)


@pytest.fixture
def world(tmp_path):
    prompts, rounds = random_prompts(np.random.default_rng(0), 6)
    store = round_store.open_store(journal.open_journal(tmp_path), prompts)
    for generations in rounds:
        store = round_store.append(store, generations)
    trees = prefix_trees.trees_of_window(prompts, [store.generations[r] for r in (2, 1, 0)], store.sources)
    return store, trees, packing.pack(trees, PACKING), rounds


def opinion(rows, player):
    """A made-up score that names player, prompt and source."""
    return -(player * 1000 + rows.prompt_index * 10 + rows.source + 1).astype(np.float32)


def test_generations_and_scores_come_back_from_disk(world):
    store, _, rows, rounds = world
    round_store.add_scores(store, 2, 5, rows, opinion(rows, 5))
    again = round_store.open_store(journal.open_journal(store.journal.directory), store.prompts)
    for generations in rounds:
        for a, b in zip(again.generations[generations.round].tokens, generations.tokens, strict=True):
            np.testing.assert_array_equal(a, b)
    scores = round_store.team_scores(again, rows, [5], n_max=3)
    real = rows.prompt_index >= 0
    np.testing.assert_array_equal(scores.log_probs[0][real], opinion(rows, 5)[real])
    assert scores.player_mask.tolist() == [True, False, False]


def test_nothing_is_scored_twice(world):
    store, trees, rows, _ = world
    responses = lambda found: sum(len(t.responses) for t in found)
    assert responses(round_store.missing(store, 1, trees)) == responses(trees)
    earlier = prefix_trees.trees_of_window(store.prompts, [store.generations[r] for r in (1, 0)], store.sources)
    earlier_rows = packing.pack(earlier, PACKING)
    round_store.add_scores(store, 1, 1, earlier_rows, opinion(earlier_rows, 1))
    left = round_store.missing(store, 1, trees)
    # Only what round 2 sampled anew is left: equal texts and targets have been scored.
    assert {source for tree in left for source in tree.sources} == {2}
    assert responses(left) == int((store.sources[2] == 2).sum())
    left_rows = packing.pack(left, PACKING)
    round_store.add_scores(store, 2, 1, left_rows, opinion(left_rows, 1))
    assert len(round_store.missing(store, 1, trees)) == 0
    scores = round_store.team_scores(store, rows, [1], n_max=1)
    real = rows.prompt_index >= 0
    np.testing.assert_array_equal(scores.log_probs[0][real], opinion(rows, 1)[real])


def test_echoes_are_counted(world):
    store, _, _, rounds = world
    equal = sum(np.array_equal(g, y) for g, y in zip(rounds[1].tokens, store.prompts.target_tokens, strict=True))
    assert store.copies_of_target(1) == equal >= 1


def test_missing_scores_are_told(world):
    store, _, rows, _ = world
    with pytest.raises(ValueError, match="player 4 has no finite score for prompt"):
        round_store.team_scores(store, rows, [4], n_max=3)


def test_damage_and_other_data_are_told(world):
    store = world[0]
    path = store.journal.directory / "round_0001" / "generations.npz"
    content = path.read_bytes()
    other = Prompts(store.prompts.ids[:3], store.prompts.prompt_tokens[:3], store.prompts.target_tokens[:3])
    with pytest.raises(ValueError, match="answer other prompts than the 3 of this configuration"):
        round_store.open_store(store.journal, other)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"round_0001/generations.npz: the file is damaged"):
        round_store.open_store(store.journal, store.prompts)
