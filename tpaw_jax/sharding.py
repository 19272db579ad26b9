"""Devices -> mesh, and logical axes -> mesh axes as one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

from tpaw_jax.config import MeshConfig

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


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh (data, fsdp, tensor) over `devices`, all of them by default.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh: the sizes {sizes} must be positive, and at most one of them -1.")
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // int(np.prod([s for s in sizes if s != -1]))
    if int(np.prod(sizes)) != len(devices):
        raise ValueError(f"mesh: data x fsdp x tensor = {sizes} does not cover the {len(devices)} devices there are.")
    return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES)


def row_shards(mesh: Mesh) -> int:
    """The number of parts that the rows of a batch are split into."""
    return int(np.prod([mesh.shape[axis] for axis in MESH_AXES_OF["batch"]]))


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
            axes = MESH_AXES_OF[axis]
            divides = size % int(np.prod([mesh.shape[a] for a in axes])) == 0
            spec.append(axes if axes and divides else None)
        return NamedSharding(mesh, P(*spec))

    return sharding


def param_shardings(params: PyTree[Any], mesh: Mesh) -> PyTree[NamedSharding]:
    """The sharding of every parameter, by its path and shape."""
    sharder = param_sharder(mesh)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: sharder("/".join(str(key.key) for key in path), leaf.shape), params
    )


def abstract(tree: PyTree[Array]) -> PyTree[jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings without the arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
