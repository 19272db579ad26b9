"""The mesh and the row length with which a topology takes steps of `train.batch_triplets` triplets fastest.

A batch has a row or more for every device that rows are split over. Long rows waste little padding, but hold many
triplets, so that a small batch has too few of them for the devices. Shorter rows, or a `tensor` axis, over which rows
are not split, keep all devices busy. Candidates are compared by an estimate that needs no compiling.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from tpaw_jax.config import MeshConfig, RunConfig
from tpaw_jax.models import ModelConfig, hub
from tpaw_jax.models.attention import rules
from tpaw_jax.models.layer_stacks import stacks_of
from tpaw_jax.planning import expected, lowering, roofline, workload
from tpaw_jax.planning.lowering import Target
from tpaw_jax.planning.planner import rows_of_step
from tpaw_jax.planning.workload import Workload
from tpaw_jax.runtime import sharding, tpu

LONGEST_ROW = 8192
"""Longest row that is tried."""

TOLERANCE = 0.1
"""How far the triplets of a step may be from `train.batch_triplets`, as a fraction of it."""


class Layout(NamedTuple):
    """A mesh and a row length, with what they are estimated to give."""

    mesh: MeshConfig
    row_length: int
    triplets: float  # per step, in the last round
    seconds: float  # of a step

    def __str__(self) -> str:
        """The layout as keys of a configuration."""
        m = self.mesh
        return f"mesh: {{data: {m.data}, fsdp: {m.fsdp}, tensor: {m.tensor}}}, packing.row_length: {self.row_length}"


def resolve(
    config: RunConfig,
    architecture: ModelConfig,
    topology: tpu.Topology,
    say: Callable[[str], None],
    devices: Sequence[Any] | None = None,
    begun_with: int = 0,
) -> RunConfig:
    """Fill in the mesh if `mesh.preset` is auto, and with it the row length if `packing.row_length` is 0.

    Supervised runs and DPO on given responses stay as they are: the assumed lengths are those of self-play.

    Args:
        config: the run's.
        architecture: of its model.
        topology: the TPU slices that it will run on.
        say: is told the layout.
        devices: those of the topology, if they are there.
        begun_with: the row length of a run that resumes; else 0.

    Raises:
        ValueError: no mesh is usable, or `mesh.context` or `mesh.expert` is set.
    """
    if config.mesh.preset != "auto" or config.objective.loss == "sft" or config.data.responses == "rejected":
        return config
    for key in ("context", "expert"):
        if getattr(config.mesh, key) > 1:
            raise ValueError(
                f"mesh.{key} is {getattr(config.mesh, key)} and mesh.preset is auto, which decides only on data, fsdp "
                "and tensor. Name a preset or give the sizes of the mesh."
            )
    kept = dataclasses.replace(config.packing, row_length=config.packing.row_length or begun_with)
    best = layouts(dataclasses.replace(config, packing=kept), architecture, topology, devices)[0]
    say(f"{topology.name}: {best}, for steps of about {best.triplets:.0f} triplets.")
    packing = dataclasses.replace(kept, row_length=best.row_length)
    mesh = dataclasses.replace(best.mesh, preset="auto", compiler_options=config.mesh.compiler_options)
    return dataclasses.replace(config, mesh=mesh, packing=packing)


def resolve_here(
    config: RunConfig, say: Callable[[str], None], architecture: ModelConfig | None = None, begun_with: int = 0
) -> RunConfig:
    """`resolve` for the TPU slices at hand; on other devices, the configuration as it is."""
    topology = tpu.topology_of(jax.devices())
    if config.mesh.preset != "auto" or topology is None:
        return config
    architecture = architecture or hub.load_architecture(config.policy.path)
    return resolve(config, architecture, topology, say, jax.devices(), begun_with)


def layouts(
    config: RunConfig, architecture: ModelConfig, topology: tpu.Topology, devices: Sequence[Any] | None = None
) -> list[Layout]:
    """All layouts whose steps are within `TOLERANCE` of `train.batch_triplets`, the fastest per triplet first.

    If there are none, all layouts, the nearest to `train.batch_triplets` first.

    Raises:
        ValueError: no mesh divides the model and `packing.rows_per_batch`.
    """
    loads = {length: _load(config, architecture, length) for length in _row_lengths(config)}
    found = []
    for mesh in _meshes(config, architecture, topology):
        shortest = dataclasses.replace(config.packing, row_length=min(loads))
        on_mesh = dataclasses.replace(config, mesh=mesh, packing=shortest)
        target = lowering.target_of(on_mesh, architecture, topology, devices)
        for length, load in loads.items():
            resized = lowering.with_rows(target, target.config.packing.rows_per_batch, length)
            rows = rows_of_step(resized.config, load.triplets_per_row)
            found.append(Layout(mesh, length, rows * load.triplets_per_row, _seconds(resized, load, rows)))
    wanted = config.train.batch_triplets
    if wanted == "auto":
        return sorted(found, key=lambda layout: layout.seconds / layout.triplets)
    off = lambda layout: abs(layout.triplets / wanted - 1)
    near = [layout for layout in found if off(layout) <= TOLERANCE]
    return sorted(near, key=lambda layout: layout.seconds / layout.triplets) or sorted(found, key=off)


def _row_lengths(config: RunConfig) -> list[int]:
    """The configured row length, or those to try: multiples of what attention needs, about an eighth apart."""
    if config.packing.row_length:
        return [config.packing.row_length]
    step = rules.QUERIES
    lengths = [math.ceil(config.longest_tree / step) * step]
    longest = max(LONGEST_ROW, lengths[0])
    while lengths[-1] < longest:
        lengths.append(min(longest, math.ceil(lengths[-1] * 1.125 / step) * step))
    return lengths


def _load(config: RunConfig, architecture: ModelConfig, length: int) -> Workload:
    rows = dataclasses.replace(config.packing, row_length=length)
    return workload.assumed(dataclasses.replace(config, packing=rows), architecture, workload.SAMPLE)


def _meshes(config: RunConfig, architecture: ModelConfig, topology: tpu.Topology) -> list[MeshConfig]:
    """The topology's preset, and meshes with each `tensor` axis that divides the model and fsdp over the rest."""
    a, size, meshes = architecture, topology.device_count // topology.slices, [sharding.preset_of(topology)]
    tensor = 2
    stacks = stacks_of(a).values()
    split = [size, *(n for own in stacks for n in (own.num_heads, own.num_kv_heads, *own.feed_forward_sizes))]
    while not a.qk_norm_all and all(n % tensor == 0 for n in split):
        meshes.append(MeshConfig(data=topology.slices, fsdp=size // tensor, tensor=tensor))
        tensor *= 2
    rows = config.packing.rows_per_batch
    usable = [mesh for mesh in meshes if rows % (mesh.data * mesh.fsdp) == 0]
    if not usable:
        raise ValueError(
            f"packing.rows_per_batch is {rows}; on {topology.name} it must be a multiple of "
            f"{' or '.join(str(mesh.data * mesh.fsdp) for mesh in meshes)}."
        )
    return usable


def _seconds(target: Target, load: Workload, rows: int) -> float:
    """Estimate a step: the longest of arithmetic, memory and the exchange of parameters, plus that of activations."""
    remat = "layer" if target.config.policy.remat == "auto" else target.config.policy.remat
    chip, mesh = target.topology.chip.device, target.mesh
    batches = math.ceil(rows / target.config.packing.rows_per_batch)
    flops = expected.step_flops(target, load, remat, rows)
    params, activations = expected.sent_in_step(target, remat, batches)
    over = lambda axis, size: size / (chip.ici_bandwidth * roofline.links(_along(mesh, axis), mesh)) if size else 0.0
    exchange = over("fsdp", params["all-gather"] + params["reduce-scatter"]) + over("data", params["all-reduce"])
    exchange += params[expected.BETWEEN_SLICES] / chip.dcn_bandwidth
    # Gathered matrices are written and read, forward and backward, and their gradients written and read, in float32.
    gathered = expected.param_bytes(target.params) - expected.looked_up_bytes(target.params, target.model.config)
    matrices = gathered * mesh.shape["fsdp"] * batches
    arithmetic = (flops.executed + flops.stalled) / chip.peak_flops
    return max(arithmetic, 4 * matrices / chip.hbm_bandwidth, exchange) + over("tensor", activations["all-reduce"])


def _along(mesh: Mesh, axis: str) -> list[Any]:
    """The devices along an axis, from the first one."""
    index = tuple(slice(None) if name == axis else 0 for name in mesh.axis_names)
    return list(mesh.devices[index])
