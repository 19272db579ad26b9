"""The decode slots on the device, and the compiled programs that fill, decode, cancel and resize them.

Slots are split into R shards, one for each device that batch rows are split over, with S slots and U pages each. Shards
decode independently of each other; where a tensor axis splits the model, the devices of that axis hold the same slots.
The host alone decides which request enters which slot and which pages it gets; it reads the slots only between chunks
of decode steps.
"""

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
"""Decode steps of one call of `decode`. The host reads the slots once per chunk, while the next chunk is queued."""


class DecodeState(struct.PyTreeNode):
    """All slots. A slot is idle, or holds a response of which `generated` new tokens are sampled."""

    cache: PyTree[Array]
    active: Bool[Array, "R S"]
    prompt_id: Int[Array, "R S"]
    sample: Int[Array, "R S"]  # which of the prompt's responses
    position: Int[Array, "R S"]  # of `last_token` in the sequence
    last_token: Int[Array, "R S"]
    generated: Int[Array, "R S"]
    limit: Int[Array, "R S"]  # maximum new tokens of the response
    tokens: Int[Array, "R S M"]
    log_probs: Float[Array, "R S M"]
    steps: Int[Array, "R"]  # decode steps so far
    busy: Int[Array, "R"]  # active slots, summed over those steps


class Snapshot(NamedTuple):
    """What the host reads after a chunk of decode steps. With several processes, each gets the slots of all."""

    active: Bool[Array, "R S"]
    generated: Int[Array, "R S"]
    tokens: Int[Array, "R S M"]
    log_probs: Float[Array, "R S M"]


class Prefilled(NamedTuple):
    """Prompts that are prefilled and wait for a slot of their shard."""

    logits: Float[Array, "R N V"]  # after the last token of each prompt
    kv: PyTree[Array]  # keys and values, for `Decoder.place`


class Admission(NamedTuple):
    """Up to A prefilled prompts per shard, the slots they enter, and the C pages their tokens go to."""

    slot: Int[AnyArray, "R A"]  # S, which is out of range, for unused entries: the scatter drops them
    index_in_row: Int[AnyArray, "R A"]  # among the N prompts of its prefilled row
    length: Int[AnyArray, "R A"]  # tokens
    prompt_id: Int[AnyArray, "R A"]
    sample: Int[AnyArray, "R A"]
    limit: Int[AnyArray, "R A"]
    starts: Int[AnyArray, "R C"]  # index in the prefilled row of each page's first token
    pages: Int[AnyArray, "R C"]  # U for unused entries


class Weights(NamedTuple):
    """Parameters in the form that each program takes; both are the same arrays if the decoder allows it."""

    prefill: PyTree[Array]
    decode: PyTree[Array]


class Sampler(NamedTuple):
    """The compiled programs that `make_sampler` returns, and what they were compiled for."""

    init: Callable[[int, int], DecodeState]  # (slots per shard, pages per shard)
    prepare: Callable[[PyTree[Array]], Weights]  # (params)
    prefill: Callable[[PyTree[Array], PackedPrompts], Prefilled]
    admit: Callable[[DecodeState, Prefilled, Admission, Array], DecodeState]  # the last argument is the round's key
    decode: Callable[..., tuple[DecodeState, Snapshot]]  # (weights, state, table, key, until_active [R])
    cancel: Callable[[DecodeState, AnyArray], DecodeState]  # (state, mask [R, S] of slots that become idle)
    resize: Callable[[DecodeState, AnyArray, AnyArray], DecodeState]  # (state, kept slots [R, S'], kept pages [R, U'])
    config: SamplingConfig
    mesh: Mesh
    dtype: jnp.dtype | None  # of the matrices that `prepare` takes; None: any
    shards: int
    processes: int  # that run the programs together
    window: int | None  # see `Decoder`


