"""The policy answers prompts: prefill, then decoding in slots that are refilled as sequences finish.

A request's random stream is fold_in(seed, round, prompt id, token number), and rows of a batch never mix, so the text
does not depend on the number of slots, the order of requests or a restart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PyTree

from tpaw_jax import sharding
from tpaw_jax.config import SamplingConfig
from tpaw_jax.models import cache as kv
from tpaw_jax.models.transformer import Transformer
from tpaw_jax.types import Generations, Prompts

Response = tuple[np.ndarray, np.ndarray]
"""Sampled tokens, int32, and their log-probs under the model, float32 nats."""

SAMPLING_STREAM = 0
"""The stage number of sampling among the random streams of a round."""


class Decoder(NamedTuple):
    """What sampling asks of a model. `cache` is any pytree that the model understands.

    init_cache(slots, positions) -> cache
    prefill(params, cache, tokens [B, T], lengths [B], slots [B]) -> (logits [B, V] after the last token, cache)
    decode(params, cache, tokens [S], positions [S]) -> (logits [S, V], cache)
    """

    init_cache: Callable[[int, int], PyTree[Array]]
    prefill: Callable[..., tuple[Array, PyTree[Array]]]
    decode: Callable[..., tuple[Array, PyTree[Array]]]


class DecodeState(struct.PyTreeNode):
    """The slots. A slot is idle, or holds a request that has `generated` of its new tokens."""

    cache: PyTree[Array]
    active: Bool[Array, "S"]
    request: Int[Array, "S"]  # the prompt's id
    position: Int[Array, "S"]  # where `last_token` goes in the sequence
    last_token: Int[Array, "S"]
    generated: Int[Array, "S"]
    tokens: Int[Array, "S M"]
    log_probs: Float[Array, "S M"]


class Sampler(NamedTuple):
    """The compiled programs of `make_sampler`."""

    init: Callable[[int, int], DecodeState]
    prefill: Callable[..., DecodeState]
    decode: Callable[..., DecodeState]
    config: SamplingConfig


def decoder_of(model: Transformer) -> Decoder:
    """The `Decoder` of a `Transformer`, its keys and values cached in the compute dtype."""
    c = model.config

    def init_cache(slots: int, positions: int) -> kv.KVCache:
        return kv.empty(c.num_layers, slots, c.num_kv_heads, positions, c.head_dim, model.dtype)

    def prefill(params, cache, tokens_BT, lengths_B, slots_B):
        variables = {"params": params}
        hidden_BTD, cache = model.apply(variables, tokens_BT, cache, slots_B, method="prefill")
        last_BD = jnp.take_along_axis(hidden_BTD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
        return model.apply(variables, last_BD, method="logits"), cache

    def decode(params, cache, tokens_S, positions_S):
        variables = {"params": params}
        hidden_SD, cache = model.apply(variables, tokens_S, positions_S, cache, method="decode")
        return model.apply(variables, hidden_SD, method="logits"), cache

    return Decoder(init_cache, prefill, decode)


def decoder_from_apply_fn(apply_fn: Callable[[PyTree[Array], Array], Array]) -> Decoder:
    """A `Decoder` of any causal apply_fn(params, tokens [B, T]) -> logits [B, T, V]; it recomputes the whole sequence.

    The cache is the tokens so far.
    """

    def init_cache(slots: int, positions: int) -> Array:
        return jnp.zeros((slots, positions), jnp.int32)

    def prefill(params, cache, tokens_BT, lengths_B, slots_B):
        cache = cache.at[slots_B, : tokens_BT.shape[1]].set(tokens_BT, mode="drop")
        logits_BTV = apply_fn(params, tokens_BT)
        return jnp.take_along_axis(logits_BTV, (lengths_B - 1)[:, None, None], axis=1)[:, 0], cache

    def decode(params, cache, tokens_S, positions_S):
        cache = cache.at[jnp.arange(len(tokens_S)), positions_S].set(tokens_S)
        logits_SCV = apply_fn(params, cache)
        return jnp.take_along_axis(logits_SCV, positions_S[:, None, None], axis=1)[:, 0], cache

    return Decoder(init_cache, prefill, decode)


def round_key(seed: int, round_number: int) -> Array:
    """The random key of a round's sampling."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), round_number), SAMPLING_STREAM)


