"""Cloud TPU generations, their topologies, and the options of their compiler."""

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
    """The published figures of one chip of a generation (docs.cloud.google.com/tpu/docs has a page for each)."""

    peak_flops: float  # per second, bfloat16 matmuls
    hbm_bytes: float  # of memory that the compiler allows programs
    hbm_bandwidth: float  # bytes per second
    ici_bandwidth: float  # bytes per second over one ICI link in one direction: half the published bidirectional one
    dcn_bandwidth: float  # bytes per second between slices, over the data center's network
    host: tuple[int, ...]  # shape of the chips of one host in a slice of several
    vmem_bytes: int = 60 * 2**20  # of on-chip memory that attention may use; v5p and tpu7x have 64 MiB
    devices: int = 1  # that JAX sees in it

    @property
    def device(self) -> "Chip":
        """The figures of one of its devices. They share the links: a ring through all of them uses each link once."""
        n, own = self.devices, ("peak_flops", "hbm_bytes", "hbm_bandwidth", "dcn_bandwidth")
        return self._replace(devices=1, **{name: getattr(self, name) / n for name in own})


CHIPS = {
    "v4": Chip(275e12, 31.25 * 2**30, 1228e9, 50e9, 6.25e9, (2, 2, 1), vmem_bytes=16 * 2**20),
    "v5e": Chip(197e12, 15.75 * 2**30, 819e9, 50e9, 3.125e9, (2, 2), vmem_bytes=110 * 2**20),
    "v5p": Chip(459e12, 95.74 * 2**30, 2765e9, 100e9, 6.25e9, (2, 2, 1)),
    "v6e": Chip(918e12, 31.25 * 2**30, 1638e9, 100e9, 12.5e9, (2, 2), vmem_bytes=110 * 2**20),
    "tpu7x": Chip(2307e12, 2 * 94.74 * 2**30, 7380e9, 100e9, 12.5e9, (2, 2, 1), devices=2),
}
GENERATIONS = tuple(CHIPS)

_ASYNCHRONOUS = {
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
    "xla_enable_async_all_gather": "true",
    "xla_enable_async_all_reduce": "true",
    "xla_enable_async_reduce_scatter_fusion": "true",
    "xla_tpu_decompose_every_reduce_scatters_hlos": "true",
    "xla_jf_crs_combiner_threshold_in_bytes": "65536",  # what is combined is sent synchronously
}
_BY_FUSION = _ASYNCHRONOUS | {  # the TensorCore sends parts of a collective between the tiles of a matmul
    "xla_tpu_enable_async_all_to_all": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_kloop_fusions": "true",
    "xla_tpu_scoped_vmem_limit_kib": "20480",  # default 16 MiB; a fused collective of an 8B model takes 18.12
}
_BY_SPARSE_CORE = _ASYNCHRONOUS | {  # the SparseCores run collectives beside the TensorCore
    "xla_tpu_enable_async_all_to_all": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "false",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "false",
    "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": "false",
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
    "xla_tpu_use_tc_device_shape_on_sc": "true",
    "xla_sc_disable_megacore_partitioning": "true",
}

COMPILER_OPTIONS = {
    "v4": _ASYNCHRONOUS,
    "v5e": _BY_FUSION,  # the only generation for which the compiler of libtpu 0.0.50 accepts it
    "v5p": _BY_SPARSE_CORE,
    "v6e": _BY_SPARSE_CORE,
    "tpu7x": _BY_SPARSE_CORE,
}
"""Options for the training step and scoring by generation, with which collectives run beside computation.

Those of the SparseCores are from MaxText's benchmarks/xla_flags_library.py.
"""


def options_of(mesh: Mesh, changes: Sequence[str], has_experts: bool = False) -> dict[str, str]:
    """The compiler options for the mesh's devices: `COMPILER_OPTIONS` on TPUs, changed by `mesh.compiler_options`.

    `has_experts` tells that the program has ragged matmuls. On v5e, libtpu 0.0.50 then runs out of on-chip memory with
    fused reduce-scatters if every device computes all experts, and without them if devices hold different experts.
    """
    devices = list(mesh.devices.flat)
    name = generation(devices[0])
    options = dict(COMPILER_OPTIONS[name]) if name else {}
    if name == "v5e" and len(devices) > 16 * slice_count(devices):  # on larger slices, it does not compile
        options.pop("xla_tpu_enable_async_all_to_all")
    if has_experts and mesh.shape["expert"] == 1:
        options.pop("xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter", None)
    for change in changes:
        option, _, value = change.partition("=")
        options.pop(option, None)
        if value:
            options[option] = value
    return options


def check_options(mesh: Mesh, changes: Sequence[str]) -> None:
    """Compile nothing with the options of `changes`.

    Raises:
        ValueError: the compiler knows no such option, or not such a value.
    """
    if changes:
        nothing = jax.jit(lambda: 0, compiler_options=options_of(mesh, changes))
        try:
            nothing.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(f"mesh.compiler_options: the compiler rejects them ({error}).") from error


