"""Cloud TPU generations, the topologies they come in, and what their compiler is told."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

GENERATIONS = ("v4", "v5e", "v5p", "v6e")

_ASYNCHRONOUS = {
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
    "xla_enable_async_all_gather": "true",
    "xla_enable_async_all_reduce": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
}

COMPILER_OPTIONS = dict.fromkeys(GENERATIONS, _ASYNCHRONOUS)
"""What the compiler is told for each generation, of the step and of scoring: collectives beside the computation."""


def options_of(mesh: Mesh) -> dict[str, str]:
    """The compiler options of the mesh's devices; none where they are no TPU."""
    return COMPILER_OPTIONS.get(generation(mesh.devices.flat[0]) or "", {})


class Topology(NamedTuple):
    """Slices of one generation: `v5e:16x16` has 256 chips in a torus of two dimensions."""

    generation: str
    shape: tuple[int, ...]
    slices: int

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def name(self) -> str:
        """As it is written on the command line."""
        one = f"{self.generation}:{'x'.join(map(str, self.shape))}"
        return one if self.slices == 1 else f"{self.slices} x {one}"


def parse_topology(text: str, slices: int = 1) -> Topology:
    """`v5e:16x16`, or `2 x v5e:16x16` for two slices, as a `Topology`.

    Raises:
        ValueError: it names no known generation or no shape.
    """
    match = re.fullmatch(r"(?:(\d+) ?x ?)?(\w+):(\d+(?:x\d+)+)", text)
    if match is None or match.group(2) not in GENERATIONS:
        raise ValueError(
            f"'{text}' is no topology; write a generation ({', '.join(GENERATIONS)}) and a shape, as in v5e:16x16, or "
            "'2 x v5e:16x16' for two slices."
        )
    shape = tuple(map(int, match.group(3).split("x")))
    return Topology(match.group(2), shape, int(match.group(1) or slices))


def arrange(devices: list[Any], sizes: tuple[int, ...], slices: int = 1) -> np.ndarray:
    """TPU devices in the shape of a mesh, neighbours on the torus beside each other; slices along its first axis."""
    from jax.experimental import mesh_utils

    if slices > 1:
        within = (sizes[0] // slices, *sizes[1:])
        across = (slices, *[1] * (len(sizes) - 1))
        return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def generation(device: jax.Device) -> str | None:
    """The generation of a TPU device, one of `GENERATIONS`; None where it is another device."""
    kind = device.device_kind.lower()
    names = {"v5 lite": "v5e", "v5e": "v5e", "v5p": "v5p", "v5": "v5p", "v6": "v6e", "v4": "v4"}
    return next((name for part, name in names.items() if part in kind), None) if "tpu" in kind else None