def make_sampler(
    decoder: Decoder, config: SamplingConfig, stop_tokens: Sequence[int], mesh: Mesh | None = None
) -> Sampler:
    """Build the programs of a sampler. Each compiles once for every number of slots and pages; prefill compiles once.

    Each group of the tensor axis of `mesh` holds a full model (see `sharding.sampling_mesh`); the default mesh is this
    process's first device. If the mesh spans several processes, all of them must call the programs in the same order.

    Raises:
        ValueError: the mesh splits parameters over fsdp, so they would be gathered for every token.
    """
    mesh = sharding.sampling_mesh(1, jax.local_devices()[:1]) if mesh is None else mesh
    if mesh.shape["fsdp"] > 1:
        raise ValueError(
            f"The sampler's mesh has an fsdp axis of {mesh.shape['fsdp']}; make the mesh with sharding.sampling_mesh."
        )
    stops = jnp.asarray(sorted(stop_tokens), jnp.int32)
    draw = _make_draw(config, stops)
    by_shard: Any = sharding.rows(mesh).spec
    replicated, per_device = P(), P(mesh.axis_names)  # per_device: any shape, concatenated over the devices
    snapshot = replicated if mesh.is_multi_process else by_shard
    weights = P("tensor") if mesh.shape["tensor"] > 1 else replicated
    slot_fields = (field.name for field in dataclasses.fields(DecodeState) if field.name != "cache")
    state: Any = DecodeState(cache=per_device, **dict.fromkeys(slot_fields, by_shard))
    prefilled: Any = Prefilled(by_shard, per_device)
    program = functools.partial(_compile, mesh)
    new_state = _make_new_state(decoder, config)
    init = functools.cache(lambda slots, pages: program(functools.partial(new_state, slots, pages), (), state))
    return Sampler(
        init=lambda slots, pages: init(slots, pages)(),
        prepare=_make_prepare(decoder, mesh, weights),
        prefill=_make_prefill(decoder, mesh, weights, by_shard, prefilled),
        admit=program(_make_admit(decoder, draw, stops), (state, prefilled, by_shard, replicated), state, donate=0),
        decode=program(
            _make_decode(decoder, draw, config, stops, mesh),
            (weights, state, by_shard, replicated, by_shard),
            (state, snapshot),
            donate=1,
        ),
        cancel=program(cancel, (state, by_shard), state, donate=0),
        resize=program(resize, (state, by_shard, by_shard), state),
        config=config,
        mesh=mesh,
        dtype=decoder.dtype,
        shards=sharding.row_shards(mesh),
        processes=len({device.process_index for device in mesh.devices.flat}),
        window=decoder.window,
    )


def cancel(state: DecodeState, slots: Bool[Array, "R S"]) -> DecodeState:
    """The state with `slots` idle."""
    return state.replace(active=state.active & ~slots)


def resize(state: DecodeState, slots: Int[Array, "R S"], pages: Int[Array, "R U"]) -> DecodeState:
    """The state with the given slots and pages of the old one, in that order.

    A page number beyond the old pages stands for a new page, whose contents are arbitrary.
    """
    take = jax.vmap(lambda x, i: x[jnp.minimum(i, len(x) - 1)])
    per_slot = state.replace(cache=None, steps=None, busy=None)
    kept = jax.tree.map(lambda x: take(x, slots), per_slot)
    cache = jax.tree.map(lambda x: take(x, pages), state.cache)
    return kept.replace(cache=cache, steps=state.steps, busy=state.busy)


def _make_draw(config: SamplingConfig, stops: Int[Array, "n"]) -> Callable[..., tuple[Array, Array]]:
    def draw(logits, key, prompt_id, sample, number):
        """Sampled tokens and their log-probs, [...], for logits [..., V]."""
        flat = lambda x: x.reshape(-1, *x.shape[prompt_id.ndim :])
        banned = None
        if config.min_new_tokens and stops.size:
            is_stop_V = jnp.zeros(logits.shape[-1], bool).at[stops].set(True)
            banned = (flat(number) < config.min_new_tokens)[:, None] & is_stop_V
        uniforms = token_sampling.uniforms(key, flat(prompt_id), flat(sample), flat(number))
        tokens, log_probs = token_sampling.sample(flat(logits), uniforms, config, banned)
        return tokens.reshape(prompt_id.shape), log_probs.reshape(prompt_id.shape)

    return draw


