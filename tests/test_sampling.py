"""Text that depends on the request alone, slots that refill, and draws from the right distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_prompts
from hypothesis import given, settings
from hypothesis import strategies as st

from tpaw_jax import sampling, sharding
from tpaw_jax.config import MeshConfig, SamplingConfig
from tpaw_jax.models import Transformer, cache
from tpaw_jax.models.attention import attend

STOPS = (1, 403)


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(np.random.default_rng(5), 11)[0]


def generate(stories, prompts, decoder=None, mesh=None, params=None, **config):
    settings = SamplingConfig(**{"max_new_tokens": 12, "slots": 4, "prefill_rows": 2, **config})
    decoder = decoder or sampling.decoder_of(Transformer(stories[0]))
    sampler = sampling.make_sampler(decoder, settings, STOPS, mesh)
    return sampling.generate(sampler, stories[1] if params is None else params, prompts, seed=3, round_number=2)


def assert_same_tokens(a, b):
    for x, y in zip(a.tokens, b.tokens, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text_does_not_depend_on_slots_order_or_company(stories, prompts, temperature):
    reference = generate(stories, prompts, temperature=temperature, slots=11)
    one_at_a_time = generate(stories, prompts, temperature=temperature, slots=1, prefill_rows=1)
    assert_same_tokens(one_at_a_time, reference)
    assert_same_tokens(generate(stories, prompts, temperature=temperature, slots=3), reference)
    order = np.random.default_rng(0).permutation(len(prompts))
    shuffled = generate(stories, prompts.take(order), temperature=temperature)
    for place, i in enumerate(order):
        np.testing.assert_array_equal(shuffled.tokens[place], reference.tokens[i])
    alone = generate(stories, prompts.take([7]), temperature=temperature)
    np.testing.assert_array_equal(alone.tokens[0], reference.tokens[7])


def test_every_request_round_and_seed_has_its_own_stream(stories, prompts):
    twins = prompts.take([7, 7])
    apart = type(twins)(np.array([100, 101], np.int32), twins.prompt_tokens, twins.target_tokens)
    sampler = sampling.make_sampler(
        sampling.decoder_of(Transformer(stories[0])), SamplingConfig(max_new_tokens=12, slots=2, prefill_rows=2), ()
    )
    draw = lambda who, seed, t: sampling.generate(sampler, stories[1], who, seed=seed, round_number=t).tokens
    first, second = draw(apart, 0, 0)
    assert first.tolist() != second.tolist()  # one prompt under two ids
    assert first.tolist() == draw(apart, 0, 0)[0].tolist()
    assert first.tolist() != draw(apart, 0, 1)[0].tolist()
    assert first.tolist() != draw(apart, 1, 0)[0].tolist()
    assert len(set(first.tolist())) > 3  # and every token of a response its own number


def test_cached_decoding_equals_recomputing_the_sequence(stories, prompts):
    model = Transformer(stories[0])
    twin = sampling.decoder_from_apply_fn(lambda p, tokens: model.apply({"params": p}, tokens))
    plain, cached = generate(stories, prompts, decoder=twin), generate(stories, prompts)
    assert_same_tokens(cached, plain)
    for a, b in zip(cached.log_probs, plain.log_probs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_log_probs_are_the_models_own_whatever_the_filters(stories, prompts):
    made = generate(stories, prompts, temperature=0.7, top_k=20, top_p=0.8)
    model = Transformer(stories[0])
    for prompt, tokens, log_probs in zip(prompts.prompt_tokens, made.tokens, made.log_probs, strict=True):
        logits = model.apply({"params": stories[1]}, np.concatenate([prompt, tokens])[None])[0]
        expected = jax.nn.log_softmax(logits[len(prompt) - 1 : -1])[np.arange(len(tokens)), tokens]
        np.testing.assert_allclose(log_probs, expected, atol=1e-4)


def test_responses_end_at_a_stop_token_or_at_the_limit(stories, prompts):
    made = generate(stories, prompts, slots=5)
    ended = [tokens[-1] in STOPS for tokens in made.tokens]
    assert any(ended)
    for tokens, stopped in zip(made.tokens, ended, strict=True):
        assert not set(tokens[:-1].tolist()) & set(STOPS)
        assert stopped or len(tokens) == 12


def test_every_request_has_its_own_limit(stories, prompts):
    whole = generate(stories, prompts, slots=5)
    settings = SamplingConfig(max_new_tokens=12, slots=3, prefill_rows=2)
    sampler = sampling.make_sampler(sampling.decoder_of(Transformer(stories[0])), settings, STOPS)
    answer = lambda limits: sampling.generate(sampler, stories[1], prompts, seed=3, round_number=2, limits=limits)
    limits = [1 + i % 12 for i in range(len(prompts))]
    for found, expected, limit in zip(answer(limits).tokens, whole.tokens, limits, strict=True):
        np.testing.assert_array_equal(found, expected[:limit])
    for wrong in (limits[1:], [0, *limits[1:]], [13, *limits[1:]]):
        with pytest.raises(
            ValueError, match="limits: there must be 11, one a prompt, each from 1 to max_new_tokens, 12"
        ):
            answer(wrong)


def test_attention_over_slots_reads_blocks_up_to_the_longest():
    rng = np.random.default_rng(0)
    positions = np.array([0, 63, 64, 130])
    array = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    layer = cache.LayerCache(array(4, 2, 256, 8), array(4, 2, 256, 8))
    queries, mask = array(4, 6, 8), jnp.arange(256) <= positions[:, None]
    expected = attend(queries[:, None], layer.keys, layer.values, mask[:, None])[:, 0]
    np.testing.assert_allclose(cache.attend_slots(queries, layer, positions), expected, rtol=1e-5, atol=1e-6)
    beyond = jax.tree.map(lambda x: x.at[:, :, 192:].set(jnp.nan), layer)  # the fourth block is never read
    of_first = lambda n: (queries[:n], jax.tree.map(lambda x: x[:n], beyond), positions[:n])
    found = [jax.jit(cache.attend_slots)(*of_first(n)) for n in (2, 4)]
    np.testing.assert_array_equal(found[0], found[1][:2])  # nor do a slot's bits depend on the others' lengths


def test_eight_devices_sample_the_tokens_of_one(stories, prompts):
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4))
    params = jax.device_put(stories[1], sharding.param_shardings(stories[1], mesh))
    assert_same_tokens(generate(stories, prompts, slots=8, mesh=mesh, params=params), generate(stories, prompts))


def test_one_program_a_bucket_and_one_to_decode(stories, prompts):
    from tpaw_jax.monitoring import compile_log

    settings = SamplingConfig(max_new_tokens=8, slots=8, prefill_rows=8)
    sampler = sampling.make_sampler(sampling.decoder_of(Transformer(stories[0])), settings, STOPS)
    shapes = []

    def prefill(*arguments):
        shapes.append(arguments[3].tokens.shape)
        return sampler.prefill(*arguments)

    with compile_log() as compiled:
        for round_number in range(3):
            watched = sampler._replace(prefill=prefill)
            sampling.generate(watched, stories[1], prompts, seed=0, round_number=round_number)
    names = [name for name, _ in compiled]
    assert names.count("jit(decode)") == names.count("jit(prepare)") == 1
    assert names.count("jit(prefill)") == len(set(shapes)) < len(shapes)
    assert {length for _, length in shapes} <= {64, 128, 256}


def draws(logits, count, **config):
    many = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    uniforms = jax.random.uniform(jax.random.key(0), (count,))
    tokens, _ = jax.jit(lambda x, u: sampling.sample(x, u, SamplingConfig(**config)))(many, uniforms)
    return np.bincount(np.asarray(tokens), minlength=len(logits))


@pytest.mark.parametrize(
    ("config", "kept"),
    [({}, 6), ({"temperature": 0.5}, 6), ({"top_k": 3}, 3), ({"top_p": 0.75}, 3), ({"top_k": 4, "top_p": 0.6}, 2)],
)
def test_draws_follow_the_filtered_distribution(config, kept):
    logits = np.log([0.4, 0.25, 0.15, 0.1, 0.07, 0.03])
    expected = np.exp(logits / config.get("temperature", 1.0))
    expected[kept:] = 0
    expected *= 20_000 / expected.sum()
    counts = draws(logits, 20_000, **config)
    assert (counts[kept:] == 0).all()
    chi_square = ((counts[:kept] - expected[:kept]) ** 2 / expected[:kept]).sum()
    assert chi_square < 20.5  # the 0.1 % point of 5 degrees of freedom


@settings(deadline=None, max_examples=50)
@given(
    weights=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=400).filter(lambda w: sum(w) > 1e-3),
    uniform=st.floats(0, 0.999),
)
def test_inverse_cdf_finds_the_index_where_the_sum_passes(weights, uniform):
    found = int(sampling._inverse_cdf(jnp.asarray([weights], jnp.float32), jnp.asarray([uniform], jnp.float32))[0])
    upto = np.cumsum(np.asarray(weights, np.float64))
    assert weights[found] > 0
    goal, slack = uniform * upto[-1], 1e-5 * upto[-1]
    assert upto[found] >= goal - slack
    assert upto[found] - weights[found] <= goal + slack
