"""What each stage should compute, send and read on one device, counted by hand from model, mesh and lengths.

The plan reports these numbers beside those of the compiled program: a large difference means that the compiler does
something other than what the design says.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from tpaw_jax.generation.slots import STEPS_PER_CHUNK
from tpaw_jax.models import adapters
from tpaw_jax.models.adapters import PROJECTIONS
from tpaw_jax.models.checkpoints.hub import param_shapes
from tpaw_jax.models.layer_stacks import layers_with_experts, stacks_of
from tpaw_jax.models.model_config import LAYERS, ModelConfig
from tpaw_jax.models.parallel import exchange
from tpaw_jax.models.parallel.collectives import LOOKED_UP
from tpaw_jax.models.transformer import KEEPS_LOGITS
from tpaw_jax.planning import lowering
from tpaw_jax.planning.hlo import BETWEEN_SLICES, KINDS
from tpaw_jax.planning.lowering import Target
from tpaw_jax.planning.roofline import ATTENTION, Flops
from tpaw_jax.planning.workload import Workload
from tpaw_jax.runtime import sharding
from tpaw_jax.training import cost
from tpaw_jax.training.cost import Work

SLOTS_BUSY = 0.95
"""Share of the sampler's slots that hold an unfinished sequence, as measured on CPU (benchmarks/sampling.py, 512
requests, 64 slots). It is less where devices share a model, because a chunk of steps is then never cut short."""


EXPERT_ROUNDS = exchange.ROUNDS + 1
"""Rounds of the exchange between devices that hold different experts, if the router loads them almost evenly."""


def step_flops(target: Target, load: Workload, remat: str, rows: int) -> Flops:
    """FLOPs of the busiest device in a train step of `rows` rows, and useful FLOPs of the average device.

    A layer's matmuls are computed three times, and a fourth time if `remat` keeps only the layer's input. Attention has
    two products forward and five backward. The head recomputes its logits unless `remat` keeps them. Experts are
    recomputed too if `remat` offloads, and if tokens are exchanged between devices. With adapters, the gradients of
    other weights are not computed.
    """
    recomputed, frozen = 1.0 if remat == "layer" else 0.0, target.model.lora is not None
    head = 4.0 - (remat in KEEPS_LOGITS) - frozen
    row, batch = load.computed, target.config.packing.rows_per_batch
    computed = math.ceil(rows / batch) * batch
    passes = Work(row.tokens * (3 - frozen + recomputed), row.predictions * head, row.attended * (3.5 + recomputed))
    attention = (row.attended * (1 + recomputed) * computed, row.attended * 2.5 * computed)
    useful = cost.with_backward(load.row, frozen) * rows
    flops = _per_device(target, passes * computed, useful, target.mesh.size, attention)
    exchanged, kept = target.mesh.shape["expert"] > 1, remat in ("none", "dots", "head")
    if recomputed or (kept and not exchanged):
        return flops
    model = target.model.config
    experts = 6 * model.hidden_size * model.experts_per_token * model.expert_size * layers_with_experts(model)
    return flops._replace(executed=flops.executed + experts * row.tokens * computed / target.mesh.size)


def scoring_flops(target: Target, load: Workload) -> Flops:
    """FLOPs of one device in a scoring pass over `packing.scoring_batches` batches."""
    rows = target.config.packing.rows_per_batch * target.config.packing.scoring_batches
    executed, useful = load.computed * rows, load.row * rows
    return _per_device(target, executed, useful, target.mesh.size, (executed.attended, 0))


def prefill_flops(target: Target, load: Workload) -> Flops:
    """FLOPs of one device in a prefill of one row of prompts per shard."""
    mesh, row = target.sampling_mesh, lowering.prefill_row(target.config)
    prompts = load.prompts * row / load.prompt_tokens  # in one row
    pairs, shards = row * (row / prompts + 1) / 2, sharding.row_shards(mesh)
    executed, useful = Work(row, row // 16, pairs) * shards, Work(row, prompts, pairs) * shards
    return _per_device(target, executed, useful, mesh.size, (pairs * shards, 0))


def decode_flops(target: Target, load: Workload) -> Flops:
    """FLOPs of one device in `STEPS_PER_CHUNK` decode steps of all slots."""
    mesh = target.sampling_mesh
    slots = lowering.slots_per_shard(target) * sharding.row_shards(mesh)
    work = Work(slots, slots, slots * load.tokens_per_sequence) * STEPS_PER_CHUNK
    return _per_device(target, work, work * SLOTS_BUSY, mesh.size)


def decode_bytes(target: Target, typical_tokens: int) -> float:
    """Bytes that a device must read in `STEPS_PER_CHUNK` decode steps: all weights and cache pages, once per step."""
    params = lowering.sampling_params(target)
    if target.model.lora:  # merged and in the compute dtype
        dtype, base = jnp.dtype(target.config.policy.compute_dtype), adapters.split(params)[1]
        widened = lambda p: jax.ShapeDtypeStruct(p.shape, dtype, sharding=p.sharding) if p.dtype == jnp.int8 else p
        params = jax.tree.map(widened, base)
    weights = param_bytes(params) - looked_up_bytes(params, target.model.config)
    return STEPS_PER_CHUNK * (weights + cache_bytes(target, typical_tokens))


def param_bytes(params: Any) -> float:
    """Bytes that one device holds of sharded parameters."""
    size = lambda p: math.prod(p.sharding.shard_shape(p.shape)) * p.dtype.itemsize
    return float(sum(size(p) for p in jax.tree.leaves(params)))


def looked_up_bytes(params: Any, config: ModelConfig) -> float:
    """Bytes that one device holds of tables of which it only reads the rows of some tokens."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    tables = sum(param_bytes(leaf) for path, leaf in leaves if sharding.path_name(path).endswith(LOOKED_UP))
    return tables - (param_bytes(params["embed"]) if config.tie_embeddings else 0)  # the head reads that one


