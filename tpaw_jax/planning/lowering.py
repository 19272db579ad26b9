"""Lower the programs of a run for the devices of a TPU topology. Neither the devices nor any weights are needed."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree

from tpaw_jax.config import RunConfig
from tpaw_jax.data import packing
from tpaw_jax.generation import engine, token_sampling
from tpaw_jax.generation.cache import PAGE, Pages, PageTable
from tpaw_jax.generation.decoder import decoder_of
from tpaw_jax.generation.policy import check_targets, lora_of
from tpaw_jax.generation.slots import DecodeState, make_sampler
from tpaw_jax.models import ModelConfig, Transformer, adapters, hub, quantized
from tpaw_jax.models.attention import gpu_attention, tpu_attention
from tpaw_jax.models.transformer import shard_model
from tpaw_jax.runtime import sharding, tpu
from tpaw_jax.training import batch_shapes, fitting_step, scoring, train_step
from tpaw_jax.training.logprobs import make_log_prob_fn
from tpaw_jax.types import PackedPrompts


class Target(NamedTuple):
    """A configuration on the devices of a topology."""

    config: RunConfig  # with rows per batch filled in
    topology: tpu.Topology
    mesh: Mesh
    model: Transformer  # sharded over the mesh
    params: PyTree[jax.ShapeDtypeStruct]
    sampling_mesh: Mesh
    sampling_model: Transformer
    platform: str  # to lower for


def target_of(
    config: RunConfig,
    architecture: ModelConfig,
    topology: tpu.Topology,
    devices: Sequence[Any] | None = None,
    platform: str = "tpu",
) -> Target:
    """Put a configuration on a topology, whose devices may be there or not, or lower it for another platform.

    Raises:
        ImportError: libtpu is missing.
        ValueError: the mesh does not cover the topology, or the model or the rows cannot be sharded over it.
    """
    devices = topology.devices() if devices is None else devices
    mesh = sharding.make_mesh(config.mesh, devices)
    policy = config.policy
    settled = batch_shapes.resolve_packing(config, mesh)
    dtype, compute = jnp.dtype(policy.param_dtype), jnp.dtype(policy.compute_dtype)
    remat = "layer" if policy.remat == "auto" else policy.remat
    chunks, vmem = policy.attention_chunks, topology.chip.vmem_bytes
    attention = tpu_attention(vmem, chunks=chunks) if platform == "tpu" else gpu_attention(chunks)
    lora = lora_of(policy.lora, config.rounds)
    unsharded = Transformer(architecture, compute, dtype, remat, attention, lora=lora)
    params = hub.abstract_params(architecture, dtype, mesh, lora)
    if lora:
        check_targets(lora, architecture, adapters.split(params)[0])
    if lora and policy.lora.base_dtype == "int8":
        params = quantized.abstract(params, sharding.param_sharder(mesh))
    one_process = [d for d in devices if d.process_index == devices[0].process_index]
    tensor = config.sampling.tensor
    sampling_mesh = sharding.sampling_mesh(tensor, one_process if tensor == 1 else list(devices))
    return Target(
        config=dataclasses.replace(config, packing=settled),
        topology=topology,
        mesh=mesh,
        model=shard_model(unsharded, params, mesh, config.train.reduce_dtype, context=config.mesh.context),
        params=params,
        sampling_mesh=sampling_mesh,
        sampling_model=shard_model(unsharded, params, sampling_mesh, key="sampling.tensor"),
        platform=platform,
    )


def with_rows(target: Target, rows_per_batch: int, row_length: int) -> Target:
    """The same target with another number and length of rows."""
    rows = dataclasses.replace(target.config.packing, rows_per_batch=rows_per_batch, row_length=row_length)
    return target._replace(config=dataclasses.replace(target.config, packing=rows))


def team_step(target: Target, remat: str, micro_batches: int) -> jax.stages.Lowered:
    """The train step over `micro_batches` batches of rows."""
    config, mesh = target.config, target.mesh
    optimizer = train_step.make_optimizer(config.train)
    step: Any = fitting_step.configured_step(config, target.model.clone(remat=remat), optimizer, mesh)[1]
    inputs = (*packing.empty_step(config.packing, config.objective.n_max, micro_batches), train_step.NO_SCALARS)
    trained, frozen = adapters.parts(target.params, target.model.lora)
    state = train_step.abstract_state(trained, optimizer, mesh)
    inputs = _abstract(inputs, train_step.input_shardings(mesh, config.mesh.context))
    return _lower(target, step, state, *inputs, *frozen)


def scoring_pass(target: Target) -> jax.stages.Lowered:
    """A frozen player's forward pass over `packing.scoring_batches` batches of rows."""
    config, mesh = target.config, target.mesh
    log_prob_fn = make_log_prob_fn(target.model, config.policy.head_chunk)
    options, context = tpu.options_of(mesh, config.mesh.compiler_options), config.mesh.context
    program = scoring.score_program(log_prob_fn, mesh, options, context)
    count = config.packing.rows_per_batch * config.packing.scoring_batches
    rows = packing.empty(config.packing, count)
    return _lower(target, program, target.params, _abstract(rows.batch, scoring.batch_sharding(mesh, context)))


