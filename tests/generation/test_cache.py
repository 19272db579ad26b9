"""The paged cache: attention over pages, writing into them, and their allocation."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import needs_compiler
from hypothesis import given, settings
from hypothesis import strategies as st

from tpaw_jax.generation import cache
from tpaw_jax.generation.cache import Pages
from tpaw_jax.generation.cpu import kernels
from tpaw_jax.models.attention.masks import attend
from tpaw_jax.models.rope import rope_angles, rotate


def make_pages(rng, positions, shards=1, heads=2, size=8):
    """An allocation whose pages are in random order, and a pool of random numbers."""
    slots, blocks = len(positions) // shards, 3
    allocation = Pages(shards, slots, slots * blocks + 2, blocks)
    for s in rng.permutation(slots):  # pages are not in the order of slots
        needed = np.zeros((shards, slots), int)
        needed[:, s] = np.asarray(positions).reshape(shards, slots)[:, s] + 1
        assert allocation.reserve(needed) == 0
    pool = lambda: jnp.asarray(rng.normal(size=(shards, allocation.pages, cache.PAGE, heads * size)), jnp.float32)
    return allocation, cache.LayerPages(pool(), pool())


def with_own(attend, queries, keys, values, layer, table, positions, angles=None, window=None):
    """Attention output and the pool with the new tokens, by the CPU kernel or by XLA.

    Queries and keys are rotated by `angles`, by default not at all.
    """
    if angles is None:
        angles = rope_angles(jnp.zeros_like(positions), np.zeros(queries.shape[-1] // 2))
    return _with_own(attend, queries, keys, values, layer, table, positions, angles, window)


@partial(jax.jit, static_argnums=(0, 8))
def _with_own(attend, queries, keys, values, layer, table, positions, angles, window):
    if attend == "kernel":
        heads, pools = jnp.concatenate([queries, keys, values], axis=2), (layer.keys, layer.values)
        found, *pools = kernels.attend_pages(heads, angles, *pools, table.of_slot, positions, window=window)
        return found, cache.LayerPages(*pools)
    queries, keys = rotate(queries, angles), rotate(keys, angles)
    found = cache.attend_pages(queries, keys, values, layer, table, positions, window=window)
    return found, cache.write_token(layer, table, positions, keys, values)


def both(test):
    return pytest.mark.parametrize("attend_by", ["xla", pytest.param("kernel", marks=needs_compiler)])(test)


@both
@pytest.mark.parametrize(
    ("heads", "group", "size"), [(2, 3, 8), (4, 1, 64), (3, 3, 64), (1, 10, 64), (1, 5, 64), (2, 7, 8), (2, 3, 128)]
)
@pytest.mark.parametrize("shards", [1, 2])
def test_attention_over_pages_is_attention_over_sequences(shards, heads, group, size, attend_by):
    rng = np.random.default_rng(0)
    positions = np.array([0, 63, 64, 130])
    allocation, layer = make_pages(rng, positions, shards, heads, size)
    by_shard = lambda x: x.reshape(shards, 4 // shards, *x.shape[1:])
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    queries, own_keys, own_values = draw(4, group * heads, size), draw(4, heads, size), draw(4, heads, size)
    found, _ = with_own(
        attend_by, *map(by_shard, (queries, own_keys, own_values)), layer, allocation.table(), by_shard(positions)
    )
    found = found.reshape(queries.shape)
    for i, position in enumerate(positions):
        r, s = divmod(i, 4 // shards)
        held = allocation.of_slot(r, s)
        of_heads = lambda x, r=r, held=held: x[r, np.array(held)].reshape(-1, heads, size).swapaxes(0, 1)
        keys = of_heads(layer.keys).at[:, position].set(own_keys[i])
        values = of_heads(layer.values).at[:, position].set(own_values[i])
        mask = jnp.arange(keys.shape[1]) <= position
        expected = jax.jit(attend)(queries[i][None, None], keys[None], values[None], mask[None, None])[0, 0]
        np.testing.assert_allclose(found[i], expected, rtol=1e-5, atol=1e-5)


@both
def test_an_idle_slot_attends_to_its_own_token_only(attend_by):
    rng = np.random.default_rng(3)
    allocation, layer = make_pages(rng, np.array([5, 64, 130]))
    allocation.release(0, 1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    values = draw(1, 3, 2, 8)
    positions = jnp.array([[5, 64, 130]])
    found, _ = with_own(attend_by, draw(1, 3, 6, 8), draw(1, 3, 2, 8), values, layer, allocation.table(), positions)
    np.testing.assert_allclose(
        found[0, 1].reshape(2, 3, 8), np.broadcast_to(values[0, 1][:, None], (2, 3, 8)), rtol=1e-6
    )


@both
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_token_is_written_only_into_its_slots_page(attend_by, dtype):
    positions = np.array([[5, 64, 130]])
    allocation, layer = make_pages(np.random.default_rng(1), positions[0])
    layer = jax.tree.map(lambda x: x.astype(dtype), layer)
    allocation.release(0, 1)  # an idle slot writes nowhere
    new = jnp.arange(48.0).reshape(1, 3, 2, 8) / 7
    _, written = with_own(attend_by, jnp.ones((1, 3, 6, 8)), new, -new, layer, allocation.table(), positions)
    keys, values = layer.keys, layer.values
    for slot in (0, 2):
        page, offset = allocation.of_slot(0, slot)[positions[0, slot] // cache.PAGE], positions[0, slot] % cache.PAGE
        keys = keys.at[0, page, offset].set(new[0, slot].reshape(16).astype(dtype))
        values = values.at[0, page, offset].set(-new[0, slot].reshape(16).astype(dtype))
    chex.assert_trees_all_equal(written, cache.LayerPages(keys, values))


@needs_compiler
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_cpu_kernel_equals_xla_in_both_dtypes(dtype):
    rng = np.random.default_rng(4)
    positions = np.array([[180, 3, 77, 129]])
    allocation, layer = make_pages(rng, positions[0], heads=3, size=40)
    layer = jax.tree.map(lambda x: (3 * x).astype(dtype), layer)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    of = draw(1, 4, 6, 40), draw(1, 4, 3, 40), draw(1, 4, 3, 40)
    angles = rope_angles(jnp.asarray(positions), 0.5 ** np.arange(20))
    found = {kind: with_own(kind, *of, layer, allocation.table(), positions, angles) for kind in ("xla", "kernel")}
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2  # XLA rounds the softmax weights to the cache's dtype
    chex.assert_trees_all_close(found["kernel"], found["xla"], rtol=tolerance, atol=tolerance)


@both
@pytest.mark.parametrize("window", [1, 5, 64, 65, 100, 1000])
def test_a_window_leaves_the_last_tokens(window, attend_by):
    rng = np.random.default_rng(3)
    positions = np.array([0, 63, 64, 130])
    allocation, layer = make_pages(rng, positions, heads=2, size=8)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    queries, keys, values = draw(1, 4, 4, 8), draw(1, 4, 2, 8), draw(1, 4, 2, 8)
    table = allocation.table()
    found, _ = with_own(attend_by, queries, keys, values, layer, table, positions[None], window=window)
    for slot, position in enumerate(positions):
        pages = np.array(allocation.of_slot(0, slot))
        held = [np.asarray(pool[0, pages]).reshape(-1, 2, 8)[:position] for pool in (layer.keys, layer.values)]
        k, v = (np.concatenate([x, own[:, slot]])[-window:] for x, own in zip(held, (keys, values), strict=True))
        q = np.asarray(queries[0, slot]).reshape(2, 2, 8)
        weights = jax.nn.softmax(jnp.einsum("kgh,tkh->kgt", q, k) * 8**-0.5)
        np.testing.assert_allclose(found[0, slot].reshape(2, 2, 8), jnp.einsum("kgt,tkh->kgh", weights, v), atol=1e-5)


@both
def test_a_window_does_not_need_the_pages_before_it(attend_by):
    rng = np.random.default_rng(3)
    positions = np.array([150, 63, 64, 130])
    allocation, layer = make_pages(rng, positions, heads=2, size=8)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    of = draw(1, 4, 4, 8), draw(1, 4, 2, 8), draw(1, 4, 2, 8)
    whole, used = allocation.table(), allocation.most_used
    allocation.expire(positions[None] + 1 - 20)
    assert [allocation.of_slot(0, s).count(cache.FREED) for s in range(4)] == [2, 0, 0, 1]
    assert allocation.most_used == used - 3
    found, written = with_own(attend_by, *of, layer, allocation.table(), positions[None], window=20)
    expected, as_before = with_own(attend_by, *of, layer, whole, positions[None], window=20)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(written.keys, as_before.keys)

    order = allocation.resize(np.array([[3, 0, 1, 2]]), allocation.most_used)
    assert [allocation.of_slot(0, s).count(cache.FREED) for s in range(4)] == [1, 2, 0, 0]
    assert order.shape == (1, used - 3)
    for slot in range(4):
        allocation.release(0, slot)
    assert allocation.most_used == 0


def test_prompts_are_written_page_by_page():
    rng = np.random.default_rng(2)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    keys, values = draw(3, 1, 150, 2, 8), draw(3, 1, 150, 2, 8)
    starts, pages = jnp.array([[0, 64, 20]]), jnp.array([[3, 1, 5]])  # the last is beyond the pool
    written = cache.write_prompts(cache.empty([16] * 3, 1, 5, jnp.float32), keys, values, starts, pages)
    for i, layer in enumerate(written):
        for pool, rows in ((layer.keys, keys), (layer.values, values)):
            np.testing.assert_array_equal(pool[0, 3], rows[i, 0, :64].reshape(64, 16))
            np.testing.assert_array_equal(pool[0, 1], rows[i, 0, 64:128].reshape(64, 16))
            assert not pool[0, jnp.array([0, 2, 4])].any()


@both
@pytest.mark.parametrize(("heads", "size"), [(2, 8), (3, 64), (2, 128)])
def test_shared_pages_give_the_same_attention_as_copies(attend_by, heads, size):
    rng = np.random.default_rng(6)
    shared, apart = Pages(2, 4, 12, 3, sharers=3), Pages(2, 4, 12, 3)
    positions = np.array([[130, 150, 64, 129], [70, 20, 140, 141]])
    assert shared.reserve(np.array([[131, 0, 65, 0], [71, 21, 0, 0]])) == 0
    shared.share(0, 1, 0, 2)
    shared.share(0, 3, 1, 2)
    shared.share(1, 3, 0, 1)
    assert shared.reserve(positions + 1) == 0
    assert apart.reserve(positions + 1) == 0
    assert (shared.most_used, apart.most_used) == (2 + 1 + 3 + 2, 3 + 3 + 2 + 3)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    pool = cache.LayerPages(draw(2, 12, cache.PAGE, heads * size), draw(2, 12, cache.PAGE, heads * size))
    pages = lambda allocation, r: np.concatenate([allocation.of_slot(r, s) for s in range(4)])
    copied = pool
    for r in range(2):
        copy = lambda x, old, r=r: x.at[r, pages(apart, r)].set(old[r, pages(shared, r)])
        copied = jax.tree.map(copy, copied, pool)
    of = draw(2, 4, 2 * heads, size), draw(2, 4, heads, size), draw(2, 4, heads, size)
    found, written = with_own(attend_by, *of, pool, shared.table(), positions)
    expected, of_copies = with_own(attend_by, *of, copied, apart.table(), positions)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    for r in range(2):
        np.testing.assert_array_equal(written.keys[r, pages(shared, r)], of_copies.keys[r, pages(apart, r)])


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_the_table_matches_the_allocation(data):
    shards, slots, blocks = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 4)))
    allocation = Pages(shards, slots, data.draw(st.integers(blocks, slots * blocks)), blocks, sharers=slots)
    held = np.zeros((shards, slots), int)  # tokens
    of = lambda r, s: allocation.of_slot(r, s)
    for _ in range(data.draw(st.integers(1, 12))):
        shard, slot, other = (data.draw(st.integers(0, n - 1)) for n in (shards, slots, slots))
        action = data.draw(st.sampled_from(["reserve", "release", "share", "reorder"]))
        before = {(r, s): of(r, s) for r in range(shards) for s in range(slots)}
        if action == "reserve":
            wanted = held.copy()
            wanted[shard, slot] = data.draw(st.integers(0, blocks * cache.PAGE))
            lacking = allocation.reserve(wanted)
            if lacking:
                order = allocation.resize(np.tile(np.arange(slots), (shards, 1)), allocation.pages + lacking)
                assert order.shape == (shards, allocation.pages)
                for (r, s), pages in before.items():
                    np.testing.assert_array_equal(order[r, np.array(of(r, s), int)], pages)
                assert allocation.reserve(wanted) == 0
            held = np.maximum(held, wanted)
        elif action == "release":
            allocation.release(shard, slot)
            held[shard, slot] = 0
        elif action == "reorder":  # of slots, with no more pages than are held
            order = np.array([data.draw(st.permutations(range(slots))) for _ in range(shards)])
            old = allocation.resize(order, max(1, allocation.most_used))
            held = np.take_along_axis(held, order, axis=1)
            for r in range(shards):
                for s in range(slots):
                    np.testing.assert_array_equal(old[r, np.array(of(r, s), int)], before[r, order[r, s]])
        elif not of(shard, slot):
            count = data.draw(st.integers(0, len(of(shard, other))))
            allocation.share(shard, slot, other, count)
            held[shard, slot] = cache.PAGE * count
            assert of(shard, slot) == of(shard, other)[:count]
        table = allocation.table()
        for r in range(shards):
            parts = [part for s in range(slots) for part in table.part[r, s, : len(of(r, s))]]
            assert len(set(parts)) == len(parts)
            for s in range(slots):
                own, count = of(r, s), len(of(r, s))
                assert count * cache.PAGE >= held[r, s]
                np.testing.assert_array_equal(table.of_slot[r, s][:count], own)
                assert (table.of_slot[r, s][count:] == allocation.pages).all()
                page, place = np.divmod(table.part[r, s][:count], slots)
                np.testing.assert_array_equal(page, own)
                assert (table.owner[r, page, place] == s).all()
                np.testing.assert_array_equal(table.first[r, page, place], cache.PAGE * np.arange(count))
            unowned = np.setdiff1d(np.arange(allocation.pages * slots), parts)
            assert (table.first[r].reshape(-1)[unowned] > 1 << 20).all()
        assert allocation.most_used == max(len({p for s in range(slots) for p in of(r, s)}) for r in range(shards))
