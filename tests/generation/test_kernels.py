"""The CPU kernels: products whose rounding does not depend on the batch, and sampling with them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import needs_compiler, random_prompts
from hypothesis import given, settings
from hypothesis import strategies as st

from tpaw_jax.config import SamplingConfig
from tpaw_jax.generation import decode_step, engine
from tpaw_jax.generation.cpu import kernels
from tpaw_jax.generation.decoder import decoder_of
from tpaw_jax.generation.slots import make_sampler
from tpaw_jax.models import Transformer
from tpaw_jax.models.block import rms_norm
from tpaw_jax.types import PackedPrompts

DTYPES = st.sampled_from([jnp.float32, jnp.bfloat16])


def some(rng, shape, dtype):
    return jnp.asarray(np.asarray(rng.normal(size=shape), dtype))


@needs_compiler
@settings(deadline=None, max_examples=40)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 80), DTYPES, st.booleans())
def test_dot_is_the_product(rows, depth, count, dtype, normed):
    rng = np.random.default_rng(1)
    matrix, x = some(rng, (rows, depth), dtype), some(rng, (count, depth), jnp.float32)
    scale = some(rng, depth, jnp.float32) if normed else None
    found = jax.jit(lambda x, matrix, scale: kernels.dot(x, kernels.pack(matrix.T), scale, 1e-5))(x, matrix, scale)
    assert found.dtype == jnp.float32
    factor = (jax.jit(rms_norm, static_argnums=2)(x, scale, 1e-5) if normed else x).astype(dtype)
    expected = np.asarray(factor, np.float64) @ np.asarray(matrix, np.float64).T
    atol = 1e-5 if dtype == jnp.float32 or not normed else 0.1  # the last bit of a norm may round differently
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=atol)


@needs_compiler
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rounding_of_a_row_does_not_depend_on_the_batch(dtype):
    rng = np.random.default_rng(2)
    matrix, x = kernels.pack(some(rng, (579, 700), dtype)), some(rng, (300, 579), jnp.float32)
    scale = some(rng, 579, jnp.float32)
    together = kernels.dot(x, matrix, scale, 1e-5)
    for first, count in ((0, 1), (3, 8), (5, 16), (11, 29), (32, 32), (100, 200)):
        alone = kernels.dot(x[first : first + count], matrix, scale, 1e-5)
        np.testing.assert_array_equal(alone, together[first : first + count])


@needs_compiler
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_layer_of_a_stack_equals_a_matrix_of_its_own(dtype):
    rng = np.random.default_rng(4)
    stack, x, scales = some(rng, (3, 21, 40), dtype), some(rng, (5, 21), jnp.float32), some(rng, (3, 21), jnp.float32)
    packed = kernels.pack(stack)
    of_layer = lambda i: kernels.dot(x, packed, scales, 1e-5, i)
    of_all = jax.jit(lambda: jax.lax.map(of_layer, jnp.arange(3)))()
    for i in range(3):
        alone = kernels.dot(x, kernels.pack(stack[i]), scales[i], 1e-5)
        np.testing.assert_array_equal(of_all[i], alone)
        np.testing.assert_array_equal(of_layer(i), alone)
    for beyond in (3, -1):
        with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="there is no such layer"):
            of_layer(beyond).block_until_ready()


@given(st.integers(1, 40), st.integers(1, 9), DTYPES)
@settings(deadline=None, max_examples=20)
def test_take_returns_the_rows_unchanged(rows, depth, dtype):
    matrix = some(np.random.default_rng(3), (rows, depth), dtype)
    wanted = jnp.array([rows - 1, 0, rows // 2])
    found = jax.jit(lambda matrix: kernels.take(kernels.pack(matrix.T), wanted))(matrix)
    np.testing.assert_array_equal(found, np.asarray(matrix)[np.asarray(wanted)])


@needs_compiler
@pytest.mark.parametrize(("width", "scales"), [(24, 24), (16, 15)])
def test_rows_or_scales_of_the_wrong_width_are_an_error(width, scales):
    matrix, x = kernels.pack(jnp.ones((16, 32))), jnp.ones((8, width))
    with pytest.raises(
        (ValueError, jax.errors.JaxRuntimeError),
        match="the shapes or dtypes of the packed matrices, x, scale and the results",
    ):
        kernels.dot(x, matrix, jnp.ones(scales)).block_until_ready()


@needs_compiler
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_values_stay_in_their_row(dtype, bad):
    matrix, x = kernels.pack(jnp.ones((17, 20), dtype)), jnp.ones((9, 17)).at[4, 3].set(bad)
    found = kernels.dot(x, matrix)
    np.testing.assert_array_equal(np.isfinite(found).all(axis=1), np.arange(9) != 4)
    assert not np.isfinite(found[4]).any()


@needs_compiler
def test_prefill_of_several_rows_with_padding(stories):
    """Rows also have fewer prompts than they have room for; the unused entries point at the first token."""
    model, params = Transformer(stories[0]), stories[1]
    rng, rows = np.random.default_rng(7), ([9, 40, 3], [30])
    tokens, positions, segments = np.zeros((3, 2, 64), np.int32)
    first, lengths = np.zeros((2, 4), np.int32), np.ones((2, 4), np.int32)
    for r, row in enumerate(rows):
        for n, count in enumerate(row):
            first[r, n], lengths[r, n] = sum(row[:n]), count
            run = slice(first[r, n], first[r, n] + count)
            tokens[r, run], positions[r, run], segments[r, run] = rng.integers(3, 512, count), np.arange(count), n + 1
    prompts = PackedPrompts(tokens, positions, segments, first, lengths)
    weights = decode_step.decode_weights(model, params, packed=True)
    logits, (keys, values) = decode_step.prefill(model, weights, prompts, jnp.bfloat16)
    hidden, expected = model.apply({"params": params}, tokens, positions, segments, method="prefill")
    last = np.take_along_axis(np.asarray(hidden), (first + lengths - 1)[..., None], axis=1)
    real = first + lengths > 1
    expected_logits = model.apply({"params": params}, last, method="logits")
    np.testing.assert_allclose(logits[real], expected_logits[real], atol=1e-4)
    there = segments > 0
    for x, twin in ((keys, expected[0]), (values, expected[1])):
        assert x.dtype == jnp.bfloat16
        np.testing.assert_allclose(x[:, there].astype(jnp.float32), twin[:, there], rtol=5e-3, atol=1e-4)


@needs_compiler
def test_sampling_holds_no_second_copy_of_the_policy(stories):
    prompts = random_prompts(np.random.default_rng(8), 4)[0]
    decoder = decoder_of(Transformer(stories[0], dtype=jnp.bfloat16), cache_dtype="float32")
    sampler = make_sampler(decoder, SamplingConfig(max_new_tokens=3, slots=2), ())
    held = lambda: sum(x.nbytes for x in jax.live_arrays() if x.dtype == jnp.bfloat16)
    before, seen = held(), []

    def decode(weights, *rest):
        program = sampler.decode.lower(weights, *rest).as_text()
        assert "tpaw_packed_dot" in program
        assert "tpaw_attend_pages" in program
        matrices = sum(x.nbytes for x in jax.tree.leaves(weights) if x.dtype == jnp.bfloat16)
        seen.append((held() - before) / matrices)
        return sampler.decode(weights, *rest)

    watched = sampler._replace(decode=decode)
    engine.generate(watched, stories[1], prompts, seed=1, round_number=0)
    assert max(seen) < 1.01


@needs_compiler
@pytest.mark.parametrize(("dtype", "most"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.3)])
def test_the_sampler_works_without_kernels(stories, monkeypatch, all_passes, dtype, most):
    """Compared up to the first token that differs: only XLA rounds queries and softmax weights to bfloat16."""
    prompts = random_prompts(np.random.default_rng(5), 6, longest=150)[0]
    model, found = Transformer(stories[0], dtype=dtype), []
    for there in (True, False):
        monkeypatch.setattr(kernels, "available", lambda there=there: there)
        sampler = make_sampler(decoder_of(model), SamplingConfig(max_new_tokens=8, slots=3), ())
        found.append(engine.generate(sampler, stories[1], prompts, seed=3, round_number=2))
    with_kernels, without = found
    compared, gaps = 0, []
    for i, tokens in enumerate(with_kernels.tokens):
        alike = int(np.cumprod(tokens == without.tokens[i]).sum())
        gaps.extend(np.abs(with_kernels.log_probs[i] - without.log_probs[i])[:alike])
        compared += alike
    assert compared == 48 or dtype == jnp.bfloat16
    assert compared > 24
    assert np.mean(gaps) < most / 5
    assert max(gaps) < most


def test_kernels_are_available_with_a_compiler_and_avx512():
    compiler, flags = kernels._compiler(), Path("/proc/cpuinfo").read_text()
    assert kernels.available() == (compiler is not None and "avx512f" in flags)


@needs_compiler
def test_kernels_are_not_available_without_avx512(monkeypatch):
    monkeypatch.setattr(kernels, "OPTIONS", [o.replace("native", "x86-64-v3") for o in kernels.OPTIONS])
    assert not kernels.available.__wrapped__()


def test_a_missing_compiler_is_not_an_error(monkeypatch, tmp_path, recwarn):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not kernels.available.__wrapped__()
    assert not recwarn


def test_a_compiler_that_fails_is_reported(monkeypatch, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho no such option >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.warns(UserWarning, match=r"kernels.cc could not be compiled .* no such option"):
        assert not kernels.available.__wrapped__()


@needs_compiler
def test_the_library_is_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler = kernels._compiler()
    made = kernels._library(compiler)
    written = made.stat().st_mtime_ns
    assert kernels._library(compiler) == made
    assert made.stat().st_mtime_ns == written
    assert list((tmp_path / "tpaw_jax").iterdir()) == [made]