def make_sampler(
    decoder: Decoder, config: SamplingConfig, stop_tokens: Sequence[int], mesh: Mesh | None = None
) -> Sampler:
    """Compile-once programs that fill slots and decode them. One prefill program a prompt bucket, one decode program.

    On a mesh, slots are split over the axes of batch rows where their number divides.
    """
    stops = jnp.asarray(sorted(stop_tokens), jnp.int32)

    def init(slots: int, positions: int) -> DecodeState:
        ints = lambda *shape: jnp.zeros(shape, jnp.int32)
        return DecodeState(
            cache=decoder.init_cache(slots, positions),
            active=jnp.zeros(slots, bool),
            request=ints(slots),
            position=ints(slots),
            last_token=ints(slots),
            generated=ints(slots),
            tokens=ints(slots, config.max_new_tokens),
            log_probs=jnp.zeros((slots, config.max_new_tokens), jnp.float32),
        )

    def prefill(params, state, key, tokens_BT, lengths_B, slots_B, requests_B):
        logits_BV, cache = decoder.prefill(params, state.cache, tokens_BT, lengths_B, slots_B)
        first_B, log_probs_B = sample(logits_BV, _uniforms(key, requests_B, jnp.zeros_like(requests_B)), config)
        put = lambda old, new: old.at[slots_B].set(new, mode="drop")
        ended_B = jnp.isin(first_B, stops) | (config.max_new_tokens == 1)
        return state.replace(
            cache=cache,
            active=put(state.active, ~ended_B),
            request=put(state.request, requests_B),
            position=put(state.position, lengths_B),
            last_token=put(state.last_token, first_B),
            generated=put(state.generated, 1),
            tokens=state.tokens.at[slots_B, 0].set(first_B, mode="drop"),
            log_probs=state.log_probs.at[slots_B, 0].set(log_probs_B, mode="drop"),
        )

    def decode(params, state, key, until_active):
        """Decode until at most `until_active` slots are still active."""

        def one_token(state):
            logits_SV, cache = decoder.decode(params, state.cache, state.last_token, state.position)
            tokens_S, log_probs_S = sample(logits_SV, _uniforms(key, state.request, state.generated), config)
            slots = jnp.arange(len(tokens_S))
            place = jnp.where(state.active, state.generated, config.max_new_tokens)  # idle slots write nowhere
            generated = state.generated + state.active
            ended = jnp.isin(tokens_S, stops) | (generated >= config.max_new_tokens)
            return state.replace(
                cache=cache,
                active=state.active & ~ended,
                position=state.position + (state.active & ~ended),
                last_token=jnp.where(state.active, tokens_S, state.last_token),
                generated=generated,
                tokens=state.tokens.at[slots, place].set(tokens_S, mode="drop"),
                log_probs=state.log_probs.at[slots, place].set(log_probs_S, mode="drop"),
            )

        return jax.lax.while_loop(lambda s: jnp.sum(s.active) > until_active, one_token, state)

    def placed_init(slots: int, positions: int) -> DecodeState:
        if mesh is None:
            return jax.device_put(init(slots, positions), jax.devices()[0])  # committed, as what the programs return is
        split = slots % sharding.row_shards(mesh) == 0
        rows = sharding.rows(mesh) if split else sharding.replicated(mesh)
        state = jax.eval_shape(lambda: init(slots, positions))
        layout = jax.tree.map(lambda _: rows, state)
        if split:
            layout = layout.replace(cache=jax.tree.map(lambda _: sharding.rows(mesh, leading=1), state.cache))
        return jax.jit(lambda: init(slots, positions), out_shardings=layout)()

    return Sampler(
        placed_init,
        jax.jit(prefill, donate_argnums=1),
        jax.jit(decode, donate_argnums=1),
        config,
    )


