"""The device mesh, and one table that says how every array is split over it."""

import functools
import math
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

MESH_AXES = ("data", "fsdp", "expert", "tensor")

MESH_AXES_OF = {  # logical axis -> the mesh axes it is split over, or as many of them from the first on as divide it
    "batch": ("data", "fsdp", "expert"),
    "embed": ("fsdp", "expert"),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "layers": (),
    "experts": ("expert", "fsdp"),
    "expert_embed": ("fsdp",),  # if it does not divide the experts
    "norm": (),
}

PARAM_AXES = {  # flax path -> logical axes; see `logical_axes` for models with several stacks of layers
    "embed/embedding": ("vocab", "embed"),
    "head/embedding": ("vocab", "embed"),
    "final_norm/scale": ("norm",),
    "layers/attention_norm/scale": ("layers", "norm"),
    "layers/mlp_norm/scale": ("layers", "norm"),
    "layers/attention_post_norm/scale": ("layers", "norm"),
    "layers/mlp_post_norm/scale": ("layers", "norm"),
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
    "layers/router/kernel": ("layers", "embed", "norm"),
    "layers/expert_gate/kernel": ("layers", "experts", "expert_embed", "mlp"),
    "layers/expert_up/kernel": ("layers", "experts", "expert_embed", "mlp"),
    "layers/expert_down/kernel": ("layers", "experts", "mlp", "expert_embed"),
    "layers/shared_gate/kernel": ("layers", "embed", "norm"),
    "layers/token_embedding/embedding": ("layers", "norm", "embed"),
    "layers/token_projection/kernel": ("layers", "embed", "norm"),
    "layers/token_gate/kernel": ("layers", "embed", "norm"),
    "layers/token_out/kernel": ("layers", "norm", "embed"),
    **{f"layers/{name}/lora_b": ("layers", "norm", "heads") for name in ("q", "k", "v")},
    **{f"layers/{name}/lora_b": ("layers", "norm", "mlp") for name in ("gate", "up")},
    **{f"layers/{name}/{of}": ("layers", "heads") for name in ("q", "k", "v") for of in ("lora_m", "kernel_scale")},
    **{f"layers/{name}/{of}": ("layers", "mlp") for name in ("gate", "up") for of in ("lora_m", "kernel_scale")},
    **{f"layers/expert_{name}/lora_b": ("layers", "experts", "norm", "mlp") for name in ("gate", "up")},
    "layers/expert_gate/lora_a": ("layers", "experts", "expert_embed", "norm"),
    "layers/expert_down/lora_a": ("layers", "experts", "mlp", "norm"),
    "layers/expert_down/lora_b": ("layers", "experts", "norm", "expert_embed"),
    "layers/o/lora_a": ("layers", "heads", "norm"),
    "layers/down/lora_a": ("layers", "mlp", "norm"),
}


