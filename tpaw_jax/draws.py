"""Logits -> tokens: temperature, top-k and top-p, and the random stream of every token.

A token's stream is fold_in(seed, round, prompt id, token number), so the text depends on nothing but the request: not
on the number of slots, the order of requests, the devices or a restart.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tpaw_jax.config import SamplingConfig

SAMPLING_STREAM = 0
"""The stage number of sampling among the random streams of a round."""

TOKENS_OF_A_SAMPLE = 1 << 20
"""Token numbers that one response may use; those of a prompt's further responses follow."""


def round_key(seed: int, round_number: int) -> Array:
    """The random key of a round's sampling."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), round_number), SAMPLING_STREAM)


def uniforms(
    key: Array, requests: Int[Array, "S"], samples: Int[Array, "S"], numbers: Int[Array, "S"]
) -> Float[Array, "S"]:
    """One uniform in [0, 1) a slot, from (round key, prompt id, number of the response, token number)."""
    fold = lambda request, number: jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, request), number))
    return jax.vmap(fold)(requests, samples * TOKENS_OF_A_SAMPLE + numbers)


def sample(
    logits: Float[Array, "S V"],
    uniforms: Float[Array, "S"],
    config: SamplingConfig,
    banned: Bool[Array, "S V"] | None = None,
) -> tuple[Int[Array, "S"], Float[Array, "S"]]:
    """Tokens by inverse CDF after temperature, top-k and top-p, never a `banned` one; greedy at temperature 0.

    Also their log-probs in nats under the model itself, at temperature 1 and unfiltered.
    """
    logits = logits.astype(jnp.float32)
    allowed = logits if banned is None else jnp.where(banned, -jnp.inf, logits)
    if config.temperature == 0:
        tokens = jnp.argmax(allowed, axis=-1)
    else:
        scaled = allowed / config.temperature
        if config.top_k:
            kth = jax.lax.top_k(scaled, min(config.top_k, logits.shape[-1]))[0][:, -1:]
            scaled = jnp.where(scaled >= kth, scaled, -jnp.inf)
        if config.top_p < 1:
            scaled = jnp.where(_nucleus(scaled, config.top_p), scaled, -jnp.inf)
        tokens = _inverse_cdf(jnp.exp(scaled - jnp.max(scaled, axis=-1, keepdims=True)), uniforms)
    tokens = tokens.astype(jnp.int32)
    picked = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, picked - jax.nn.logsumexp(logits, axis=-1)


def _nucleus(logits: Float[Array, "S V"], top_p: float) -> Bool[Array, "S V"]:
    """The smallest set of most probable tokens whose probability reaches `top_p` (arXiv 1904.09751)."""
    order = jnp.argsort(-logits, axis=-1)
    probabilities = jnp.take_along_axis(jax.nn.softmax(logits), order, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    return jnp.put_along_axis(jnp.zeros(logits.shape, bool), order, before < top_p, axis=-1, inplace=False)


def _inverse_cdf(weights: Float[Array, "S V"], uniforms: Float[Array, "S"], block: int = 128) -> Int[Array, "S"]:
    """The index where the cumulated weights pass uniform x total: first the block of indices, then within it.

    Two levels of short sums are exact enough in float32 for any vocabulary, and cheap.
    """
    slots, vocabulary = weights.shape
    blocks = jnp.pad(weights, [(0, 0), (0, -vocabulary % block)]).reshape(slots, -1, block)
    upto = jnp.cumsum(blocks.sum(axis=-1), axis=-1)
    goal = uniforms * upto[:, -1]
    chosen = _first_beyond(upto, goal)
    inside = jnp.take_along_axis(blocks, chosen[:, None, None], axis=1)[:, 0]
    before = jnp.where(chosen > 0, jnp.take_along_axis(upto, jnp.maximum(chosen - 1, 0)[:, None], axis=1)[:, 0], 0)
    return chosen * block + _first_beyond(jnp.cumsum(inside, axis=-1), goal - before)


def _first_beyond(cumulated: Float[Array, "S n"], goal: Float[Array, "S"]) -> Int[Array, "S"]:
    """The first index whose cumulated weight exceeds `goal`; the last index of weight where rounding leaves none."""
    beyond = cumulated > goal[:, None]
    last = jnp.argmax(cumulated >= cumulated[:, -1:], axis=-1)
    return jnp.where(beyond.any(axis=-1), jnp.argmax(beyond, axis=-1), last)