def generate(
    sampler: Sampler,
    params: PyTree[Array],
    prompts: Prompts,
    *,
    seed: int,
    round_number: int,
    finished: Mapping[int, Response] | None = None,
    keep: Callable[[Mapping[int, Response]], None] = lambda responses: None,
    progress: Callable[[int, int], None] = lambda requests, tokens: None,
) -> Generations:
    """One response a prompt, in the order of `prompts`.

    `finished` holds responses, by index into `prompts`, that need not be sampled again: since a text depends on its
    request alone, the result is the same. `keep` is called with the responses as they finish, `progress` with the
    requests and the tokens finished since its last call.
    """
    config, key = sampler.config, round_key(seed, round_number)
    lengths = [len(tokens) for tokens in prompts.prompt_tokens]
    done: dict[int, Response] = dict(finished or {})
    # Longest first: prompts of one bucket are prefilled together, and the order changes no text.
    waiting = sorted(set(range(len(prompts))) - set(done), key=lambda i: (-lengths[i], i))
    slots = min(config.slots, max(1, len(prompts)))
    state = sampler.init(slots, _bucket(max(lengths, default=1)) + config.max_new_tokens)
    occupant: list[int | None] = [None] * slots
    while waiting or any(i is not None for i in occupant):
        while waiting and (idle := [s for s, i in enumerate(occupant) if i is None]):
            rows = min(config.prefill_rows, len(idle), len(waiting))
            group, waiting = waiting[:rows], waiting[rows:]
            for slot, i in zip(idle, group, strict=False):
                occupant[slot] = i
            state = _prefill(sampler, params, state, key, prompts, group, idle[:rows])
        # Hand back once an eighth of the slots could be refilled; with nothing left to refill, at the end.
        until_active = slots - max(1, slots // 8) if waiting else 0
        state = sampler.decode(params, state, key, np.int32(until_active))
        new = _collect(state, occupant)
        if new:
            keep(new)
        done.update(new)
        progress(len(new), sum(len(tokens) for tokens, _ in new.values()))
    ordered = [done[i] for i in range(len(prompts))]
    return Generations(round_number, tuple(t for t, _ in ordered), tuple(p for _, p in ordered))


def sample(
    logits: Float[Array, "S V"], uniforms: Float[Array, "S"], config: SamplingConfig
) -> tuple[Int[Array, "S"], Float[Array, "S"]]:
    """Tokens by inverse CDF after temperature, top-k and top-p; greedy at temperature 0.

    Also their log-probs in nats under the model itself, at temperature 1 and unfiltered.
    """
    logits = logits.astype(jnp.float32)
    if config.temperature == 0:
        tokens = jnp.argmax(logits, axis=-1)
    else:
        scaled = logits / config.temperature
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


def _uniforms(key: Array, requests: Int[Array, "S"], numbers: Int[Array, "S"]) -> Float[Array, "S"]:
    """One uniform in [0, 1) a slot, from (round key, request, token number)."""
    fold = lambda request, number: jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, request), number))
    return jax.vmap(fold)(requests, numbers)


def _prefill(
    sampler: Sampler,
    params: PyTree[Array],
    state: DecodeState,
    key: Array,
    prompts: Prompts,
    group: Sequence[int],
    slots: Sequence[int],
) -> DecodeState:
    """Put the prompts of `group` into `slots`, padded to the bucket's length and to the fixed number of rows."""
    rows, length = sampler.config.prefill_rows, _bucket(max(len(prompts.prompt_tokens[i]) for i in group))
    tokens = np.zeros((rows, length), np.int32)
    lengths, requests = np.ones(rows, np.int32), np.zeros(rows, np.int32)
    places = np.full(rows, state.active.shape[0], np.int32)  # padding rows go to a slot that is not there
    for row, (i, slot) in enumerate(zip(group, slots, strict=True)):
        prompt = prompts.prompt_tokens[i]
        tokens[row, : len(prompt)] = prompt
        lengths[row], places[row], requests[row] = len(prompt), slot, prompts.ids[i]
    return sampler.prefill(params, state, key, tokens, lengths, places, requests)


def _collect(state: DecodeState, occupant: list[int | None]) -> dict[int, Response]:
    """Take the finished sequences out of their slots, which become free."""
    active, generated, tokens, log_probs = jax.device_get(
        (state.active, state.generated, state.tokens, state.log_probs)
    )
    done: dict[int, Response] = {}
    for slot, i in enumerate(occupant):
        if i is not None and not active[slot]:
            count = generated[slot]
            done[i] = tokens[slot, :count].copy(), log_probs[slot, :count].copy()
            occupant[slot] = None
    return done


def _bucket(length: int, smallest: int = 32) -> int:
    """The next power of two, so that few prefill programs serve all prompts."""
    return max(smallest, 1 << (length - 1).bit_length())
