"""Logits -> tokens: temperature, top-k and top-p, and the random stream of every token.

The random number of a token comes from fold_in over (seed, round, prompt id, token number). The sampled text therefore
does not depend on the number of slots, the order of requests, the devices or a restart. One exception: XLA may round
logits differently for another number of slots. A number that is within that rounding, about 1e-6 of probability, of the
boundary between two tokens may then select the other token.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tpaw_jax.config import SamplingConfig

SAMPLING_STREAM = 0
"""The number that is folded into a round's key for sampling."""

NUMBERS_PER_SAMPLE = 1 << 20
"""Token numbers reserved for each response; those of a prompt's next response follow."""

MAX_SAMPLES = (1 << 32) // NUMBERS_PER_SAMPLE
"""Responses per prompt with random streams of their own: `fold_in` takes 32 bits."""


def round_key(seed: int, round_number: int) -> Array:
    """The random key of a round's sampling."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), round_number), SAMPLING_STREAM)


def uniforms(
    key: Array, requests: Int[Array, "S"], samples: Int[Array, "S"], numbers: Int[Array, "S"]
) -> Float[Array, "S"]:
    """One uniform number in [0, 1) per slot, from the round's key, prompt id, sample number and token number."""
    fold = lambda request, number: jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, request), number))
    return jax.vmap(fold)(requests, samples * NUMBERS_PER_SAMPLE + numbers)


def sample(
    logits: Float[Array, "S V"],
    uniforms: Float[Array, "S"],
    config: SamplingConfig,
    banned: Bool[Array, "S V"] | None = None,
) -> tuple[Int[Array, "S"], Float[Array, "S"]]:
    """Sample one token per slot by inverse CDF after temperature, top-k and top-p; argmax at temperature 0.

    `banned` tokens are never sampled. Also returns the tokens' log-probs in nats under the model itself: at temperature
    1, without filters or bans.
    """
    logits = logits.astype(jnp.float32)
    allowed = logits if banned is None else jnp.where(banned, -jnp.inf, logits)
    if config.temperature == 0:
        tokens, log_total_S = jnp.argmax(allowed, axis=-1), jax.nn.logsumexp(logits, axis=-1)
    else:
        scaled = allowed / config.temperature
        if config.top_k:
            kth = jax.lax.top_k(scaled, min(config.top_k, logits.shape[-1]))[0][:, -1:]
            scaled = jnp.where(scaled >= kth, scaled, -jnp.inf)
        if config.top_p < 1:
            scaled = jnp.where(_nucleus(scaled, config.top_p), scaled, -jnp.inf)
        tokens, log_total_S = _inverse_cdf(scaled, uniforms)
        if config.temperature != 1 or config.top_k or config.top_p < 1 or banned is not None:
            log_total_S = jax.nn.logsumexp(logits, axis=-1)
    tokens = tokens.astype(jnp.int32)
    return tokens, jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - log_total_S


def _nucleus(logits: Float[Array, "S V"], top_p: float) -> Bool[Array, "S V"]:
    """Mask of the smallest set of most probable tokens whose sum reaches `top_p`, and of ties (arXiv 1904.09751).

    A bisection finds the smallest kept probability, so the vocabulary is not sorted.
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    bits = jax.lax.bitcast_convert_type(probabilities, jnp.int32)  # non-negative floats sort like their bits

    def halve(_, bounds):
        low_S, high_S = bounds  # tokens >= low sum to at least top_p, tokens >= high do not
        middle_S = low_S + (high_S - low_S) // 2
        reaches_S = jnp.sum(probabilities, axis=-1, where=bits >= middle_S[:, None]) >= top_p
        return jnp.where(reaches_S, middle_S, low_S), jnp.where(reaches_S, high_S, middle_S)

    all_tokens, none = jnp.zeros(len(logits), jnp.int32), jnp.full(len(logits), _BITS_OF_1 + 1)
    least_S, _ = jax.lax.fori_loop(0, _BITS_OF_1.bit_length(), halve, (all_tokens, none))
    return bits >= least_S[:, None]


_BITS_OF_1 = 0x3F800000


def _inverse_cdf(
    logits: Float[Array, "S V"], uniforms: Float[Array, "S"], block: int = 128
) -> tuple[Int[Array, "S"], Float[Array, "S"]]:
    """The first index at which the cumulative sum of exp(logits) exceeds uniform * total, and the log of the total.

    The sum has two levels, blocks and indices within a block, because short float32 sums are accurate enough for any
    vocabulary. A masked sum selects the block, because a TPU would copy all logits to another layout for a gather.
    """
    slots, vocabulary = logits.shape
    padded = jnp.pad(logits, [(0, 0), (0, -vocabulary % block)], constant_values=-jnp.inf)
    blocks, top = padded.reshape(slots, -1, block), jnp.max(logits, axis=-1)[:, None]
    cumulative = jnp.cumsum(jnp.exp(blocks - top[:, None]).sum(axis=-1), axis=-1)
    total = cumulative[:, -1]
    goal = uniforms * total
    chosen = _first_beyond(cumulative, goal)
    is_chosen = jnp.arange(blocks.shape[1]) == chosen[:, None]
    inside = jnp.exp(jnp.where(is_chosen[..., None], blocks, 0).sum(axis=1) - top)
    before = jnp.where(
        chosen > 0, jnp.take_along_axis(cumulative, jnp.maximum(chosen - 1, 0)[:, None], axis=1)[:, 0], 0
    )
    return chosen * block + _first_beyond(jnp.cumsum(inside, axis=-1), goal - before), top[:, 0] + jnp.log(total)


def _first_beyond(cumulative: Float[Array, "S n"], goal: Float[Array, "S"]) -> Int[Array, "S"]:
    """The first index whose cumulative weight exceeds `goal`; if rounding leaves none, the last with a weight."""
    beyond = cumulative > goal[:, None]
    last = jnp.argmax(cumulative >= cumulative[:, -1:], axis=-1)
    return jnp.where(beyond.any(axis=-1), jnp.argmax(beyond, axis=-1), last)
