"""Trees against padded pairs, the chunked head against full logits: log-probs, loss and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_prompts
from plain import pair_log_probs, pair_loss, triplets_of

from tpaw_jax import logprobs, packing
from tpaw_jax.config import ObjectiveConfig, PackingConfig
from tpaw_jax.models import Transformer
from tpaw_jax.models.attention import attend
from tpaw_jax.train_step import StepScalars, _triplets
from tpaw_jax.types import TeamScores

PAPER = {"lam": 0.1, "eta": 6.0, "gamma": 0.5}


@pytest.fixture(scope="module")
def packed(stories):
    prompts, rounds = random_prompts(np.random.default_rng(0), 7)
    window = rounds[::-1]
    trees = packing.trees_of_window(prompts, window, packing.first_sources(prompts, rounds))
    rows = packing.pack(trees, PackingConfig(row_length=160, max_responses_per_row=12))
    return Transformer(stories[0]), stories[1], prompts, window, rows


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
    expected = pair_log_probs(model, params, pairs)
    np.testing.assert_allclose(found[tuple(places.T)], expected, rtol=1e-5, atol=1e-4)
    assert (found[rows.prompt_index < 0] == 0).all()


def test_tree_loss_and_gradient_with_cached_scores_equal_pairs_with_live_references(packed):
    model, params, prompts, window, rows = packed
    references = [noisy(params, seed) for seed in (1, 2, 3)]
    log_prob_fn = logprobs.make_log_prob_fn(model, 64)
    score = jax.jit(log_prob_fn)
    scores = TeamScores(jnp.stack([score(r, rows.batch) for r in references]), jnp.ones(3, bool))
    trees, tree_gradient = jax.jit(jax.value_and_grad(lambda p: tree_loss(log_prob_fn, p, scores, rows.batch)))(params)
    triplets = triplets_of(prompts, window)
    pairs, pair_gradient = jax.value_and_grad(lambda p: pair_loss(model, p, references, triplets, **PAPER))(params)
    np.testing.assert_allclose(trees, pairs, rtol=1e-5)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(pair_gradient))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * largest), tree_gradient, pair_gradient
    )


def test_another_models_apply_fn_gives_the_same_log_probs(packed):
    model, params, _, _, rows = packed

    def apply_fn(params, tokens, positions, mask):
        """The same transformer, written against a dense mask."""
        from unittest import mock

        with mock.patch("tpaw_jax.models.transformer.visible", return_value=mask):
            return model.apply({"params": params}, tokens, positions)

    ours = logprobs.make_log_prob_fn(model, 64)(params, rows.batch)
    theirs = logprobs.from_apply_fn(apply_fn)(params, rows.batch)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)


def test_the_chunked_head_never_holds_the_logits_of_a_row():
    vocabulary, predictions, features = 8192, 1024, 32
    table = jnp.zeros((vocabulary, features))
    hidden = jnp.zeros((2, predictions, features))
    labels, live = jnp.zeros((2, predictions), jnp.int32), jnp.ones((2, predictions), bool)

    def peak(chunk):
        loss = lambda h, t: logprobs.token_log_probs(h, t, labels, live, chunk).sum()
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, table).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 2 * predictions * vocabulary * 4
    assert peak(64) < logits / 4
    assert peak(predictions) > logits


def test_attention_equals_a_plain_softmax_over_repeated_heads():
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(2, 5, 4, 8)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(2, 2, 5, 8)), jnp.float32) for _ in range(2))
    mask = jnp.tril(jnp.ones((5, 5), bool))[None].repeat(2, axis=0)
    scores = jnp.einsum("bthd,bhsd->bhts", q, k.repeat(2, axis=1)) / np.sqrt(8)
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf))
    expected = jnp.einsum("bhts,bhsd->bthd", weights, v.repeat(2, axis=1))
    np.testing.assert_allclose(attend(q, k, v, mask), expected, atol=1e-6)
