"""The slots of the sampler on the device, and the compiled programs that fill, decode, empty and resize them.

Slots are split into R shards, one for each device that batch rows are split over, with S slots and U pages each. A
program runs without the host knowing what it finds; the host alone decides which request and which page goes where.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PyTree

from tpaw_jax import draws, sharding
from tpaw_jax.config import SamplingConfig
from tpaw_jax.decoder import Decoder, PackedPrompts
from tpaw_jax.models.cache import PageTable
from tpaw_jax.types import AnyArray

LOOK = 8
"""Decoding steps between looks from the host, which a chunk of them always waits for behind the one that runs."""


class DecodeState(struct.PyTreeNode):
    """The slots. A slot is idle, or holds a request that has `generated` of its new tokens."""

    cache: PyTree[Array]
    active: Bool[Array, "R S"]
    request: Int[Array, "R S"]  # the prompt's id
    sample: Int[Array, "R S"]  # which of the prompt's responses
    position: Int[Array, "R S"]  # where `last_token` goes in the sequence
    last_token: Int[Array, "R S"]
    generated: Int[Array, "R S"]
    limit: Int[Array, "R S"]  # new tokens that the request may have
    tokens: Int[Array, "R S M"]
    log_probs: Float[Array, "R S M"]
    steps: Int[Array, ""]  # decoded so far
    busy: Int[Array, ""]  # slots active in them


class Look(NamedTuple):
    """What the host sees of the slots after a chunk of steps."""

    active: Bool[Array, "R S"]
    generated: Int[Array, "R S"]
    tokens: Int[Array, "R S M"]
    log_probs: Float[Array, "R S M"]


class Staged(NamedTuple):
    """Prompts that are computed and wait for a slot of their shard."""

    logits: Float[Array, "R N V"]  # after their last token
    rows: PyTree[Array]


class Admission(NamedTuple):
    """Up to A staged prompts of each shard, the slots that they enter, and where their tokens go."""

    slot: Int[AnyArray, "R A"]  # S: none
    prompt: Int[AnyArray, "R A"]  # among the N of its row
    length: Int[AnyArray, "R A"]
    request: Int[AnyArray, "R A"]
    sample: Int[AnyArray, "R A"]
    limit: Int[AnyArray, "R A"]
    starts: Int[AnyArray, "R C"]  # in the row, of each page's tokens
    pages: Int[AnyArray, "R C"]  # U: none


class Sampler(NamedTuple):
    """The compiled programs of `make_sampler`."""

    init: Callable[[int, int], DecodeState]  # (slots a shard, pages a shard)
    prepare: Callable[[PyTree[Array]], PyTree[Array]]  # params -> weights
    prefill: Callable[[PyTree[Array], PackedPrompts], Staged]
    admit: Callable[[DecodeState, Staged, Admission, Array], DecodeState]  # the last is the round's key
    decode: Callable[..., tuple[DecodeState, Look]]  # (weights, state, table, key, until_active)
    cancel: Callable[[DecodeState, AnyArray], DecodeState]  # slots [R, S] that become idle
    resize: Callable[[DecodeState, AnyArray, AnyArray], DecodeState]  # (state, slots [R, S'], pages [R, U']) that stay
    config: SamplingConfig
    shards: int


def make_sampler(
    decoder: Decoder, config: SamplingConfig, stop_tokens: Sequence[int], mesh: Mesh | None = None
) -> Sampler:
    """Compile-once programs: one of each for a number of slots and pages, one to prefill prompts."""
    stops = jnp.asarray(sorted(stop_tokens), jnp.int32)
    shards = 1 if mesh is None else sharding.row_shards(mesh)

    def pinned(tree):
        """Leaves of a state on the devices of their shard, so that no program makes another layout of it."""
        if mesh is None:
            return tree
        at = lambda x: sharding.rows(mesh) if x.ndim else sharding.replicated(mesh)
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, at(x)), tree)

    def drawn(logits, key, request, sample, number):
        """Tokens and log-probs, [...], of logits [..., V]."""
        flat = lambda x: x.reshape(-1, *x.shape[request.ndim :])
        banned = None
        if config.min_new_tokens and stops.size:
            is_stop_V = jnp.zeros(logits.shape[-1], bool).at[stops].set(True)
            banned = (flat(number) < config.min_new_tokens)[:, None] & is_stop_V
        uniforms = draws.uniforms(key, flat(request), flat(sample), flat(number))
        tokens, log_probs = draws.sample(flat(logits), uniforms, config, banned)
        return tokens.reshape(request.shape), log_probs.reshape(request.shape)

    def new_state(slots: int, pages: int) -> DecodeState:
        ints = lambda *shape: jnp.zeros((shards, slots, *shape), jnp.int32)
        return DecodeState(
            cache=decoder.init(shards, pages),
            active=ints().astype(bool),
            request=ints(),
            sample=ints(),
            position=ints(),
            last_token=ints(),
            generated=ints(),
            limit=ints(),
            tokens=ints(config.max_new_tokens),
            log_probs=ints(config.max_new_tokens).astype(jnp.float32),
            steps=jnp.int32(0),
            busy=jnp.int32(0),
        )

    def init(slots: int, pages: int) -> DecodeState:
        if mesh is None:
            # Committed, as what the programs return is: else each would be compiled for both.
            return jax.device_put(new_state(slots, pages), jax.devices()[0])
        return jax.jit(lambda: pinned(new_state(slots, pages)))()

    def prepare(params):
        return decoder.prepare(params)

    def prefill(params, prompts: PackedPrompts) -> Staged:
        return Staged(*decoder.prefill(params, prompts))

    def admit(state: DecodeState, staged: Staged, new: Admission, key) -> DecodeState:
        logits_RAV = jnp.take_along_axis(staged.logits, new.prompt[..., None], axis=1)
        first, log_probs = drawn(logits_RAV, key, new.request, new.sample, jnp.zeros_like(new.request))
        put = lambda old, values: jax.vmap(lambda o, s, v: o.at[s].set(v, mode="drop"))(old, new.slot, values)
        put_first = lambda old, v: jax.vmap(lambda o, s, v: o.at[s, 0].set(v, mode="drop"))(old, new.slot, v)
        ended = jnp.isin(first, stops) | (new.limit == 1)
        return pinned(
            state.replace(
                cache=decoder.place(state.cache, staged.rows, new.starts, new.pages),
                active=put(state.active, ~ended),
                request=put(state.request, new.request),
                sample=put(state.sample, new.sample),
                position=put(state.position, new.length),
                last_token=put(state.last_token, first),
                generated=put(state.generated, jnp.ones_like(first)),
                limit=put(state.limit, new.limit),
                tokens=put_first(state.tokens, first),
                log_probs=put_first(state.log_probs, log_probs),
            )
        )

    def decode(weights, state: DecodeState, table: PageTable, key, until_active) -> tuple[DecodeState, Look]:
        """`LOOK` steps, or fewer where at most `until_active` slots are still active."""

        def one_token(state: DecodeState) -> DecodeState:
            logits, cache = decoder.decode(weights, state.cache, state.last_token, state.position, table)
            tokens, log_probs = drawn(logits, key, state.request, state.sample, state.generated)
            place = jnp.where(state.active, state.generated, config.max_new_tokens)  # idle slots write nowhere
            put = jax.vmap(jax.vmap(lambda old_M, i, new: old_M.at[i].set(new, mode="drop")))
            generated = state.generated + state.active
            ended = jnp.isin(tokens, stops) | (generated >= state.limit)
            return pinned(
                state.replace(
                    cache=cache,
                    active=state.active & ~ended,
                    position=state.position + (state.active & ~ended),
                    last_token=jnp.where(state.active, tokens, state.last_token),
                    generated=generated,
                    tokens=put(state.tokens, place, tokens),
                    log_probs=put(state.log_probs, place, log_probs),
                    steps=state.steps + 1,
                    busy=state.busy + jnp.sum(state.active),
                )
            )

        begun = state.steps
        goes_on = lambda s: (jnp.sum(s.active) > until_active) & (s.steps - begun < LOOK)
        state = jax.lax.while_loop(goes_on, one_token, state)
        return state, Look(state.active, state.generated, state.tokens, state.log_probs)

    def cancel(state: DecodeState, slots) -> DecodeState:
        return pinned(state.replace(active=state.active & ~slots))

    def resize(state: DecodeState, slots, pages) -> DecodeState:
        """The slots and pages that stay, in a new order; a page beyond the old ones is a new one."""
        take = jax.vmap(lambda x, i: x[jnp.minimum(i, len(x) - 1)])
        kept = jax.tree.map(lambda x: take(x, slots) if x.ndim else x, state.replace(cache=None))
        return pinned(kept.replace(cache=jax.tree.map(lambda x: take(x, pages), state.cache)))

    return Sampler(
        init,
        jax.jit(prepare),
        jax.jit(prefill),
        jax.jit(admit, donate_argnums=0),
        jax.jit(decode, donate_argnums=1),
        jax.jit(cancel, donate_argnums=0),
        jax.jit(resize),
        config,
        shards,
    )
