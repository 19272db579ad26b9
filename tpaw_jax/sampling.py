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
from tpaw_jax.models import transformer
from tpaw_jax.models.transformer import Transformer
from tpaw_jax.types import AnyArray, Generations, Prompts

Response = tuple[np.ndarray, np.ndarray]
"""Sampled tokens, int32, and their log-probs under the model, float32 nats."""

SAMPLING_STREAM = 0
"""The stage number of sampling among the random streams of a round."""


class PackedPrompts(NamedTuple):
    """Prompts end to end in R rows of T tokens, and the slots B that each of them is for."""

    tokens: Int[AnyArray, "R T"]
    positions: Int[AnyArray, "R T"]
    segment_ids: Int[AnyArray, "R T"]  # 0 is padding
    first: Int[AnyArray, "B"]  # where the prompt begins, rows laid end to end
    lengths: Int[AnyArray, "B"]
    slots: Int[AnyArray, "B"]  # a slot that is not there, for padding


class Decoder(NamedTuple):
    """What sampling asks of a model. `cache` is any pytree that the model understands.

    init_cache(slots, positions) -> cache
    prepare(params) -> weights, the parameters as decoding wants them
    prefill(params, cache, prompts: PackedPrompts, longest) -> (logits [B, V] after the last token, cache); `longest`
        is static, no prompt is longer
    decode(weights, cache, tokens [S], positions [S]) -> (logits [S, V], cache)
    """

    init_cache: Callable[[int, int], PyTree[Array]]
    prepare: Callable[[PyTree[Array]], PyTree[Array]]
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
    limit: Int[Array, "S"]  # new tokens that the request may have
    tokens: Int[Array, "S M"]
    log_probs: Float[Array, "S M"]
    steps: Int[Array, ""]  # decoded so far
    busy: Int[Array, ""]  # slots active in them


class Sampler(NamedTuple):
    """The compiled programs of `make_sampler`."""

    init: Callable[[int, int], DecodeState]
    prepare: Callable[[PyTree[Array]], PyTree[Array]]
    prefill: Callable[..., DecodeState]
    decode: Callable[..., DecodeState]
    config: SamplingConfig
    rows: int  # of a prefill, one for each device that rows are split over


def decoder_of(model: Transformer) -> Decoder:
    """The `Decoder` of a `Transformer`, its keys and values cached in the compute dtype."""
    c = model.config

    def init_cache(slots: int, positions: int) -> kv.KVCache:
        return kv.empty(c.num_layers, slots, c.num_kv_heads, positions, c.head_dim, model.dtype)

    def prepare(params):
        return transformer.decode_weights(model, params)

    def prefill(params, cache, prompts, longest):
        variables, rows = {"params": params}, (prompts.tokens, prompts.positions, prompts.segment_ids)
        hidden_RTD, keys_and_values = model.apply(variables, *rows, method="prefill")
        last_BD = hidden_RTD.reshape(-1, c.hidden_size)[prompts.first + prompts.lengths - 1]
        places_BP = _places(prompts, longest)
        of_slots = lambda x: x.reshape(c.num_layers, -1, *x.shape[3:])[:, places_BP]
        cache = kv.write_prompts(cache, prompts.slots, *map(of_slots, keys_and_values))
        return model.apply(variables, last_BD, method="logits"), cache

    def decode(weights, cache, tokens_S, positions_S):
        return transformer.decode(model, weights, tokens_S, positions_S, cache)

    return Decoder(init_cache, prepare, prefill, decode)


def decoder_from_apply_fn(apply_fn: Callable[[PyTree[Array], Array], Array]) -> Decoder:
    """A `Decoder` of any causal apply_fn(params, tokens [B, T]) -> logits [B, T, V]; it recomputes the whole sequence.

    The cache is the tokens so far.
    """

    def init_cache(slots: int, positions: int) -> Array:
        return jnp.zeros((slots, positions), jnp.int32)

    def prepare(params):
        return params

    def prefill(params, cache, prompts, longest):
        tokens_BP = prompts.tokens.reshape(-1)[_places(prompts, longest)]
        cache = cache.at[prompts.slots, :longest].set(tokens_BP, mode="drop")
        logits_BPV = apply_fn(params, tokens_BP)
        return jnp.take_along_axis(logits_BPV, (prompts.lengths - 1)[:, None, None], axis=1)[:, 0], cache

    def decode(params, cache, tokens_S, positions_S):
        cache = cache.at[jnp.arange(len(tokens_S)), positions_S].set(tokens_S)
        logits_SCV = apply_fn(params, cache)
        return jnp.take_along_axis(logits_SCV, positions_S[:, None, None], axis=1)[:, 0], cache

    return Decoder(init_cache, prepare, prefill, decode)


