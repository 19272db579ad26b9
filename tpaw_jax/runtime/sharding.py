"""Devices -> mesh, and logical axes -> mesh axes as one table."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

from tpaw_jax.config import MeshConfig
from tpaw_jax.runtime import tpu

MESH_AXES = ("data", "fsdp", "tensor")

MESH_AXES_OF = {  # logical axis: the mesh axes it is split over
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "layers": (),
    "norm": (),
}

PARAM_AXES = {  # flax path: logical axes
    "embed/embedding": ("vocab", "embed"),
    "head/embedding": ("vocab", "embed"),
    "final_norm/scale": ("norm",),
    "layers/attention_norm/scale": ("layers", "norm"),
    "layers/mlp_norm/scale": ("layers", "norm"),
    "layers/q_norm/scale": ("layers", "norm"),
    "layers/k_norm/scale": ("layers", "norm"),
    "layers/q/kernel": ("layers", "embed", "heads"),
    "layers/k/kernel": ("layers", "embed", "heads"),
    "layers/v/kernel": ("layers", "embed", "heads"),
    "layers/q/bias": ("layers", "heads"),
    "layers/k/bias": ("layers", "heads"),
    "layers/v/bias": ("layers", "heads"),
    "layers/o/kernel": ("layers", "heads", "embed"),
    "layers/gate/kernel": ("layers", "embed", "mlp"),
    "layers/up/kernel": ("layers", "embed", "mlp"),
    "layers/down/kernel": ("layers", "mlp", "embed"),
}


def preset_of(topology: tpu.Topology) -> MeshConfig:
    """The preset of a topology: parameters split over a slice, or over 16 chips where it has a dimension of 16."""
    size = topology.chips // topology.slices
    fsdp = 16 if 16 in topology.shape and size > 16 else size
    return MeshConfig(data=topology.chips // fsdp, fsdp=fsdp)


PRESETS = {  # (data, fsdp, tensor) of known places
    "chip": MeshConfig(data=1, fsdp=1),
    "host": MeshConfig(data=1, fsdp=-1),
    **{
        name: preset_of(tpu.parse_topology(text))
        for name, text in {
            "v5e-16": "v5e:4x4",
            "v5e-64": "v5e:8x8",
            "v5e-256": "v5e:16x16",
            "v5p-64": "v5p:4x4x4",
            "v6e-16": "v6e:4x4",
            "v6e-256": "v6e:16x16",
            "2 x v5e-256": "2 x v5e:16x16",
            "4 x v5e-256": "4 x v5e:16x16",
        }.items()
    },
}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh (data, fsdp, tensor) over `devices`, by default all; on TPU, neighbours of the torus side by side.

    Raises:
        ValueError: the sizes do not multiply to the number of devices, or the preset is unknown.
    """
    devices = jax.devices() if devices is None else devices
    if config.preset == "auto":
        topology = tpu.topology_of(devices)
        config = PRESETS["host"] if topology is None else preset_of(topology)
    elif config.preset:
        if config.preset not in PRESETS:
            raise ValueError(f"mesh.preset is {config.preset!r}; known are auto, {', '.join(PRESETS)}.")
        config = PRESETS[config.preset]
    sizes = [config.data, config.fsdp, config.tensor]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh: the sizes {sizes} must be positive, and at most one of them -1.")
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // int(np.prod([s for s in sizes if s != -1]))
    if int(np.prod(sizes)) != len(devices):
        raise ValueError(f"mesh: data x fsdp x tensor = {sizes} does not cover the {len(devices)} devices there are.")
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1 and sizes[0] % slices:
        raise ValueError(
            f"mesh.data is {sizes[0]}; it must be a multiple of the {slices} slices, which it is split over."
        )
    if tpu.generation(devices[0]) is None:
        return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES)
    return Mesh(tpu.arrange(list(devices), tuple(sizes), slices), MESH_AXES)