def _make_new_state(decoder: Decoder, config: SamplingConfig) -> Callable[[int, int], DecodeState]:
    def new_state(slots: int, pages: int) -> DecodeState:
        ints = lambda *shape: jnp.zeros((1, slots, *shape), jnp.int32)
        return DecodeState(
            cache=decoder.init(1, pages),
            active=ints().astype(bool),
            prompt_id=ints(),
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

    return new_state


def _make_prepare(decoder: Decoder, mesh: Mesh, weights: Any) -> Callable[[PyTree[Array]], Weights]:
    def prepare(params):
        return decoder.prepare(params)

    program = _compile_with_params(mesh, prepare, (), weights)

    def prepare_both(params: PyTree[Array]) -> Weights:
        for_decode = program(params)
        return Weights(for_decode if decoder.prefills_with_weights else params, for_decode)

    return prepare_both


def _make_prefill(
    decoder: Decoder, mesh: Mesh, weights: Any, prompts: Any, prefilled: Any
) -> Callable[[PyTree[Array], PackedPrompts], Prefilled]:
    def prefill(params_or_weights, prompts: PackedPrompts) -> Prefilled:
        return Prefilled(*decoder.prefill(params_or_weights, prompts))

    if decoder.prefills_with_weights:
        return _compile(mesh, prefill, (weights, prompts), prefilled)
    return _compile_with_params(mesh, prefill, (prompts,), prefilled)


def _make_admit(decoder: Decoder, draw: Callable[..., tuple[Array, Array]], stops: Int[Array, "n"]) -> Any:
    def admit(state: DecodeState, staged: Prefilled, new: Admission, key) -> DecodeState:
        """Put prefilled prompts into slots, each with its first sampled token."""
        logits_RAV = jnp.take_along_axis(staged.logits, new.index_in_row[..., None], axis=1)
        first, log_probs = draw(logits_RAV, key, new.prompt_id, new.sample, jnp.zeros_like(new.prompt_id))
        put = lambda old, values: jax.vmap(lambda o, s, v: o.at[s].set(v, mode="drop"))(old, new.slot, values)
        put_first = lambda old, v: jax.vmap(lambda o, s, v: o.at[s, 0].set(v, mode="drop"))(old, new.slot, v)
        ended = jnp.isin(first, stops) | (new.limit == 1)
        return state.replace(
            cache=decoder.place(state.cache, staged.kv, new.starts, new.pages),
            active=put(state.active, ~ended),
            prompt_id=put(state.prompt_id, new.prompt_id),
            sample=put(state.sample, new.sample),
            position=put(state.position, new.length),
            last_token=put(state.last_token, first),
            generated=put(state.generated, jnp.ones_like(first)),
            limit=put(state.limit, new.limit),
            tokens=put_first(state.tokens, first),
            log_probs=put_first(state.log_probs, log_probs),
        )

    return admit


def _make_decode(
    decoder: Decoder,
    draw: Callable[..., tuple[Array, Array]],
    config: SamplingConfig,
    stops: Int[Array, "n"],
    mesh: Mesh,
) -> Callable[..., tuple[DecodeState, Snapshot]]:
    def decode(weights, state: DecodeState, table: PageTable, key, until_active) -> tuple[DecodeState, Snapshot]:
        """Up to `STEPS_PER_CHUNK` steps; fewer once only `until_active` slots are active and no tensor axis is used."""

        def one_token(state: DecodeState) -> DecodeState:
            logits, cache = decoder.decode(weights, state.cache, state.last_token, state.position, table)
            tokens, log_probs = draw(logits, key, state.prompt_id, state.sample, state.generated)
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

        before = state.steps
        in_lockstep = mesh.shape["tensor"] > 1  # devices that exchange data in every step must take equally many
        unfinished = lambda s: in_lockstep | (jnp.sum(s.active) > until_active)
        has_next = lambda s: (unfinished(s) & (s.steps - before < STEPS_PER_CHUNK))[0]
        state = jax.lax.while_loop(has_next, one_token, state)
        snapshot = Snapshot(state.active, state.generated, state.tokens, state.log_probs)
        return state, jax.tree.map(_gather_shards, snapshot) if mesh.is_multi_process else snapshot

    return decode


def _gather_shards(x: Array) -> Array:
    return jax.lax.all_gather(x, sharding.MESH_AXES_OF["batch"], tiled=True)


def _compile(mesh: Mesh, function: Callable[..., Any], in_specs: Any, out_specs: Any, donate: Any = ()) -> Any:
    """A jitted program that runs `function` on every device, on its part of the arguments."""
    on_mesh = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    functools.update_wrapper(on_mesh, function)
    return jax.jit(on_mesh, donate_argnums=donate)


def _compile_with_params(mesh: Mesh, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Any:
    """The same, for a function whose first argument is the parameters; their specs follow from `sharding`'s rules."""

    def with_params(params, *arguments):
        specs = jax.tree.map(lambda placed: placed.spec, sharding.param_shardings(params, mesh))
        on_mesh = jax.shard_map(function, mesh=mesh, in_specs=(specs, *in_specs), out_specs=out_specs, check_vma=False)
        return on_mesh(params, *arguments)

    return jax.jit(functools.update_wrapper(with_params, function))
