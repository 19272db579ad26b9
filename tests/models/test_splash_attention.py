"""Attention on TPU: the splash kernel under the tree's rule, in interpret mode on CPU, and compiled for real chips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_conversations, random_prompts
from hypothesis import given, settings
from hypothesis import strategies as st

from tpaw_jax.config import PackingConfig
from tpaw_jax.data import packing, prefix_trees
from tpaw_jax.models import splash_attention as splash
from tpaw_jax.models.attention import EINSUM, Visibility, visible


def packed(seed, length, rows, count=6, longest=60):
    """The visibility of rows as `packing.pack` makes them for splash attention."""
    draw, longest = (random_conversations, longest // 5) if seed % 2 else (random_prompts, longest)
    prompts, rounds = draw(np.random.default_rng(seed), count, longest=longest)
    trees = prefix_trees.trees_of_window(prompts, rounds, prefix_trees.first_sources(prompts, rounds))
    config = PackingConfig(row_length=length, alignment=splash.alignment(length))
    batch = packing.pack(trees, config).batch
    return Visibility(*(jnp.asarray(x[:rows]) for x in Visibility.of(batch)))


def output_and_gradients(attention, visibility, seed, heads=2, kv_heads=1, size=64):
    rows, length = visibility.segment_ids.shape
    rng = np.random.default_rng(seed)
    shapes = [(rows, length, n, size) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, weight = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    weight *= (visibility.segment_ids > 0)[..., None, None]

    def weighted(*x):
        out = weight * attention.attend(*x, attention.prepare(visibility))
        return jnp.sum(out), out

    return jax.jit(jax.grad(weighted, (0, 1, 2), has_aux=True))(q, k, v)


@settings(deadline=None, max_examples=5)
@given(seed=st.integers(0, 10**6), length=st.sampled_from([256, 384, 2048]), grouped=st.booleans())
def test_the_kernel_and_its_gradients_equal_the_dense_mask(seed, length, grouped):
    visibility = packed(seed, length, 2)
    heads = (4, 2) if grouped else (2, 2)
    found, expected = (
        output_and_gradients(attention, visibility, seed, *heads)
        for attention in (splash.splash_attention(interpret=True), EINSUM)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), found, expected)


@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 10**6), length=st.sampled_from([128, 512, 1024, 2048, 4096]))
def test_rules_and_blocks_say_what_the_dense_mask_says(seed, length):
    visibility = packed(seed, length, 1, count=12, longest=length // 8)
    rules = jax.jit(splash.plan)(visibility)
    places = jnp.broadcast_to(jnp.arange(length), (length, length))
    sees = jax.jit(splash._sees, static_argnums=0)
    seen = np.asarray(sees(length, jnp.broadcast_to(rules.rule[0][:, None], (length, length)), places))
    segments = np.asarray(visibility.segment_ids[0])
    seen = seen & (segments[:, None] == segments)
    real = segments > 0
    np.testing.assert_array_equal(seen[real], np.asarray(jax.jit(visible)(visibility))[0][real])
    assert seen.diagonal().all()  # padding too: an empty row of the softmax is not a number
    query, keys = splash._blocks(length)
    needed = np.asarray(seen).reshape(length // query, query, length // keys, keys).any(axis=(1, 3))
    np.testing.assert_array_equal(np.asarray(rules.blocks[0]) | needed, rules.blocks[0])


def test_alignments_leave_room_for_three_places_in_32_bits():
    found = {length: splash.alignment(length) for length in (128, 1024, 1472, 2048, 4096, 8192, 16384)}
    assert found == {128: 1, 1024: 1, 1472: 2, 2048: 2, 4096: 4, 8192: 16, 16384: 32}
    for length, step in found.items():
        assert (length - 1).bit_length() + 2 * (-(-length // step) - 1).bit_length() <= 32


def test_rows_that_the_kernel_cannot_take_are_refused():
    with pytest.raises(ValueError, match="multiple of 128"):
        splash.plan(Visibility(jnp.ones((1, 200), jnp.int32)))