def _places(prompts: PackedPrompts, longest: int) -> Int[Array, "B P"]:
    """Where the first `longest` tokens of each prompt stand, rows laid end to end; what follows it is of no use."""
    return jnp.minimum(prompts.first[:, None] + jnp.arange(longest), prompts.tokens.size - 1)


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
            limit=ints(slots),
            tokens=ints(slots, config.max_new_tokens),
            log_probs=jnp.zeros((slots, config.max_new_tokens), jnp.float32),
            steps=ints(),
            busy=ints(),
        )

    def prefill(params, state, key, prompts, requests_B, limits_B, longest):
        logits_BV, cache = decoder.prefill(params, state.cache, prompts, longest)
        first_B, log_probs_B = sample(logits_BV, _uniforms(key, requests_B, jnp.zeros_like(requests_B)), config)
        slots_B = prompts.slots
        put = lambda old, new: old.at[slots_B].set(new, mode="drop")
        ended_B = jnp.isin(first_B, stops) | (limits_B == 1)
        return state.replace(
            cache=cache,
            active=put(state.active, ~ended_B),
            request=put(state.request, requests_B),
            position=put(state.position, prompts.lengths),
            last_token=put(state.last_token, first_B),
            generated=put(state.generated, 1),
            limit=put(state.limit, limits_B),
            tokens=state.tokens.at[slots_B, 0].set(first_B, mode="drop"),
            log_probs=state.log_probs.at[slots_B, 0].set(log_probs_B, mode="drop"),
        )

    def decode(weights, state, key, until_active):
        """Decode until at most `until_active` slots are still active."""

        def one_token(state):
            position = jnp.where(state.active, state.position, 0)  # an idle slot writes where no request is
            logits_SV, cache = decoder.decode(weights, state.cache, state.last_token, position)
            tokens_S, log_probs_S = sample(logits_SV, _uniforms(key, state.request, state.generated), config)
            slots = jnp.arange(len(tokens_S))
            place = jnp.where(state.active, state.generated, config.max_new_tokens)  # idle slots write nowhere
            generated = state.generated + state.active
            ended = jnp.isin(tokens_S, stops) | (generated >= state.limit)
            return state.replace(
                cache=cache,
                active=state.active & ~ended,
                position=state.position + (state.active & ~ended),
                last_token=jnp.where(state.active, tokens_S, state.last_token),
                generated=generated,
                tokens=state.tokens.at[slots, place].set(tokens_S, mode="drop"),
                log_probs=state.log_probs.at[slots, place].set(log_probs_S, mode="drop"),
                steps=state.steps + 1,
                busy=state.busy + jnp.sum(state.active),
            )

        return jax.lax.while_loop(lambda s: jnp.sum(s.active) > until_active, one_token, state)

    def placed_init(slots: int, positions: int) -> DecodeState:
        if mesh is None:
            return jax.device_put(init(slots, positions), jax.devices()[0])  # committed, as what the programs return is
        split = slots % sharding.row_shards(mesh) == 0
        rows = sharding.rows(mesh) if split else sharding.replicated(mesh)
        state = jax.eval_shape(lambda: init(slots, positions))
        layout = jax.tree.map(lambda x: rows if x.ndim else sharding.replicated(mesh), state)
        return jax.jit(lambda: init(slots, positions), out_shardings=layout)()

    return Sampler(
        placed_init,
        jax.jit(decoder.prepare),
        jax.jit(prefill, donate_argnums=1, static_argnums=6),
        jax.jit(decode, donate_argnums=1),
        config,
        1 if mesh is None else sharding.row_shards(mesh),
    )


