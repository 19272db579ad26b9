"""The mesh and the row length with which a topology takes steps of `train.batch_triplets` triplets fastest.

A batch has a row or more for every device that rows are split over. Long rows waste little padding, but hold many
triplets, so that a small batch has too few of them for the devices. Shorter rows, or a `tensor` axis, over which rows
are not split, keep all devices busy. Candidates are compared by an estimate that needs no compiling.
"""

import dataclasses
import itertools
import math
from typing import Any, NamedTuple

from jax.sharding import Mesh

from tpaw_jax.config import MeshConfig, RunConfig
from tpaw_jax.models import ModelConfig, tpu_attention
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

    def of(self, config: RunConfig) -> RunConfig:
        """The configuration with this layout."""
        rows = dataclasses.replace(config.packing, row_length=self.row_length, rows_per_batch=0)
        return dataclasses.replace(config, mesh=self.mesh, packing=rows)

    def __str__(self) -> str:
        """The layout as keys of a configuration."""
        m = self.mesh
        return (
            f"mesh: {{data: {m.data}, fsdp: {m.fsdp}, tensor: {m.tensor}}}, packing: {{row_length: {self.row_length}}}"
        )


def layouts(config: RunConfig, architecture: ModelConfig, topology: tpu.Topology, prompts: int) -> list[Layout]:
    """All layouts whose steps are within `TOLERANCE` of `train.batch_triplets`, the fastest per triplet first.

    If there are none, all layouts, the nearest to `train.batch_triplets` first.
    """
    loads = {length: _load(config, architecture, length, prompts) for length in _row_lengths(config)}
    found = []
    for mesh in _meshes(config, architecture, topology):
        target = lowering.target_of(dataclasses.replace(config, mesh=mesh), architecture, topology)
        shards = sharding.row_shards(target.mesh)
        for length, load in loads.items():
            resized = lowering.with_rows(target, shards, length)
            rows = rows_of_step(resized.config, load.triplets_per_row)
            found.append(Layout(mesh, length, rows * load.triplets_per_row, _seconds(resized, load, rows)))
    wanted = config.train.batch_triplets
    if wanted == "auto":
        return sorted(found, key=lambda layout: layout.seconds / layout.triplets)
    off = lambda layout: abs(layout.triplets / wanted - 1)
    near = [layout for layout in found if off(layout) <= TOLERANCE]
    return sorted(near, key=lambda layout: layout.seconds / layout.triplets) or sorted(found, key=off)


def _row_lengths(config: RunConfig) -> list[int]:
    """Row lengths to try: multiples of what attention needs, about an eighth apart."""
    step, longest = tpu_attention.QUERIES, max(LONGEST_ROW, config.packing.row_length)
    lengths = [math.ceil(config.longest_tree / step) * step]
    while lengths[-1] < longest:
        lengths.append(min(longest, math.ceil(lengths[-1] * 1.125 / step) * step))
    return lengths


def _load(config: RunConfig, architecture: ModelConfig, length: int, prompts: int) -> Workload:
    rows = dataclasses.replace(config.packing, row_length=length)
    return workload.assumed(dataclasses.replace(config, packing=rows), architecture, prompts)


def _meshes(config: RunConfig, architecture: ModelConfig, topology: tpu.Topology) -> list[MeshConfig]:
    """The topology's preset, and meshes with each `tensor` axis that divides the model and fsdp over the rest."""
    a, size = architecture, topology.device_count // topology.slices
    meshes = [sharding.preset_of(topology)]
    for power in itertools.count(1):
        tensor = 2**power
        divides = all(n % tensor == 0 for n in (size, a.num_heads, a.num_kv_heads, a.intermediate_size))
        if not divides:
            return meshes
        meshes.append(MeshConfig(data=topology.slices, fsdp=size // tensor, tensor=tensor))
    return meshes


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
    matrices = expected.param_bytes(target.params) * mesh.shape["fsdp"] * batches
    arithmetic = (flops.executed + flops.stalled) / chip.peak_flops
    return max(arithmetic, 4 * matrices / chip.hbm_bandwidth, exchange) + over("tensor", activations["all-reduce"])


def _along(mesh: Mesh, axis: str) -> list[Any]:
    """The devices along an axis, from the first one."""
    index = tuple(slice(None) if name == axis else 0 for name in mesh.axis_names)
    return list(mesh.devices[index])
