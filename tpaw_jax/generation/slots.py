"""The slots of the sampler on the device, and the compiled programs that fill, decode, empty and resize them.

Slots are split into R shards, one for each device that batch rows are split over, with S slots and U pages each. The
shards decode apart, without a word between them; where a tensor axis splits the model, its devices hold the same slots.
A program runs without the host knowing what it finds; the host alone decides which request and page goes where.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, PyTree

from tpaw_jax.config import SamplingConfig
from tpaw_jax.generation import token_sampling
from tpaw_jax.generation.cache import PageTable
from tpaw_jax.generation.decoder import Decoder
from tpaw_jax.runtime import sharding
from tpaw_jax.types import AnyArray, PackedPrompts

STEPS_PER_CHUNK = 8
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
    steps: Int[Array, "R"]  # decoded so far
    busy: Int[Array, "R"]  # slots active in them


class Snapshot(NamedTuple):
    """What the host sees of the slots after a chunk of steps; every process, of all slots that it decodes."""

    active: Bool[Array, "R S"]
    generated: Int[Array, "R S"]
    tokens: Int[Array, "R S M"]
    log_probs: Float[Array, "R S M"]


class Prefilled(NamedTuple):
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


class Weights(NamedTuple):
    """Parameters as the programs take them; one and the same for both where the decoder can."""

    prefill: PyTree[Array]
    decode: PyTree[Array]


class Sampler(NamedTuple):
    """The compiled programs of `make_sampler`."""

    init: Callable[[int, int], DecodeState]  # (slots a shard, pages a shard)
    prepare: Callable[[PyTree[Array]], Weights]  # of params
    prefill: Callable[[PyTree[Array], PackedPrompts], Prefilled]
    admit: Callable[[DecodeState, Prefilled, Admission, Array], DecodeState]  # the last is the round's key
    decode: Callable[..., tuple[DecodeState, Snapshot]]  # (weights, state, table, key, until_active [R])
    cancel: Callable[[DecodeState, AnyArray], DecodeState]  # slots [R, S] that become idle
    resize: Callable[[DecodeState, AnyArray, AnyArray], DecodeState]  # (state, slots [R, S'], pages [R, U']) that stay
    config: SamplingConfig
    mesh: Mesh
    dtype: jnp.dtype | None  # of the matrices of `params`; None: any
    shards: int
    processes: int  # that sample together


def make_sampler(
    decoder: Decoder, config: SamplingConfig, stop_tokens: Sequence[int], mesh: Mesh | None = None
) -> Sampler:
    """Compile-once programs: one of each for a number of slots and pages, one to prefill prompts.

    Each group of the tensor axis of `mesh` holds a whole model (`sharding.sampling_mesh`); by default it is the first
    device alone. Where the mesh is of several processes, all of them call the programs alike.

    Raises:
        ValueError: the mesh splits parameters over fsdp, which would be gathered for every token.
    """
    stops = jnp.asarray(sorted(stop_tokens), jnp.int32)
    mesh = sharding.sampling_mesh(1, jax.local_devices()[:1]) if mesh is None else mesh
    if mesh.shape["fsdp"] > 1:
        raise ValueError("The sampler's mesh has an fsdp axis; make it with sharding.sampling_mesh.")

    def drawn(logits, key, request, sample, number):
        """Tokens and log-probs, [...], of logits [..., V]."""
        flat = lambda x: x.reshape(-1, *x.shape[request.ndim :])
        banned = None
        if config.min_new_tokens and stops.size:
            is_stop_V = jnp.zeros(logits.shape[-1], bool).at[stops].set(True)
            banned = (flat(number) < config.min_new_tokens)[:, None] & is_stop_V
        uniforms = token_sampling.uniforms(key, flat(request), flat(sample), flat(number))
        tokens, log_probs = token_sampling.sample(flat(logits), uniforms, config, banned)
        return tokens.reshape(request.shape), log_probs.reshape(request.shape)

    def of_all(x):
        return jax.lax.all_gather(x, sharding.MESH_AXES_OF["batch"], tiled=True)

    def new_state(slots: int, pages: int) -> DecodeState:
        ints = lambda *shape: jnp.zeros((1, slots, *shape), jnp.int32)
        return DecodeState(
            cache=decoder.init(1, pages),
            active=ints().astype(bool),
            request=ints(),
            sample=ints(),
            position=ints(),
            last_token=ints(),
            generated=ints(),
            limit=ints(),
            tokens=ints(config.max_new_tokens),
            log_probs=ints(config.max_new_tokens).astype(jnp.float32),
            steps=jnp.zeros(1, jnp.int32),
            busy=jnp.zeros(1, jnp.int32),
        )

    def prepare(params):
        return decoder.prepare(params)

    def prefill(params_or_weights, prompts: PackedPrompts) -> Prefilled:
        return Prefilled(*decoder.prefill(params_or_weights, prompts))

    def admit(state: DecodeState, staged: Prefilled, new: Admission, key) -> DecodeState:
        logits_RAV = jnp.take_along_axis(staged.logits, new.prompt[..., None], axis=1)
        first, log_probs = drawn(logits_RAV, key, new.request, new.sample, jnp.zeros_like(new.request))
        put = lambda old, values: jax.vmap(lambda o, s, v: o.at[s].set(v, mode="drop"))(old, new.slot, values)
        put_first = lambda old, v: jax.vmap(lambda o, s, v: o.at[s, 0].set(v, mode="drop"))(old, new.slot, v)
        ended = jnp.isin(first, stops) | (new.limit == 1)
        return state.replace(
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

    def decode(weights, state: DecodeState, table: PageTable, key, until_active) -> tuple[DecodeState, Snapshot]:
        """Up to `STEPS_PER_CHUNK` steps; stops early at `until_active` active slots unless devices share a model."""

        def one_token(state: DecodeState) -> DecodeState:
            logits, cache = decoder.decode(weights, state.cache, state.last_token, state.position, table)
            tokens, log_probs = drawn(logits, key, state.request, state.sample, state.generated)
            place = jnp.where(state.active, state.generated, config.max_new_tokens)  # idle slots write nowhere
            put = jax.vmap(jax.vmap(lambda old_M, i, new: old_M.at[i].set(new, mode="drop")))
            generated = state.generated + state.active
            ended = jnp.isin(tokens, stops) | (generated >= state.limit)
            return state.replace(
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

        begun = state.steps
        alike = mesh.shape["tensor"] > 1  # devices that exchange something in every step all take as many
        goes_on = lambda s: ((alike | (jnp.sum(s.active) > until_active)) & (s.steps - begun < STEPS_PER_CHUNK))[0]
        state = jax.lax.while_loop(goes_on, one_token, state)
        look = Snapshot(state.active, state.generated, state.tokens, state.log_probs)
        return state, jax.tree.map(of_all, look) if mesh.is_multi_process else look

    def cancel(state: DecodeState, slots) -> DecodeState:
        return state.replace(active=state.active & ~slots)

    def resize(state: DecodeState, slots, pages) -> DecodeState:
        """The slots and pages that stay, in a new order; a page beyond the old ones is a new one."""
        take = jax.vmap(lambda x, i: x[jnp.minimum(i, len(x) - 1)])
        per_slot = state.replace(cache=None, steps=None, busy=None)
        kept = jax.tree.map(lambda x: take(x, slots), per_slot)
        cache = jax.tree.map(lambda x: take(x, pages), state.cache)
        return kept.replace(cache=cache, steps=state.steps, busy=state.busy)

    by_shard: Any = sharding.rows(mesh).spec
    everywhere, of_device = P(), P(mesh.axis_names)  # the latter for what a device alone knows the shape of, end to end
    seen = everywhere if mesh.is_multi_process else by_shard
    weights = P("tensor") if mesh.shape["tensor"] > 1 else everywhere
    others = (field.name for field in dataclasses.fields(DecodeState) if field.name != "cache")
    state: Any = DecodeState(cache=of_device, **dict.fromkeys(others, by_shard))
    staged: Any = Prefilled(by_shard, of_device)

    def program(function, in_specs, out_specs, donate=()):
        on_mesh = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        functools.update_wrapper(on_mesh, function)
        return jax.jit(on_mesh, donate_argnums=donate)

    def of_params(function, others, out_specs):
        """A program whose first argument are parameters, split as the mesh wants them."""

        def with_params(params, *arguments):
            specs = jax.tree.map(lambda placed: placed.spec, sharding.param_shardings(params, mesh))
            on_mesh = jax.shard_map(
                function, mesh=mesh, in_specs=(specs, *others), out_specs=out_specs, check_vma=False
            )
            return on_mesh(params, *arguments)

        return jax.jit(functools.update_wrapper(with_params, function))

    in_order = of_params(prepare, (), weights)

    def prepared(params) -> Weights:
        for_decode = in_order(params)
        return Weights(for_decode if decoder.prefills_with_weights else params, for_decode)

    new = functools.cache(lambda slots, pages: program(functools.partial(new_state, slots, pages), (), state))
    return Sampler(
        init=lambda slots, pages: new(slots, pages)(),
        prepare=prepared,
        prefill=program(prefill, (weights, by_shard), staged)
        if decoder.prefills_with_weights
        else of_params(prefill, (by_shard,), staged),
        admit=program(admit, (state, staged, by_shard, everywhere), state, donate=0),
        decode=program(decode, (weights, state, by_shard, everywhere, by_shard), (state, seen), donate=1),
        cancel=program(cancel, (state, by_shard), state, donate=0),
        resize=program(resize, (state, by_shard, by_shard), state),
        config=config,
        mesh=mesh,
        dtype=decoder.dtype,
        shards=sharding.row_shards(mesh),
        processes=len({device.process_index for device in mesh.devices.flat}),
    )