def sampling_mesh(tensor: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices that sample together: this process's, each with a whole model, or where `tensor` share one, all.

    Of all processes, since TPU v5e and v6e compile no program in which a part of a slice's devices exchange anything.

    Raises:
        ValueError: `tensor` does not divide the number of devices.
    """
    if devices is None:
        devices = jax.local_devices() if tensor == 1 else jax.devices()
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if tensor < 1 or len(devices) % (tensor * slices):
        raise ValueError(
            f"sampling.tensor is {tensor}; it must divide the {len(devices) // slices} devices of a slice."
        )
    if tensor == 1:
        return Mesh(np.asarray(devices).reshape(-1, 1, 1), MESH_AXES)
    return make_mesh(MeshConfig(data=-1, fsdp=1, tensor=tensor), devices)


def resplit(params: PyTree[Array], mesh: Mesh, dtype: jnp.dtype | None = None) -> PyTree[Array]:
    """Parameters that are split over a mesh of any processes, split as another mesh wants them; matrices in `dtype`.

    One parameter at a time comes together on every device, which keeps its part of it.
    """

    def own_part(x: Array, place: NamedSharding) -> Array:
        if dtype is not None and x.ndim > 1 and x.dtype != dtype:
            x = _cast(x, dtype)
        if x.sharding.is_equivalent_to(place, x.ndim):
            return x
        if x.is_fully_addressable and place.is_fully_addressable:
            return jax.device_put(x, place)
        split: Any = x.sharding
        whole = {s.device: s.data for s in _replicate(x, replicated(split.mesh)).addressable_shards}
        own = [whole[device][index] for device, index in place.addressable_devices_indices_map(x.shape).items()]
        return jax.make_array_from_single_device_arrays(x.shape, place, own)

    return jax.tree.map(own_part, params, param_shardings(params, mesh))


@functools.partial(jax.jit, static_argnums=1)
def _cast(x: Array, dtype: jnp.dtype) -> Array:
    return x.astype(dtype)


@functools.partial(jax.jit, static_argnums=1)
def _replicate(x: Array, everywhere: NamedSharding) -> Array:
    return jax.lax.with_sharding_constraint(x, everywhere)


def row_shards(mesh: Mesh) -> int:
    """The number of parts that the rows of a batch are split into."""
    return int(np.prod([mesh.shape[axis] for axis in MESH_AXES_OF["batch"]]))


def scatter_stages(mesh: Mesh) -> tuple[int, ...]:
    """The steps in which sums are scattered over `fsdp`: one for each dimension of the torus that the axis spans.

    The TPU's compiler makes a sum of everything, of twice the bytes, of a scattered sum over more than 8 chips that do
    not lie on a line.
    """
    devices = list(mesh.devices[0, :, 0])
    if len(devices) <= 8 or tpu.generation(devices[0]) is None:
        return (len(devices),)
    return tpu.lines(devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Everything on every device."""
    return NamedSharding(mesh, P())


def rows(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Batch rows split over data and fsdp, after `leading` axes that are not split."""
    return NamedSharding(mesh, P(*[None] * leading, MESH_AXES_OF["batch"]))


def param_sharder(mesh: Mesh) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """(flax path, shape) -> sharding. Unknown paths, and axes that do not divide, are not split."""

    def sharding(name: str, shape: tuple[int, ...]) -> NamedSharding:
        logical = PARAM_AXES.get(name, ("norm",) * len(shape))
        spec = []
        for axis, size in zip(logical, shape, strict=True):
            axes = tuple(a for a in MESH_AXES_OF[axis] if mesh.shape[a] > 1)
            divides = size % int(np.prod([mesh.shape[a] for a in axes])) == 0
            spec.append(axes if axes and divides else None)
        return NamedSharding(mesh, P(*spec))

    return sharding


def param_shardings(params: PyTree[Any], mesh: Mesh) -> PyTree[NamedSharding]:
    """The sharding of every parameter, by its path and shape."""
    sharder = param_sharder(mesh)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: sharder(path_name(path), leaf.shape), params)


def param_specs(params: PyTree[Any], mesh: Mesh) -> dict[str, P]:
    """How each parameter is split, by its flax path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(param_shardings(params, mesh))
    return {path_name(path): leaf.spec for path, leaf in leaves}


def path_name(path: tuple[Any, ...]) -> str:
    """A leaf's path in a tree of parameters as in `PARAM_AXES`."""
    return "/".join(str(key.key) for key in path)


def place(tree: PyTree[Any], shardings: PyTree[NamedSharding]) -> PyTree[Array]:
    """Arrays of the host, the same on all processes, on the devices; `shardings` may stand for whole subtrees.

    Each process copies what its own devices hold.
    """

    def one(x: Any, sharding: NamedSharding) -> Array:
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree, jax.tree.broadcast(shardings, tree))


def abstract(tree: PyTree[Array]) -> PyTree[jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings without the arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