def generate(
    sampler: Sampler,
    params: PyTree[Array],
    prompts: Prompts,
    *,
    seed: int,
    round_number: int,
    limits: Sequence[int] | None = None,
    finished: Mapping[int, Response] | None = None,
    keep: Callable[[Mapping[int, Response]], None] = lambda responses: None,
    progress: Callable[[int, int], None] = lambda requests, tokens: None,
) -> Generations:
    """One response a prompt, in the order of `prompts`.

    `limits` are new tokens that each response may have, at most and by default `max_new_tokens`.
    `finished` holds responses, by index into `prompts`, that need not be sampled again: since a text depends on its
    request alone, the result is the same. `keep` is called with the responses as they finish, `progress` with the
    requests and the tokens finished since its last call.

    Raises:
        ValueError: `limits` are not one a prompt within `max_new_tokens`.
    """
    config, key = sampler.config, round_key(seed, round_number)
    lengths = [len(tokens) for tokens in prompts.prompt_tokens]
    most = [config.max_new_tokens] * len(prompts) if limits is None else list(limits)
    if len(most) != len(prompts) or not all(1 <= n <= config.max_new_tokens for n in most):
        raise ValueError(
            f"limits: there must be {len(prompts)}, one a prompt, each from 1 to max_new_tokens, "
            f"{config.max_new_tokens}."
        )
    done: dict[int, Response] = dict(finished or {})
    # Longest first, so that the groups of a run fall into few buckets; the order changes no text.
    waiting = sorted(set(range(len(prompts))) - set(done), key=lambda i: (-lengths[i], i))
    slots, longest = min(config.slots, max(1, len(prompts))), _bucket(max(lengths, default=1))
    state = sampler.init(slots, longest + config.max_new_tokens)
    occupant: list[int | None] = [None] * slots
    weights = sampler.prepare(params)
    while waiting or any(i is not None for i in occupant):
        while waiting and (idle := [s for s, i in enumerate(occupant) if i is None]):
            count = min(config.prefill_rows, len(idle), len(waiting))
            group, waiting = waiting[:count], waiting[count:]
            for slot, i in zip(idle, group, strict=False):
                occupant[slot] = i
            state = _prefill(sampler, params, state, key, prompts, most, group, idle[:count], longest)
        # Hand back once a sixteenth of the slots could be refilled; with nothing left to refill, at the end.
        until_active = slots - max(1, slots // 16) if waiting else 0
        state = sampler.decode(weights, state, key, np.int32(until_active))
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
    limits: Sequence[int],
    group: Sequence[int],
    slots: Sequence[int],
    longest: int,
) -> DecodeState:
    """Put the prompts of `group` into `slots`: packed into rows of a bucket's length, the longest first."""
    count, rows = sampler.config.prefill_rows, sampler.rows
    filled = [0] * rows
    place = {}
    for i in sorted(group, key=lambda i: -len(prompts.prompt_tokens[i])):
        row = min(range(rows), key=filled.__getitem__)
        place[i] = row, filled[row]
        filled[row] += len(prompts.prompt_tokens[i])
    length = _bucket(max(filled))
    tokens, positions, segments = np.zeros((3, rows, length), np.int32)
    first, lengths, requests, most = np.zeros(count, np.int32), *np.ones((3, count), np.int32)
    to = np.full(count, state.active.shape[0], np.int32)
    for n, (i, slot) in enumerate(zip(group, slots, strict=True)):
        prompt, (row, start) = prompts.prompt_tokens[i], place[i]
        run = slice(start, start + len(prompt))
        tokens[row, run], positions[row, run], segments[row, run] = prompt, np.arange(len(prompt)), n + 1
        first[n], lengths[n], to[n] = row * length + start, len(prompt), slot
        requests[n], most[n] = prompts.ids[i], limits[i]
    packed = PackedPrompts(tokens, positions, segments, first, lengths, to)
    return sampler.prefill(params, state, key, packed, requests, most, longest)


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


def _bucket(length: int, smallest: int = 64) -> int:
    """The next power of two, so that few prefill programs serve all groups of prompts."""
    return max(smallest, 1 << (length - 1).bit_length())