def prefill_row(config: RunConfig) -> int:
    """Length of a prefill row: prompt tokens that one shard computes at once."""
    return engine.bucket(max(config.sampling.prefill_tokens, config.data.max_prompt_length))


def prefill(target: Target) -> jax.stages.Lowered:
    """Prefill of one row of packed prompts on every shard of the sampling mesh."""
    mesh, row = target.sampling_mesh, prefill_row(target.config)
    shards, by_row = sharding.row_shards(mesh), sharding.rows(mesh)
    shape = lambda size: jax.ShapeDtypeStruct((shards, size), jnp.int32, sharding=by_row)
    most = max(1, row // 16)
    prompts = PackedPrompts(shape(row), shape(row), shape(row), shape(most), shape(most))
    sampler: Any = _sampler(target)
    return _lower(target, sampler.prefill, sampling_params(target), prompts)


def slots_per_shard(target: Target) -> int:
    """Slots that each copy of the model decodes."""
    processes = len({device.process_index for device in target.sampling_mesh.devices.flat})
    return math.ceil(target.config.sampling.slots * processes / sharding.row_shards(target.sampling_mesh))


def decode(target: Target, typical_tokens: int) -> jax.stages.Lowered:
    """A chunk of decode steps of all slots, with cache pages for sequences of `typical_tokens` tokens."""
    sampler: Any = _sampler(target)
    weights = jax.eval_shape(sampler.prepare, sampling_params(target)).decode
    state, table = slots_of(target, typical_tokens)
    until = jax.ShapeDtypeStruct((sampler.shards,), jnp.int32)
    key = jax.eval_shape(lambda: token_sampling.round_key(0, 0))
    return _lower(target, sampler.decode, weights, state, table, key, until)


def slots_of(target: Target, typical_tokens: int) -> tuple[DecodeState, PageTable]:
    """Abstract decode state and page table of all shards, with pages for sequences of `typical_tokens` tokens."""
    config, sampler, slots = target.config.sampling, _sampler(target), slots_per_shard(target)
    longest = math.ceil((target.config.data.max_prompt_length + config.max_new_tokens) / PAGE)
    pages = max(longest, math.ceil(typical_tokens / PAGE) * slots)
    table = jax.tree.map(jnp.asarray, Pages(sampler.shards, slots, pages, longest).table())
    return jax.eval_shape(lambda: sampler.init(slots, pages)), jax.eval_shape(lambda: table)


def _sampler(target: Target) -> engine.Sampler:
    config = target.config.sampling
    cache_dtype = config.cache_dtype or target.config.policy.compute_dtype
    decoder = decoder_of(target.sampling_model, cache_dtype, platform=target.platform)
    return make_sampler(decoder, config, [0], target.sampling_mesh)


def sampling_params(target: Target) -> PyTree[jax.ShapeDtypeStruct]:
    """The policy's parameters for sampling: matrices in the compute dtype, sharded over the sampling mesh."""
    shardings = sharding.param_shardings(target.params, target.sampling_mesh)
    dtype = jnp.dtype(target.config.policy.compute_dtype)

    def cast(path: Any, x: Any, place: Any) -> jax.ShapeDtypeStruct:
        exact = x.ndim == 1 or sharding.stays_exact(path, x)
        return jax.ShapeDtypeStruct(x.shape, x.dtype if exact else dtype, sharding=place)

    return jax.tree_util.tree_map_with_path(cast, target.params, shardings)


def _lower(target: Target, program: Any, *arguments: Any) -> jax.stages.Lowered:
    return program.trace(*arguments).lower(lowering_platforms=(target.platform,))


def _abstract(tree: PyTree[Any], shardings: PyTree[Any]) -> PyTree[jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of arrays; `shardings` may be a prefix of the tree."""
    place = lambda x, where: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=where)
    return jax.tree.map(place, tree, jax.tree.broadcast(shardings, tree))
