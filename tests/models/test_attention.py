"""The attention of TPU (in interpret mode) and GPU on CPU, against the dense mask, and how much they compute."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_conversations, random_prompts
from hypothesis import given, settings
from hypothesis import strategies as st

from tpaw_jax.config import PackingConfig
from tpaw_jax.data import packing, prefix_trees
from tpaw_jax.models.attention import EINSUM, TILES, Visibility, attention_of, gpu, rules, tpu, visible

TPU, GPU = tpu.tpu_attention(interpret=True), gpu.gpu_attention()
both = pytest.mark.parametrize("attention", [TPU, GPU], ids=["tpu", "gpu"])


def packed(seed, length, rows, count=6, longest=60):
    """The visibility of packed rows."""
    draw, longest = (random_conversations, longest // 5) if seed % 2 else (random_prompts, longest)
    prompts, rounds = draw(np.random.default_rng(seed), count, longest=longest)
    trees = prefix_trees.trees_of_window(prompts, rounds, prefix_trees.first_sources(prompts, rounds))
    batch = packing.pack(trees, PackingConfig(row_length=length)).batch
    return Visibility(*(jnp.asarray(x[:rows]) for x in Visibility.of(batch)))


def output_and_gradients(attention, visibility, seed, heads, kv_heads, *window, size=64, dtype=jnp.float32, **cap):
    rows, length = visibility.segment_ids.shape
    rng = np.random.default_rng(seed)
    shapes = [(rows, length, n, size) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, weight = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    weight *= (visibility.segment_ids > 0)[..., None, None]

    def weighted(*x):
        out = weight * attention.attend(*x, attention.prepare(visibility, *window), **cap)
        return jnp.sum(out.astype(jnp.float32)), out

    return jax.jit(jax.grad(weighted, (0, 1, 2), has_aux=True))(q, k, v)


def assert_equal_to_the_dense_mask(attention, visibility, seed, heads, kv_heads, *window, **cap):
    outputs = lambda one: output_and_gradients(one, visibility, seed, heads, kv_heads, *window, **cap)
    found, expected = outputs(attention), outputs(EINSUM)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), found, expected)


@both
@settings(deadline=None, max_examples=6)
@given(
    seed=st.integers(0, 10**6),
    length=st.sampled_from([128, 256, 384, 1024]),
    heads=st.sampled_from([(2, 2), (4, 2), (6, 2)]),
)
def test_attention_equals_the_dense_mask(attention, seed, length, heads):
    visibility = packed(seed, length, 2, longest=min(60, length // 6))
    assert_equal_to_the_dense_mask(attention, visibility, seed, *heads)


@pytest.mark.parametrize("attention", [TPU, GPU, TILES], ids=["tpu", "gpu", "tiles"])
@pytest.mark.parametrize(("seed", "window"), [(2, 1), (3, 7), (4, 40), (5, 300)])
def test_windows_are_those_of_the_dense_mask(attention, seed, window):
    """Smaller than a response, larger than a prompt, and larger than every sequence."""
    visibility = packed(seed, 384, 2, longest=90)
    assert_equal_to_the_dense_mask(attention, visibility, seed, 4, 2, window)


@pytest.mark.parametrize("attention", [TPU, GPU, TILES], ids=["tpu", "gpu", "tiles"])
@pytest.mark.parametrize(("seed", "window", "cap"), [(2, (), 0.5), (3, (7,), 3.0)])
def test_soft_caps_are_those_of_the_dense_mask(attention, seed, window, cap):
    """With random queries and keys, scores are around 1."""
    visibility = packed(seed, 384, 2, longest=90)
    assert_equal_to_the_dense_mask(attention, visibility, seed, 4, 2, *window, cap=cap)


@pytest.mark.parametrize("window", [1, 5, 33])
def test_a_window_counts_positions_of_the_sequence(window):
    """A response sees the end of its prompt, whatever lies between them in the row."""
    prompts, rounds = random_conversations(np.random.default_rng(1), 4)
    batch = packing.pack(prefix_trees.trees_of_window(prompts, rounds), PackingConfig(row_length=256)).batch
    seen = np.asarray(visible(Visibility.of(batch), window))
    every = np.asarray(visible(Visibility.of(batch)))
    distance = batch.positions[:, :, None] - batch.positions[:, None, :]
    np.testing.assert_array_equal(seen, every & (distance < window))
    real = batch.segment_ids > 0
    np.testing.assert_array_equal(seen.sum(2)[real], np.minimum(batch.positions + 1, window)[real])


@both
def test_without_branches_it_is_packed_causal_attention(attention):
    segments = jnp.repeat(jnp.arange(1, 5), jnp.array([200, 30, 100, 54]), total_repeat_length=384)[None]
    visibility = Visibility(jnp.where(segments == 4, 0, segments))  # with padding at the end
    assert_equal_to_the_dense_mask(attention, visibility, 0, 2, 1)


@pytest.mark.parametrize(("length", "rows"), [(200, 3), (1024, 5)])
def test_gpu_attention_takes_any_length_of_rows_and_several_batches(length, rows):
    """Rows of 200 tokens end within a block, and 40 blocks are a full batch and a part of one."""
    visibility = packed(2, length, rows, count=20 * rows, longest=length // 8)
    assert visibility.segment_ids.shape == (rows, length)
    assert_equal_to_the_dense_mask(GPU, visibility, 0, 4, 2)


def test_every_device_has_its_attention():
    class Device:
        def __init__(self, platform, kind):
            self.platform, self.device_kind = platform, kind

    assert attention_of(jax.devices()[0]) is TILES
    assert attention_of(Device("gpu", "NVIDIA H100 80GB HBM3"), 8).attend.func is gpu.attend_batches
    for kind, mebibytes in (("TPU v5 lite", 110), ("TPU v5p", 60), ("TPU v4", 16)):
        settings = attention_of(Device("tpu", kind), 8).attend.keywords
        assert settings == {"vmem": mebibytes * 2**20, "interpret": False, "chunks": 8}


@pytest.mark.parametrize("chunks", [1, 2, 8])
@pytest.mark.parametrize("build", [functools.partial(tpu.tpu_attention, interpret=True), gpu.gpu_attention])
def test_a_matmul_may_have_another_number_of_chunks(build, chunks):
    assert_equal_to_the_dense_mask(build(chunks=chunks), packed(4, 512, 2), 0, 4, 2)


@pytest.mark.parametrize(("mebibytes", "blocks", "buffers"), [(5, 1, 1), (6, 2, 1), (7, 4, 1)])
def test_a_small_vmem_gives_the_same_result(mebibytes, blocks, buffers):
    """Less VMEM means fewer blocks in a step of the grid, and one buffer for the keys."""
    visibility = packed(3, 1024, 1)
    options = tpu._options(jnp.zeros((1, 1, 2, 1024, 64)), tpu.Options(0, 0, 4, mebibytes * 2**20, True))
    assert options[:2] == (blocks, buffers)
    found, expected = (
        output_and_gradients(tpu.tpu_attention(vmem, interpret=True), visibility, 0, 2, 1)
        for vmem in (mebibytes * 2**20, tpu.VMEM)
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@both
def test_bfloat16_is_as_exact_as_the_dense_mask_in_bfloat16(attention):
    visibility = packed(0, 512, 1)
    exact = output_and_gradients(EINSUM, visibility, 0, 4, 2)
    error = lambda found: [
        float(jnp.max(jnp.abs(a - b))) for a, b in zip(*map(jax.tree.leaves, (found, exact)), strict=True)
    ]
    kernel, dense = (
        error(output_and_gradients(one, visibility, 0, 4, 2, dtype=jnp.bfloat16)) for one in (attention, EINSUM)
    )
    assert all(a < 1.5 * b for a, b in zip(kernel, dense, strict=True))


@settings(deadline=None, max_examples=12)
@given(
    seed=st.integers(0, 10**6),
    length=st.sampled_from([128, 512, 1024, 2048, 4096]),
    window=st.sampled_from([None, 1, 64, 200]),
)
def test_rules_and_chunks_say_what_the_dense_mask_says(seed, length, window):
    visibility = packed(seed, length, 1, count=12, longest=length // 8)
    planned = jax.jit(rules.plan, static_argnums=(1, 2))(visibility, rules.CHUNKS, window)
    ranges, chunks, matmuls = (np.asarray(x)[0] for x in planned)
    key, (trunk, end, branch, own) = np.arange(length), ranges[:, :, None]
    seen = ((key >= trunk) & (key < end)) | ((key >= branch) & (key <= own))
    np.testing.assert_array_equal(seen.any(axis=1), True)  # padding too: an empty row of the softmax is not a number
    real = np.asarray(visibility.segment_ids[0]) > 0
    expected = np.asarray(jax.jit(visible, static_argnums=1)(visibility, window))[0]
    np.testing.assert_array_equal(seen[real], expected[real])
    needed = seen.reshape(-1, rules.QUERIES, length // rules.CHUNK, rules.CHUNK).any(axis=(1, 3))
    for block, found in enumerate(chunks):
        np.testing.assert_array_equal(found[found >= 0], np.flatnonzero(needed[block]))
        assert matmuls[block] == -(-needed[block].sum() // rules.CHUNKS)


def test_rows_that_the_kernels_cannot_take_are_refused():
    with pytest.raises(ValueError, match="Rows of 200 tokens: attention on TPU needs a multiple of 128"):
        rules.plan(Visibility(jnp.ones((1, 200), jnp.int32)))
    with pytest.raises(ValueError, match="Rows of 65536 tokens: with heads of 128, their keys do not fit into"):
        tpu._options(jnp.zeros((1, 1, 1, 65536, 128), jnp.bfloat16), tpu.Options(0, 0, 4, tpu.VMEM, False))


def test_long_rows_take_more_memory_where_there_is_and_others_do_not():
    options = lambda length: tpu._options(
        jnp.zeros((1, 1, 1, length, 128), jnp.bfloat16), tpu.Options(0, 0, 4, 110 * 2**20, False)
    )
    assert [options(length).vmem // 2**20 for length in (8192, 32768, 65536)] == [60, 60, 110]
    assert [options(length)[:2] for length in (8192, 32768, 65536)] == [(4, 2), (4, 1), (4, 1)]
