"""Trees against padded pairs, the chunked head against full logits: log-probs, loss and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_conversations, random_prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import pad, pair_batch, pair_log_probs, pair_loss, triplets_of

from tpaw_jax.config import ObjectiveConfig, PackingConfig
from tpaw_jax.data import packing, prefix_trees
from tpaw_jax.models import Transformer
from tpaw_jax.models.attention.masks import EINSUM, Visibility, attend, capped, visible
from tpaw_jax.models.attention.tiles import TILE, TILES, key_widths, plan
from tpaw_jax.training import logprobs
from tpaw_jax.training.train_step import StepScalars, _triplets
from tpaw_jax.types import TeamScores

PAPER = {"lam": 0.1, "eta": 6.0, "gamma": 0.5}


@pytest.fixture(scope="module", params=[random_prompts, random_conversations])
def packed(request, stories):
    prompts, rounds = request.param(np.random.default_rng(0), 5)
    window = rounds[::-1]
    trees = prefix_trees.trees_of_window(prompts, window, prefix_trees.first_sources(prompts, rounds))
    rows = packing.pack(trees, PackingConfig(row_length=160, max_responses_per_row=12))
    return Transformer(stories[0], attention=TILES), stories[1], prompts, window, rows


def noisy(params, seed):
    keys = jax.random.split(jax.random.key(seed), len(jax.tree.leaves(params)))
    leaves = [p + 0.02 * jax.random.normal(k, p.shape) for p, k in zip(jax.tree.leaves(params), keys, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def tree_loss(log_prob_fn, params, scores, batch):
    scalars = StepScalars(np.float32(0), np.float32(0.1), np.float32(0), np.bool_(False))
    out, *_ = _triplets(log_prob_fn(params, batch), batch, scores, ObjectiveConfig(), scalars)
    weight = batch.triplet_weight.reshape(-1)
    return jnp.sum(weight * out.per_triplet) / weight.sum()


@pytest.mark.parametrize("chunk", [1, 50, 4096])
def test_tree_log_probs_equal_padded_pairs(packed, chunk):
    model, params, prompts, window, rows = packed
    found = np.asarray(jax.jit(logprobs.make_log_prob_fn(model, chunk))(params, rows.batch))
    texts = {(-1, i): y for i, y in enumerate(prompts.target_tokens)}
    texts |= {(g.round, i): r for g in window for i, r in enumerate(g.tokens)}
    places = np.argwhere(rows.prompt_index >= 0)
    pairs = [
        (prompts.prompt_tokens[rows.prompt_index[p]], texts[rows.source[p], rows.prompt_index[p]])
        for p in map(tuple, places)
    ]
    expected = pair_log_probs(model, params, *pad(pairs))
    np.testing.assert_allclose(found[tuple(places.T)], expected, rtol=1e-5, atol=1e-4)
    assert (found[rows.prompt_index < 0] == 0).all()


def test_tree_loss_and_gradient_with_cached_scores_equal_pairs_with_live_references(packed):
    model, params, prompts, window, rows = packed
    references = [noisy(params, seed) for seed in (1, 2, 3)]
    log_prob_fn = logprobs.make_log_prob_fn(model, 64)
    score = jax.jit(log_prob_fn)
    scores = TeamScores(jnp.stack([score(r, rows.batch) for r in references]), jnp.ones(3, bool))
    trees, tree_gradient = jax.jit(jax.value_and_grad(lambda p: tree_loss(log_prob_fn, p, scores, rows.batch)))(params)
    triplets = pair_batch(triplets_of(prompts, window))
    of_pairs = jax.jit(jax.value_and_grad(lambda p: pair_loss(model, p, references, triplets, **PAPER)))
    pairs, pair_gradient = of_pairs(params)
    np.testing.assert_allclose(trees, pairs, rtol=1e-5)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(pair_gradient))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * largest), tree_gradient, pair_gradient
    )


def test_another_models_apply_fn_gives_the_same_log_probs(packed):
    model, params, _, _, rows = packed

    def apply_fn(params, tokens, positions, mask):
        """The same transformer, written against a dense mask."""
        dense = model.clone(attention=EINSUM._replace(prepare=lambda _: mask))
        return dense.apply({"params": params}, tokens, positions)

    ours = jax.jit(logprobs.make_log_prob_fn(model, 64))(params, rows.batch)
    theirs = jax.jit(logprobs.from_apply_fn(apply_fn))(params, rows.batch)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)


def head_inputs(vocabulary, predictions=40, features=16, rows=2):
    rng = np.random.default_rng(0)
    hidden, table = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((rows, predictions, features), (vocabulary, features))
    )
    labels = jnp.asarray(rng.integers(0, vocabulary, (rows, predictions)), jnp.int32)
    live = jnp.arange(predictions) < jnp.array([[23], [11]])
    return hidden, table, labels, live


def full_head(hidden, table, labels, live, cap):
    log_probs = jax.nn.log_softmax(capped(hidden @ table.T, cap))
    return jnp.where(live, jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0], 0)


@pytest.mark.parametrize("vocabulary", [100, 1024, 2500])  # below a block, a block, and two and a half
@pytest.mark.parametrize("chunk", [7, 64])
@pytest.mark.parametrize(("keep", "cap"), [(False, None), (True, None), (False, 2.0), (True, 5.0)])
def test_the_blockwise_head_and_its_gradients_equal_full_logits(vocabulary, chunk, keep, cap):
    hidden, table, labels, live = head_inputs(vocabulary)
    weight = jnp.sin(jnp.arange(live.size)).reshape(live.shape)
    ours = lambda h, t: jnp.sum(weight * logprobs.token_log_probs(h, t, labels, live, chunk, keep=keep, cap=cap))
    plain = lambda h, t: jnp.sum(weight * full_head(h, t, labels, live, cap))
    found, expected = (jax.jit(jax.value_and_grad(f, (0, 1)))(hidden, table) for f in (ours, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


def test_the_blockwise_head_never_holds_the_logits_of_a_row():
    vocabulary, predictions, features = 8192, 1024, 32
    hidden, table = jnp.zeros((2, predictions, features)), jnp.zeros((vocabulary, features))
    labels, live = jnp.zeros((2, predictions), jnp.int32), jnp.ones((2, predictions), bool)

    def peak(head):
        compiled = jax.jit(jax.grad(lambda h, t: head(h, t).sum(), argnums=(0, 1))).lower(hidden, table).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 2 * predictions * vocabulary * 4
    assert peak(lambda h, t: logprobs.token_log_probs(h, t, labels, live, 64)) < logits / 16
    assert logits < peak(lambda h, t: logprobs.token_log_probs(h, t, labels, live, 64, keep=True)) < 1.25 * logits
    assert peak(lambda h, t: full_head(h, t, labels, live, None)) > 1.25 * logits


def random_trees(rng, rows, length):
    """The visibility in rows of trees of up to four responses, with padding at the end and between the trees."""
    segments, branches, prompt_end = np.zeros((3, rows, length), np.int32)
    for row in range(rows):
        place, segment = 0, 0
        while place < length - rng.integers(1, 1 + length // 4):
            segment += 1
            ends = []
            parts = [0] * rng.integers(1, 4) + list(range(1, rng.integers(1, 6)))  # of the trunk, and responses
            for branch in parts:
                run = slice(place, min(length, place + int(rng.integers(1, 90))))
                segments[row, run], branches[row, run] = segment, branch
                prompt_end[row, run] = rng.choice(ends) if branch else 0
                ends += [run.stop] if branch == 0 and run.stop > run.start else []
                place = run.stop
            place += int(rng.integers(0, 3))
    return Visibility(*map(jnp.asarray, (segments, branches, prompt_end)))


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 10**6), length=st.sampled_from([40, 200, 333]), grouped=st.booleans())
def test_tiles_and_their_gradients_equal_the_dense_mask(seed, length, grouped):
    rng = np.random.default_rng(seed)
    rows, heads, kv_heads, size = 2, 4, 2 if grouped else 4, 8
    visibility = random_trees(rng, rows, length)
    arrays = [rng.normal(size=(rows, length, n, size)) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, weight = (jnp.asarray(a, jnp.float32) for a in arrays)
    weight *= (visibility.segment_ids > 0)[..., None, None]  # the output at padding does not matter

    def output_and_gradients(attention):
        def weighted(*x):
            out = weight * attention.attend(*x, attention.prepare(visibility))
            return jnp.sum(out), out

        return jax.jit(jax.grad(weighted, (0, 1, 2), has_aux=True))

    found, expected = (output_and_gradients(a)(q, k, v) for a in (TILES, EINSUM))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), found, expected)


def test_tiles_see_what_the_mask_keeps_and_little_more():
    visibility = random_trees(np.random.default_rng(1), 1, 1024)
    segments = visibility.segment_ids
    tiles = plan(visibility)
    widths, bounds = key_widths(1024), np.asarray(tiles.bounds)
    computed = sum(TILE * width * int(n) for width, n in zip(widths, np.diff(bounds), strict=True))
    assert int(tiles.tile.queries[: bounds[-1]].sum()) == int((segments > 0).sum())
    assert computed < 1024 * 1024 / 4  # the dense mask computes every pair
    needed = int((visible(visibility) & (segments > 0)[:, :, None]).sum())
    assert computed >= needed


def test_attention_equals_a_plain_softmax_over_repeated_heads():
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(2, 5, 4, 8)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(2, 2, 5, 8)), jnp.float32) for _ in range(2))
    mask = jnp.tril(jnp.ones((5, 5), bool))[None].repeat(2, axis=0)
    scores = jnp.einsum("bthd,bhsd->bhts", q, k.repeat(2, axis=1)) / np.sqrt(8)
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf))
    expected = jnp.einsum("bhts,bhsd->bthd", weights, v.repeat(2, axis=1))
    np.testing.assert_allclose(attend(q, k, v, mask), expected, atol=1e-6)
