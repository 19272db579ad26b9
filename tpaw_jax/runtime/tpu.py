"""Cloud TPU generations, the topologies they come in, and what their compiler is told."""

from __future__ import annotations

import importlib.util
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh


class Chip(NamedTuple):
    """What is published of one chip of a generation (cloud.google.com/tpu/docs, the page of each)."""

    flops: float  # a second, bfloat16 matmuls
    memory: float  # bytes of HBM that its compiler lets a program have
    hbm: float  # bytes a second
    link: float  # bytes a second that one of its ICI links carries in one direction
    network: float  # bytes a second between slices, over the data center's network
    host: tuple[int, ...]  # the shape of a host's chips


CHIPS = {  # a link has half of what the page calls its bidirectional bandwidth; v4, two devices a chip, is not planned
    "v4": Chip(275e12, 31.25 * 2**30, 1228e9, 50e9, 6.25e9, (2, 2, 1)),
    "v5e": Chip(197e12, 15.75 * 2**30, 819e9, 50e9, 3.125e9, (2, 2)),
    "v5p": Chip(459e12, 95.74 * 2**30, 2765e9, 100e9, 6.25e9, (2, 2, 1)),
    "v6e": Chip(918e12, 31.25 * 2**30, 1638e9, 100e9, 12.5e9, (2, 2)),
}
GENERATIONS = tuple(CHIPS)

_ASYNCHRONOUS = {
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
    "xla_enable_async_all_gather": "true",
    "xla_enable_async_all_reduce": "true",
    "xla_enable_async_reduce_scatter_fusion": "true",
    "xla_tpu_decompose_every_reduce_scatters_hlos": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": "true",
    "xla_tpu_scoped_vmem_limit_kib": "17408",  # a fused reduce-scatter of an 8B model takes 16.25 MiB of the default 16
}

COMPILER_OPTIONS = dict.fromkeys(GENERATIONS, _ASYNCHRONOUS)
"""What the compiler is told for each generation, of the step and of scoring: collectives beside the computation."""


QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}
"""Environment in which libtpu, on a machine without a TPU, looks for none and is silent."""


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

    @property
    def chip(self) -> Chip:
        """Its chips."""
        return CHIPS[self.generation]

    def devices(self) -> list[Any]:
        """Devices to compile for, of which none need be here; `libtpu` must be.

        Raises:
            ImportError: libtpu is not installed.
            ValueError: its compiler does not know such a slice.
        """
        if importlib.util.find_spec("libtpu") is None:
            raise ImportError("Compiling for a TPU takes libtpu: pip install 'tpaw_jax[plan]'.")
        from jax.experimental import topologies

        wanted: dict[str, Any] = {"num_slices": self.slices} if self.slices > 1 else {}
        if len(self.shape) == 3:  # the compiler is not told by the name; without it gathers become sums
            wanted["wrap"] = wraps(self.shape)
        host = tuple(map(min, self.chip.host, self.shape))
        if host != self.chip.host:
            wanted["chips_per_host_bounds"] = [*host, *[1] * (3 - len(host))]
        name = f"{self.generation}:{'x'.join(map(str, self.shape))}"
        try:
            devices = list(topologies.get_topology_desc(platform="tpu", topology_name=name, **wanted).devices)
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(f"{self.name}: the TPU compiler knows no such slice ({error}).") from error
        if len(devices) != self.chips:
            raise ValueError(f"{self.name}: the compiler sees {len(devices)} devices in {self.chips} chips.")
        return devices


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


def wraps(shape: tuple[int, ...]) -> tuple[bool, ...]:
    """Which dimensions of a slice close to rings: of v4 and v5p those of whole cubes, of v5e and v6e those of 16."""
    if len([size for size in shape if size > 1]) > 2:
        return (all(size % 4 == 0 for size in shape),) * len(shape)
    return tuple(size == 16 for size in shape)


def topology_of(devices: Sequence[Any]) -> Topology | None:
    """The topology that devices are of; None where they are no TPU."""
    name = generation(devices[0])
    if name is None:
        return None
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    along = zip(*(device.coords for device in devices), strict=True)
    shape = tuple(max(places) - min(places) + 1 for places in along)
    return Topology(name, shape[: len(CHIPS[name].host)], slices)


def arrange(devices: list[Any], sizes: tuple[int, ...], slices: int = 1) -> np.ndarray:
    """TPU devices in the shape of a mesh, neighbours on the torus beside each other; slices along its first axis."""
    from jax.experimental import mesh_utils

    within = (sizes[0] // slices, *sizes[1:])
    if max(within) == math.prod(within):  # JAX would wind some as one ring, of which no part is a line (see `lines`)
        ordered = sorted(devices, key=lambda d: (getattr(d, "slice_index", 0), *d.coords))
        return np.asarray(ordered).reshape(sizes)
    if slices > 1:
        across = (slices, *[1] * (len(sizes) - 1))
        return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def lines(devices: Sequence[Any]) -> tuple[int, ...]:
    """The lengths of the torus's dimensions that an axis of devices fills, the outermost first; else all as one.

    An axis of 16 chips of `v5e:4x4` is 4 lines of 4.
    """
    places = [tuple(d.coords) for d in devices]
    spanned = [sorted(set(along)) for along in zip(*places, strict=True)]
    fills = list(itertools.product(*spanned))
    for order in itertools.permutations(range(len(spanned))):
        in_order = lambda place: tuple(place[i] for i in order)  # noqa: B023, called within the turn
        if places == sorted(fills, key=in_order):
            return tuple(len(spanned[i]) for i in order if len(spanned[i]) > 1) or (1,)
    return (len(places),)


def generation(device: jax.Device) -> str | None:
    """The generation of a TPU device, one of `GENERATIONS`; None where it is another device."""
    kind = device.device_kind.lower()
    names = {"v5 lite": "v5e", "v5e": "v5e", "v5p": "v5p", "v5": "v5p", "v6": "v6e", "v4": "v4"}
    return next((name for part, name in names.items() if part in kind), None) if "tpu" in kind else None