def cache_bytes(target: Target, typical_tokens: int) -> float:
    """Bytes of the cache pages on one device, for sequences of `typical_tokens` tokens."""
    cache = jax.tree.leaves(lowering.slots_of(target, typical_tokens)[0].cache)
    return sum(x.size * x.dtype.itemsize for x in cache) / target.sampling_mesh.size


def bytes_sent(target: Target, stage: str, remat: str = "layer", micro_batches: int = 1) -> dict[str, float]:
    """Bytes that one device should send in a run of a stage, by kind of collective.

    To gather or scatter V bytes over n devices, each sends V (n - 1) / n; to sum them, twice that.
    """
    sent = dict.fromkeys((*KINDS, BETWEEN_SLICES), 0.0)
    if stage in ("prefill", "decode"):
        _add_sampling(sent, target, stage)
    else:
        step = stage == "step"
        batches = micro_batches if step else target.config.packing.scoring_batches
        _add_params(sent, target, batches, step=step, again=step and remat != "none")
        _add_activations(sent, target, batches, step=step, again=step and remat != "none")
    return sent


def sent_in_step(target: Target, remat: str, micro_batches: int) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes that one device should send in a step by kind of collective: of parameters, and of activations."""
    params, activations = (dict.fromkeys((*KINDS, BETWEEN_SLICES), 0.0) for _ in range(2))
    _add_params(params, target, micro_batches, step=True, again=remat != "none")
    _add_activations(activations, target, micro_batches, step=True, again=remat != "none")
    return params, activations


def _add_sampling(sent: dict[str, float], target: Target, stage: str) -> None:
    """Add the sums over `tensor`, the gathered logits, and what all hosts need of the slots after a chunk of steps."""
    config, model, mesh = target.config, target.model.config, target.sampling_mesh
    tensor, slots, row = mesh.shape["tensor"], lowering.slots_per_shard(target), lowering.prefill_row(config)
    if stage == "decode":
        tokens, logits, itemsize, steps = slots, slots, 4, STEPS_PER_CHUNK
    else:
        tokens, logits, itemsize, steps = row, row // 16, jnp.dtype(config.policy.compute_dtype).itemsize, 1
    if tensor > 1:
        sums = sum(_outputs(own) * own.num_layers for own in stacks_of(model).values()) + 1
        sent["all-reduce"] = 2 * _others(tensor) * steps * sums * tokens * model.hidden_size * itemsize
        sent["all-gather"] = _others(tensor) * steps * logits * model.vocab_size * 4
    if mesh.is_multi_process and stage == "decode":  # hosts read a flag, a count, tokens and log-probs
        slot_bytes, shards = 5 + 8 * config.sampling.max_new_tokens, sharding.row_shards(mesh)
        sent["all-gather"] += _others(shards) * slots * shards * slot_bytes


def _add_params(sent: dict[str, float], target: Target, batches: int, *, step: bool, again: bool) -> None:
    """Add the gathers of parameters and, in a train step, the sums of their gradients.

    A layer's matrices are gathered in the compute dtype forward, and again backward unless they are kept; the head's
    table once. Gradients are scattered in `train.reduce_dtype` and summed over `data`.
    """
    config, mesh, model = target.config, target.mesh.shape, target.model.config
    compute, reduce = jnp.dtype(config.policy.compute_dtype).itemsize, jnp.dtype(config.train.reduce_dtype).itemsize
    specs = target.model.parallel.specs
    head = "embed/embedding" if model.tie_embeddings else "head/embedding"
    trains, in_8_bits = step and not target.model.lora, config.policy.lora.base_dtype == "int8"
    if target.model.lora:
        _add_adapters(sent, target, (batches, 1 + again) if step else (1, 1), step=step)
    for name, shape in param_shapes(model).items():
        spec = specs.get(name, P())
        split_over = [axis for dimension in range(len(spec)) for axis in sharding.axes_of(spec, dimension)]
        gathered_over = sharding.features_of(name, spec)[1]
        group = math.prod(mesh[axis] for axis in gathered_over)
        size = math.prod(shape) / math.prod(
            mesh[axis] for axis in split_over if axis not in gathered_over
        )  # of a group
        in_layer = name.split("/")[0].endswith(LAYERS)
        if gathered_over and ((in_layer and not name.endswith(LOOKED_UP)) or name == head):
            times = (1 + again if in_layer else 1) * (batches if step else 1)
            itemsize = 1 if in_8_bits and name.split("/")[-2] in PROJECTIONS.values() else compute
            sent["all-gather"] += _others(group) * size * itemsize * times
            sent["reduce-scatter"] += _others(group) * size * reduce * batches if trains else 0
        if trains:
            others = math.prod(mesh[axis] for axis in sharding.MESH_AXES_OF["batch"] if axis not in split_over)
            _add_sum_over_data(sent, size / group * reduce, others, target.topology.slices)


def _add_adapters(sent: dict[str, float], target: Target, passes: tuple[int, int], *, step: bool) -> None:
    """Add the gathers of adapters that are sharded over `fsdp`, which those of experts are, and the sums of gradients.

    `passes` are the batches, and how often each gathers a layer.
    """
    (batches, times), mesh, config = passes, target.mesh.shape, target.config
    compute, reduce = jnp.dtype(config.policy.compute_dtype).itemsize, jnp.dtype(config.train.reduce_dtype).itemsize
    for path, leaf in jax.tree_util.tree_leaves_with_path(adapters.split(target.params)[0]):
        name, spec, own = sharding.path_name(path), leaf.sharding.spec, math.prod(leaf.sharding.shard_shape(leaf.shape))
        split_over = {axis for dimension in range(len(spec)) for axis in sharding.axes_of(spec, dimension)}
        group = math.prod(mesh[axis] for axis in sharding.features_of(name, spec)[1])
        sent["all-gather"] += _others(group) * own * group * compute * batches * times
        if step:
            sent["reduce-scatter"] += _others(group) * own * group * reduce * batches
            rows_over = math.prod(mesh[axis] for axis in ("fsdp", "expert") if axis not in split_over)
            sent["all-reduce"] += 2 * _others(rows_over) * own * reduce
            tensor = 1 if "tensor" in split_over else mesh["tensor"]
            sent["all-reduce"] += 2 * _others(tensor) * own * leaf.dtype.itemsize * batches
            _add_sum_over_data(sent, own * reduce, mesh["data"], target.topology.slices)


def _add_activations(sent: dict[str, float], target: Target, batches: int, *, step: bool, again: bool) -> None:
    """Add the exchange of embeddings, of tokens with experts, of heads in `mesh.context`, and the sums over `tensor`.

    Each device holds some columns of the embedding table: tokens are gathered, then their columns exchanged. Over
    `tensor`, the outputs of attention and feed-forward are summed forward, their gradients backward. If layers are
    recomputed, attention's outputs are summed once more, and with post-norms all of them. Devices that share rows
    exchange queries, keys, values and attention's output; backward, their gradients, and all once more if layers are
    recomputed.
    """
    config, mesh, model = target.config, target.mesh.shape, target.model.config
    fsdp, data, expert, tensor = (mesh[axis] for axis in ("fsdp", "data", "expert", "tensor"))
    compute, columns = jnp.dtype(config.policy.compute_dtype).itemsize, fsdp * expert
    tokens = config.packing.row_length * config.packing.rows_per_batch // (data * columns) * batches
    if columns > 1:
        of_tables = model.hidden_size * (2 if step else 1)
        of_tables += model.num_layers * model.token_features * (2 + again if step else 1)
        tables = 1 + model.num_layers * (1 + (again and step)) * bool(model.token_features)
        sent["all-to-all"] = _others(columns) * tokens * of_tables * compute
        sent["all-gather"] += _others(columns) * 4 * tokens * columns * tables
    if expert > 1:  # tokens go there and back; backward, so they do again, and so do their gradients
        places = expert * exchange.capacity(tokens // batches * model.experts_per_token, expert)
        passes = (6 if step else 2) * EXPERT_ROUNDS * layers_with_experts(model) * batches
        sent["all-to-all"] += _others(expert) * passes * places * model.hidden_size * compute
    context = config.mesh.context
    if context > 1:
        passes = 2 + again if step else 1
        for own in stacks_of(model).values():
            heads = 2 * own.num_heads / tensor + 2 * max(own.num_kv_heads / tensor, context)
            features = heads * own.head_dim * own.num_layers
            sent["all-to-all"] += _others(context) * passes * features * tokens * compute
        row_bytes = 4 * (8 * config.packing.row_length + 3 * config.packing.max_responses_per_row)
        sent["all-gather"] += (
            _others(context) * context * row_bytes * batches * config.packing.rows_per_batch * context / (data * fsdp)
        )
    if tensor > 1:
        sums = 2 if step else 1
        for own in stacks_of(model).values():
            recomputed = again * (_outputs(own) if own.post_norm else 1)
            sums += own.num_layers * (2 * _outputs(own) + recomputed if step else _outputs(own))
        sent["all-reduce"] += 2 * _others(tensor) * sums * tokens * model.hidden_size * compute


def _outputs(config: ModelConfig) -> int:
    """How many outputs a layer sums over `tensor`: those of attention, feed-forward, and experts beside it."""
    return 3 if config.experts_beside_dense else 2


def _add_sum_over_data(sent: dict[str, float], size: float, data: int, slices: int) -> None:
    """Add a sum over `data`; if `data` spans slices, each chip of a slice sums its part with the other slices."""
    inside = data // slices
    sent["all-reduce"] += 2 * _others(inside) * size
    if slices > 1:
        sent[BETWEEN_SLICES] += 2 * _others(slices) * size / inside
        sent["all-gather"] += _others(inside) * size


def _others(devices: int) -> float:
    """The share of a group's data that is on the other devices."""
    return (devices - 1) / devices


def _per_device(
    target: Target, executed: Work, useful: Work, devices: int, attention: tuple[float, float] = (0, 0)
) -> Flops:
    """The FLOPs of one device; `attention` has the pairs that its kernels compute forward and backward."""
    flops = lambda work: cost.flops(target.model.config, work) / devices
    shares = ATTENTION[target.topology.generation]
    stalled = sum(pairs * (1 / share - 1) for pairs, share in zip(attention, shares, strict=True))
    return Flops(flops(executed), flops(useful), flops(Work(0, 0, stalled)))