def preset_of(topology: tpu.Topology) -> MeshConfig:
    """The mesh for a topology: fsdp over one slice, or over 16 devices if a larger slice has a dimension of 16."""
    size = topology.device_count // topology.slices
    fsdp = 16 if 16 in topology.shape and size > 16 else size
    return MeshConfig(data=topology.device_count // fsdp, fsdp=fsdp)


PRESETS = {  # the names that mesh.preset takes, besides auto
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
    """Make the mesh of `MESH_AXES` over `devices`, by default all. On TPU, mesh neighbours are torus neighbours.

    Raises:
        ValueError: the product of the sizes is not the number of devices, or the preset is unknown.
    """
    devices = jax.devices() if devices is None else devices
    given, expert = config, config.expert
    if config.preset == "auto" and config.fsdp == -1:  # else it has been chosen for the batch (planning.layouts)
        topology = tpu.topology_of(devices)
        config = PRESETS["host"] if topology is None else preset_of(topology)
    elif config.preset and config.preset != "auto":
        if config.preset not in PRESETS:
            raise ValueError(f"mesh.preset is {config.preset!r}; it must be auto or one of {', '.join(PRESETS)}.")
        config = PRESETS[config.preset]
    of_preset = config is not given and config.fsdp != -1
    sizes = [config.data, config.fsdp // expert if of_preset else config.fsdp, expert, config.tensor]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh: the sizes {sizes} must be positive; at most one of them may be -1.")
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // int(np.prod([s for s in sizes if s != -1]))
    if int(np.prod(sizes)) != len(devices):
        raise ValueError(f"mesh: data x fsdp x expert x tensor = {sizes} does not cover the {len(devices)} devices.")
    slices = tpu.slice_count(devices)
    if slices > 1 and sizes[0] % slices:
        raise ValueError(f"mesh.data is {sizes[0]}; it must be a multiple of the number of slices, {slices}.")
    if tpu.generation(devices[0]) is None:
        return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES)
    return Mesh(tpu.arrange(list(devices), tuple(sizes), slices), MESH_AXES)


def sampling_mesh(tensor: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make the mesh for sampling, where `tensor` devices share one copy of the model.

    With `tensor` 1 it has this process's devices only. Otherwise it has those of all processes, because TPU v5e and
    v6e compile no program in which only some of a slice's devices communicate.

    Raises:
        ValueError: `tensor` does not divide the number of devices of a slice.
    """
    if devices is None:
        devices = jax.local_devices() if tensor == 1 else jax.devices()
    slices = tpu.slice_count(devices)
    if tensor < 1 or len(devices) % (tensor * slices):
        raise ValueError(
            f"sampling.tensor is {tensor}; it must divide the {len(devices) // slices} devices of a slice."
        )
    if tensor == 1:
        return Mesh(np.asarray(devices).reshape(-1, 1, 1, 1), MESH_AXES)
    return make_mesh(MeshConfig(data=-1, fsdp=1, tensor=tensor), devices)


def resplit(params: PyTree[Array], mesh: Mesh, dtype: jnp.dtype | None = None) -> PyTree[Array]:
    """Reshard parameters onto another mesh, of the same or other processes, and cast matrices to `dtype`.

    Parameters on several processes are gathered one at a time on every device, which then keeps its shard.
    """

    def reshard(path: Any, x: Array, sharding: NamedSharding) -> Array:
        if dtype is not None and x.ndim > 1 and x.dtype != dtype and not stays_exact(path, x):
            x = _cast(x, dtype)
        if x.sharding.is_equivalent_to(sharding, x.ndim):
            return x
        if x.is_fully_addressable and sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        old: Any = x.sharding
        full = {s.device: s.data for s in _replicate(x, replicated(old.mesh)).addressable_shards}
        shards = [full[device][index] for device, index in sharding.addressable_devices_indices_map(x.shape).items()]
        return jax.make_array_from_single_device_arrays(x.shape, sharding, shards)

    return jax.tree_util.tree_map_with_path(reshard, params, param_shardings(params, mesh))


def stays_exact(path: tuple[Any, ...], x: Any) -> bool:
    """Whether a matrix of parameters is not cast for sampling: 8-bit kernels, and factors of outputs."""
    return x.dtype == jnp.int8 or path_name(path).endswith(("kernel_scale", "lora_m"))


@functools.partial(jax.jit, static_argnums=1)
def _cast(x: Array, dtype: jnp.dtype) -> Array:
    return x.astype(dtype)


@functools.partial(jax.jit, static_argnums=1)
def _replicate(x: Array, everywhere: NamedSharding) -> Array:
    return jax.lax.with_sharding_constraint(x, everywhere)


def row_shards(mesh: Mesh, context: int = 1) -> int:
    """The number of shards that the rows of a batch are split into, if `context` devices share rows."""
    return int(np.prod([mesh.shape[axis] for axis in MESH_AXES_OF["batch"]])) // context


def logical_axes(name: str) -> tuple[str, ...] | None:
    """The logical axes of a parameter; those of every stack of layers are listed under `layers/` in `PARAM_AXES`."""
    stack, _, rest = name.partition("/")
    return PARAM_AXES.get(f"layers/{rest}" if stack.endswith("layers") else name)


def features_of(name: str, spec: P) -> tuple[int, tuple[str, ...]]:
    """The dimension of a parameter that is gathered where it is used, and the mesh axes that it is split over."""
    logical = logical_axes(name) or ()
    if "experts" in logical:
        dimension = next((i for i in range(len(spec)) if "fsdp" in axes_of(spec, i)), None)
        return (0, ()) if dimension is None else (dimension, ("fsdp",))
    dimension = logical.index("embed") if "embed" in logical else 0
    return dimension, axes_of(spec, dimension) if "embed" in logical else ()


def axes_of(spec: P, dimension: int) -> tuple[str, ...]:
    """The mesh axes that a dimension is split over."""
    axes = spec[dimension] if dimension < len(spec) else None
    return axes if isinstance(axes, tuple) else (axes,) if axes else ()


def scatter_stages(mesh: Mesh) -> tuple[int, ...]:
    """The sizes of the stages of a reduce-scatter over `fsdp`: one for each torus dimension that the axis spans.

    Over more than 8 chips that are not in one line, the TPU compiler turns a single reduce-scatter into an all-reduce,
    which moves twice the bytes.
    """
    devices = list(mesh.devices[0, :, 0, 0])
    if len(devices) <= 8 or tpu.generation(devices[0]) is None:
        return (len(devices),)
    return tpu.lines(devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds in full."""
    return NamedSharding(mesh, P())


def rows(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """The sharding of batch rows: split over `MESH_AXES_OF["batch"]`, after `leading` axes that are not split."""
    return NamedSharding(mesh, P(*[None] * leading, MESH_AXES_OF["batch"]))


def param_sharder(mesh: Mesh) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """A function from (flax path, shape) to sharding. Unknown paths are not split."""

    def sharding(name: str, shape: tuple[int, ...]) -> NamedSharding:
        logical = logical_axes(name) or ("norm",) * len(shape)
        spec: list[tuple[str, ...]] = []
        for axis, size in zip(logical, shape, strict=True):
            axes = tuple(a for a in MESH_AXES_OF[axis] if mesh.shape[a] > 1 and not any(a in used for used in spec))
            while size % math.prod(mesh.shape[a] for a in axes):
                axes = axes[:-1]
            spec.append(axes)
        return NamedSharding(mesh, P(*(axes or None for axes in spec)))

    return sharding


def param_shardings(params: PyTree[Any], mesh: Mesh) -> PyTree[NamedSharding]:
    """The sharding of every parameter, from its path and shape."""
    sharder = param_sharder(mesh)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: sharder(path_name(path), leaf.shape), params)


def param_specs(params: PyTree[Any], mesh: Mesh) -> dict[str, P]:
    """The partition spec of every parameter, by its flax path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(param_shardings(params, mesh))
    return {path_name(path): leaf.spec for path, leaf in leaves}


def path_name(path: tuple[Any, ...]) -> str:
    """Write the path of a leaf in a tree of parameters as in `PARAM_AXES`."""
    return "/".join(str(key.key) for key in path)


def place(tree: PyTree[Any], shardings: PyTree[NamedSharding]) -> PyTree[Array]:
    """Move host arrays, the same on all processes, to the devices; `shardings` may be a prefix of the tree.

    Each process copies only the shards of its own devices.
    """

    def place_leaf(x: Any, sharding: NamedSharding) -> Array:
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place_leaf, tree, jax.tree.broadcast(shardings, tree))


def abstract(tree: PyTree[Array]) -> PyTree[jax.ShapeDtypeStruct]:
    """The shapes, dtypes and shardings of a tree, without its arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def single_device_mesh() -> Mesh:
    """A mesh of the first local device, for use on one accelerator or CPU."""
    return Mesh(np.asarray(jax.local_devices()[:1]).reshape(1, 1, 1, 1), MESH_AXES)
