"""Arrays of different lengths in one buffer behave as a list of them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tpaw_jax import types
from tpaw_jax.types import Generations, Prompts, Ragged

ITEMS = st.lists(st.lists(st.integers(0, 99), max_size=5), max_size=8)


def lists(items):
    return [item.tolist() for item in items]


@given(items=ITEMS, data=st.data())
def test_items_are_those_of_a_list(items, data):
    ragged = Ragged.of(np.array(item, np.int32) for item in items)
    assert lists(ragged) == items == [ragged[i].tolist() for i in range(len(ragged))]
    assert ragged.lengths.tolist() == [len(item) for item in items]
    low, high = sorted(data.draw(st.tuples(st.integers(0, 8), st.integers(0, 8))))
    assert lists(ragged[low:high]) == items[low:high]
    chosen = data.draw(st.lists(st.integers(0, len(items) - 1), max_size=9)) if items else []
    taken = ragged.take(chosen)
    assert lists(taken) == [items[i] for i in chosen]
    assert np.shares_memory(taken.buffer, ragged.buffer) or not ragged.buffer.size
    for some in (ragged, taken, ragged[low:high]):
        assert some.flat().tolist() == [value for item in some for value in item]


def test_items_out_of_order_are_joined_a_part_at_a_time(monkeypatch):
    monkeypatch.setattr(types, "_ITEMS_AT_ONCE", 3)
    ragged = Ragged.of(np.full(i % 4, i, np.int32) for i in range(11))
    order = [7, 0, 3, 3, 10, 8, 1]
    assert ragged.take(order).flat().tolist() == [i for i in order for _ in range(i % 4)]


def test_zeros_share_their_memory():
    ragged = Ragged.zeros(np.array([3, 0, 5]))
    assert lists(ragged) == [[0] * 3, [], [0] * 5]
    assert ragged.buffer.size == 5


def test_prompts_and_generations_take_any_sequence_of_arrays():
    texts = [np.array([4, 5], np.int32), np.array([6], np.int32)]
    prompts = Prompts(np.arange(2, dtype=np.int32), tuple(texts), texts)
    assert lists(prompts.prompt_tokens) == lists(prompts.target_tokens) == [[4, 5], [6]]
    assert len(prompts.rejected_tokens) == 0
    assert lists(prompts.take([1]).target_tokens) == [[6]]
    generations = Generations(0, texts, [np.array([-0.5, -1.0]), np.array([-2.0])])
    assert generations.log_probs.buffer.dtype == np.float32
    assert lists(generations.log_probs) == [[-0.5, -1.0], [-2.0]]
    assert len(Generations(0, texts, ()).log_probs) == 0