class Topology(NamedTuple):
    """Slices of one generation: `v5e:16x16` is one slice of 256 chips in a two-dimensional torus."""

    generation: str
    shape: tuple[int, ...]
    slices: int

    @property
    def chips(self) -> int:
        """The number of chips in all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def name(self) -> str:
        """The topology as written on the command line."""
        one = f"{self.generation}:{'x'.join(map(str, self.shape))}"
        return one if self.slices == 1 else f"{self.slices} x {one}"

    @property
    def chip(self) -> Chip:
        """The figures of one of its chips."""
        return CHIPS[self.generation]

    @property
    def device_count(self) -> int:
        """The number of devices that JAX sees in all slices."""
        return self.chips * self.chip.devices

    def devices(self) -> list[Any]:
        """Devices to compile for. They need not exist on this machine, but libtpu must be installed.

        Raises:
            ImportError: libtpu is not installed.
            ValueError: the compiler does not support this slice.
        """
        if importlib.util.find_spec("libtpu") is None:
            raise ImportError("Compiling for a TPU needs libtpu: pip install 'tpaw_jax[plan]'.")
        from jax.experimental import topologies

        options: dict[str, Any] = {"num_slices": self.slices} if self.slices > 1 else {}
        if len(self.shape) == 3:  # the name does not imply it, and without it gathers become sums
            options["wrap"] = wraps(self.shape)
        one_host = len(self.shape) == 2 and self.chips // self.slices <= 8  # of up to 8 chips
        host = self.shape if one_host else tuple(map(min, self.chip.host, self.shape))
        if host != self.chip.host:
            options["chips_per_host_bounds"] = [*host, *[1] * (3 - len(host))]
        name = f"{self.generation}:{'x'.join(map(str, self.shape))}"
        try:
            devices = list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(f"{self.name}: the TPU compiler does not support this slice ({error}).") from error
        if len(devices) != self.device_count:  # v4: two for a chip, where a TPU VM has one
            raise ValueError(f"{self.name}: the compiler reports {len(devices)} devices, not {self.device_count}.")
        return devices


def parse_topology(text: str, slices: int = 1) -> Topology:
    """Read `v5e:16x16`, or `2 x v5e:16x16` for two slices.

    Raises:
        ValueError: the generation is unknown, or the shape is missing.
    """
    match = re.fullmatch(r"(?:(\d+) ?x ?)?(\w+):(\d+(?:x\d+)+)", text)
    if match is None or match.group(2) not in GENERATIONS:
        raise ValueError(
            f"'{text}' is not a topology; write a generation ({', '.join(GENERATIONS)}) and a shape, as in v5e:16x16, "
            "or '2 x v5e:16x16' for two slices."
        )
    shape = tuple(map(int, match.group(3).split("x")))
    return Topology(match.group(2), shape, int(match.group(1) or slices))


def wraps(shape: tuple[int, ...]) -> tuple[bool, ...]:
    """Which dimensions of a slice are rings: in 3D all, if all sizes are multiples of 4, or none; in 2D those of 16."""
    if len([size for size in shape if size > 1]) > 2:
        return (all(size % 4 == 0 for size in shape),) * len(shape)
    return tuple(size == 16 for size in shape)


def topology_of(devices: Sequence[Any]) -> Topology | None:
    """The topology that the devices form; None if they are not TPUs."""
    name = generation(devices[0])
    if name is None:
        return None
    along = zip(*(device.coords for device in devices), strict=True)
    shape = tuple(max(places) - min(places) + 1 for places in along)
    return Topology(name, shape[: len(CHIPS[name].host)], slice_count(devices))


def slice_count(devices: Sequence[Any]) -> int:
    """The number of slices that the devices belong to; 1 if they are not TPUs."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def arrange(devices: list[Any], sizes: tuple[int, ...], slices: int = 1) -> np.ndarray:
    """Arrange TPU devices in the shape of a mesh: torus neighbours adjacent, slices along the first axis."""
    from jax.experimental import mesh_utils

    within = (sizes[0] // slices, *sizes[1:])
    if max(within) == math.prod(within):  # JAX may order them as one ring, no part of which is a line (see `lines`)
        ordered = sorted(devices, key=lambda d: (getattr(d, "slice_index", 0), *_place(d)))
        return np.asarray(ordered).reshape(sizes)
    if slices > 1:
        across = (slices, *[1] * (len(sizes) - 1))
        return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def lines(devices: Sequence[Any]) -> tuple[int, ...]:
    """The lengths of the torus dimensions that an axis of devices fills, outermost first; then the devices of a chip.

    An axis of all 16 chips of `v5e:4x4` gives (4, 4). Devices that fill no box in order give their number.
    """
    coords = [_place(d) for d in devices]
    spanned = [sorted(set(along)) for along in zip(*coords, strict=True)]
    box = list(itertools.product(*spanned))
    for order in itertools.permutations(range(len(spanned))):
        in_order = lambda place: tuple(place[i] for i in order)  # noqa: B023, called in this iteration only
        if coords == sorted(box, key=in_order):
            return tuple(len(spanned[i]) for i in order if len(spanned[i]) > 1) or (1,)
    return (len(coords),)


def _place(device: Any) -> tuple[int, ...]:
    """A device's place in the torus and on its chip."""
    return *device.coords, getattr(device, "core_on_chip", 0)


def generation(device: jax.Device) -> str | None:
    """The generation of a TPU device, one of `GENERATIONS`; None for any other device."""
    kind = device.device_kind.lower()
    names = {"v5 lite": "v5e", "v5e": "v5e", "v5p": "v5p", "v5": "v5p", "v6": "v6e", "v4": "v4", "7x": "tpu7x"}
    return next((name for part, name in names.items() if part in kind), None) if "tpu" in kind else None
