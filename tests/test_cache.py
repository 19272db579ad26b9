"""The pages of keys and values: attention over them, writing into them, and whose they are."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpaw_jax.models import cache
from tpaw_jax.models.attention import attend
from tpaw_jax.models.dots import ANY_ORDER, dots
from tpaw_jax.pages import Pages


def pages_of(rng, positions, shards=1, heads=2, size=8):
    """A pool whose pages lie in random order, the table of it, and each slot's sequence [S, K, C, H]."""
    slots, blocks = len(positions) // shards, 3
    account = Pages(shards, slots, slots * blocks + 2, blocks)
    for s in rng.permutation(slots):  # pages are not in the order of slots
        needed = np.zeros((shards, slots), int)
        needed[:, s] = np.asarray(positions).reshape(shards, slots)[:, s] + 1
        assert account.reserve(needed) == 0
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    layer = cache.LayerPages(
        draw(shards, account.pages, heads, cache.PAGE, size), draw(shards, account.pages, heads, size, cache.PAGE)
    )
    return account, layer


def in_rows(layer):
    """The same pool as it is kept on a TPU."""
    row = lambda x: x.reshape(*x.shape[:3], -1)
    return cache.LayerPages(row(layer.keys.swapaxes(2, 3)), row(layer.values.transpose(0, 1, 4, 2, 3)))


@pytest.mark.parametrize("kept", [lambda layer: layer, in_rows])
@pytest.mark.parametrize(("heads", "group", "size"), [(2, 3, 8), (4, 1, 64), (3, 3, 64), (1, 10, 64), (2, 3, 128)])
@pytest.mark.parametrize("shards", [1, 2])
def test_attention_over_pages_is_attention_over_sequences(shards, heads, group, size, kept):
    rng = np.random.default_rng(0)
    positions = np.array([0, 63, 64, 130])
    account, layer = pages_of(rng, positions, shards, heads, size)
    by_shard = lambda x: x.reshape(shards, 4 // shards, *x.shape[1:])
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    queries, own_keys, own_values = draw(4, group * heads, size), draw(4, heads, size), draw(4, heads, size)
    found = cache.attend_pages(
        *map(by_shard, (queries, own_keys, own_values)), kept(layer), account.table(), by_shard(positions)
    ).reshape(queries.shape)
    for i, position in enumerate(positions):
        r, s = divmod(i, 4 // shards)
        held = account.of_slot(r, s)
        keys = jnp.concatenate([layer.keys[r, page] for page in held], axis=1)
        values = jnp.concatenate([layer.values[r, page].swapaxes(1, 2) for page in held], axis=1)
        keys, values = keys.at[:, position].set(own_keys[i]), values.at[:, position].set(own_values[i])
        mask = jnp.arange(keys.shape[1]) <= position
        expected = attend(queries[i][None, None], keys[None], values[None], mask[None, None])[0, 0]
        np.testing.assert_allclose(found[i], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kept", [lambda layer: layer, in_rows])
def test_an_idle_slot_attends_to_its_own_token_alone(kept):
    rng = np.random.default_rng(3)
    account, layer = pages_of(rng, np.array([5, 64, 130]))
    account.release(0, 1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    values = draw(1, 3, 2, 8)
    positions = jnp.array([[5, 64, 130]])
    found = cache.attend_pages(draw(1, 3, 6, 8), draw(1, 3, 2, 8), values, kept(layer), account.table(), positions)
    np.testing.assert_allclose(found[0, 1].reshape(2, 3, 8), np.broadcast_to(values[0, 1][:, None], (2, 3, 8)))


@pytest.mark.parametrize("kept", [lambda layer: layer, in_rows])
def test_a_token_is_written_into_its_slots_page_alone(kept):
    positions = np.array([[5, 64, 130]])
    account, layer = pages_of(np.random.default_rng(1), positions[0])
    account.release(0, 1)  # an idle slot writes nowhere
    new = jnp.arange(48.0).reshape(1, 3, 2, 8)
    written = cache.write_token(kept(layer), account.table(), positions, new, -new)
    keys, values = layer.keys, layer.values
    for slot in (0, 2):
        page, offset = account.of_slot(0, slot)[positions[0, slot] // cache.PAGE], positions[0, slot] % cache.PAGE
        keys = keys.at[0, page, :, offset].set(new[0, slot])
        values = values.at[0, page, :, :, offset].set(-new[0, slot])
    chex.assert_trees_all_equal(written, kept(cache.LayerPages(keys, values)))


def test_prompts_are_written_alike_into_both_kinds_of_pool():
    rng = np.random.default_rng(2)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    keys, values = draw(3, 1, 150, 2, 8), draw(3, 1, 150, 2, 8)
    starts, pages = jnp.array([[0, 64, 20]]), jnp.array([[3, 1, 5]])  # the last is beyond the pool
    pools = [cache.empty(3, 1, 5, 2, 8, jnp.float32, rows) for rows in (False, True)]
    heads_apart, rows = (cache.write_prompts(pool, keys, values, starts, pages) for pool in pools)
    chex.assert_trees_all_equal(tuple(map(in_rows, heads_apart)), rows)
    np.testing.assert_array_equal(rows[2].keys[0, 1], keys[2, 0, 64:128].reshape(64, 16))
    assert not rows[2].keys[0, 0].any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("vectors", [1, 8, 19])
def test_dots_are_products(vectors, dtype):
    rng = np.random.default_rng(4)
    matrix, some = (jnp.asarray(rng.normal(size=(3, n, 70)), dtype) for n in (5, vectors))
    found = jax.jit(dots, compiler_options=ANY_ORDER)(matrix, some)
    expected = np.einsum("bfd,bnd->bnf", *(np.asarray(x, np.float64) for x in (matrix, some)))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_a_page_never_has_two_owners(data):
    shards, slots, blocks = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 4)))
    account = Pages(shards, slots, data.draw(st.integers(blocks, slots * blocks)), blocks)
    held = np.zeros((shards, slots), int)  # tokens
    for _ in range(data.draw(st.integers(1, 12))):
        shard, slot = data.draw(st.integers(0, shards - 1)), data.draw(st.integers(0, slots - 1))
        if data.draw(st.booleans()):
            wanted = held.copy()
            wanted[shard, slot] = data.draw(st.integers(0, blocks * cache.PAGE))
            lacking = account.reserve(wanted)
            if lacking:
                order = account.resize(np.tile(np.arange(slots), (shards, 1)), account.pages + lacking)
                assert order.shape == (shards, account.pages)
                assert account.reserve(wanted) == 0
            held = np.maximum(held, wanted)
        else:
            account.release(shard, slot)
            held[shard, slot] = 0
        table = account.table()
        for r in range(shards):
            pages = [page for s in range(slots) for page in account.of_slot(r, s)]
            assert len(set(pages)) == len(pages)
            for s in range(slots):
                mine = account.of_slot(r, s)
                assert len(mine) * cache.PAGE >= held[r, s]
                np.testing.assert_array_equal(table.of_slot[r, s][: len(mine)], mine)
                assert (table.of_slot[r, s][len(mine) :] == account.pages).all()
                assert (table.owner[r, mine] == s).all()
                np.testing.assert_array_equal(table.first[r, mine], cache.PAGE * np.arange(len(mine)))
            free = sorted(set(range(account.pages)) - set(pages))
            assert (table.first[r, free] > 1 << 20).all()
