"""The collectives of a sharded model. Parameters move between devices layer by layer; batch rows never move.

All of this runs inside `shard_map`, on one device's shards.

- `fsdp` axis (ZeRO-3, arXiv 1910.02054): parameters are all-gathered in the compute dtype where they are used, in the
  forward pass and again in the backward pass. Their gradients are reduce-scattered.
- `expert` axis: each device holds some of the experts, and the exchange of tokens is in `exchange`. All other
  parameters are sharded over it as over `fsdp`.
- `tensor` axis (Megatron, arXiv 1909.08053): heads, feed-forward and vocabulary stay sharded, and partial results are
  summed.

`sharding.PARAM_AXES` is the table of how each parameter is sharded. All communication of the model is in this file,
`training.gradients` or `training.train_step`.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from tpaw_jax.models.adapters import ADAPTERS
from tpaw_jax.runtime import sharding

ATTENTION = ("q", "k", "v", "o")
"""The projections of a layer's attention: [D, heads], and that of its output [heads, D]. All shard D over `fsdp`."""

LOOKED_UP = ("embed/embedding", "token_embedding/embedding")
"""Tables that are not gathered: tokens are looked up on each device's columns. The names of parameters end so."""

SENT_ALONE = 2**23
"""Elements of a matrix from which the TPU compiler sends it beside computation: it does for 2**24, not for 2**22."""


class Parallel(NamedTuple):
    """How a model's parameters are sharded, and how their gradients are reduced."""

    specs: Mapping[str, P] = {}  # partition spec by flax path; parameters without one are not sharded
    tensor: int = 1  # size of the `tensor` axis
    context: int = 1  # devices of `fsdp` that share rows, see `models.parallel.context`
    reduce_dtype: str = "float32"  # dtype in which gradients are reduced over `fsdp` and `expert`
    scatter_stages: tuple[int, ...] = ()  # see `sharding.scatter_stages`; (): reduce-scatter in one stage
    sum_over_data: bool = False  # the backward pass also sums the gradients of `summed_over_data` over `data`
    slices: int = 1  # number of slices that `data` spans
    expert: int = 1  # size of the `expert` axis

    def summed_over_data(self) -> frozenset[str]:
        """The parameters whose gradients are summed over `data` where they are scattered, beside computation.

        This moves the fewest bytes only if a step has one micro-batch. A table that is also looked up is left out,
        because its gradient has a second part.
        """
        if not self.sum_over_data:
            return frozenset()
        gathered = [name for name, spec in self.specs.items() if sharding.features_of(name, spec)[1]]
        return frozenset(name for name in gathered if not name.endswith(LOOKED_UP))

    def layer(self, params: PyTree[Array], dtype: DTypeLike, stack: str) -> PyTree[Array]:
        """Gather the parameters of one layer of a stack over `fsdp`, with matrices in the compute dtype."""

        def gather(path, x):
            name = f"{stack}/{sharding.path_name(path)}"
            if name.endswith(LOOKED_UP):
                return x
            of_norm, of_adapter = name.split("/")[1] in ("q_norm", "k_norm"), name.split("/")[-1] in ADAPTERS
            if self.tensor > 1 and (of_norm or (of_adapter and not self._over_tensor(name))):
                x = copy_over_tensor(x)  # all devices' features share it, so its gradient sums over them
            as_it_is = x.ndim == 1 or x.dtype == jnp.int8
            return self._gather(x, name, x.dtype if as_it_is else dtype, self.sum_over_data)

        return jax.tree_util.tree_map_with_path(gather, params)

    def join_attention(
        self, params: PyTree[Array], stack: str
    ) -> tuple[PyTree[Array], Callable[[PyTree[Array]], PyTree[Array]]]:
        """Join the matrices of q, k and v of all layers of a stack, and that of o if it is small, see `SENT_ALONE`.

        Return the parameters, and the function that splits the matrices of one gathered layer. Matrices that are not
        gathered are left as they are.
        """
        _, axes = self._features(f"{stack}/q/kernel")
        if not axes:
            return params, lambda layer: layer
        whole_o = math.prod(params["o"]["kernel"].shape[1:]) * math.prod(map(lax.axis_size, axes))
        joins = lambda name: name in params and (name != "o" or whole_o < SENT_ALONE)
        names = tuple(filter(joins, ATTENTION))
        transposed = lambda name, x: x.swapaxes(-2, -1) if name == "o" else x
        kernels = [transposed(name, params[name]["kernel"]) for name in names]
        ends = np.cumsum([kernel.shape[-1] for kernel in kernels])[:-1]

        def split(layer):
            parts = zip(names, jnp.split(layer["q"]["kernel"], ends, axis=-1), strict=True)
            return {**layer, **{name: {**layer[name], "kernel": transposed(name, x)} for name, x in parts}}

        without = {name: {key: x for key, x in params[name].items() if key != "kernel"} for name in names[1:]}
        return {**params, "q": {**params["q"], "kernel": jnp.concatenate(kernels, axis=-1)}, **without}, split

    def embed(
        self,
        table: Any,  # [v, d]: an array, or whatever `take` reads
        name: str,
        tokens: Int[Array, "M"],
        dtype: DTypeLike,
        take: Callable[[Any, Array], Array] = lambda table, tokens: table[tokens],
    ) -> Float[Array, "M D"]:
        """Look up tokens in the sharded embedding table `name`.

        Each device looks up the tokens of all devices that have other columns, and an all-to-all exchanges the results.
        This moves M D values, whereas gathering the table would move V D. The gradient of a table row is summed in the
        table's dtype.
        """
        by_token = "tensor" in sharding.axes_of(self.specs.get(name, P()), 0)
        _, axes = self._features(name)
        if axes:
            tokens = lax.all_gather(tokens, axes, tiled=True)
        if by_token:
            tokens = tokens - lax.axis_index("tensor") * table.shape[0]
            local = (tokens >= 0) & (tokens < table.shape[0])
            embedded = take(table, jnp.where(local, tokens, 0)).astype(dtype)
            embedded = sum_over_tensor(jnp.where(local[:, None], embedded, 0))
        else:
            embedded = take(table, tokens).astype(dtype)
        return lax.all_to_all(embedded, axes, split_axis=0, concat_axis=1, tiled=True) if axes else embedded

    def table(self, table: Float[Array, "v d"], name: str, dtype: DTypeLike) -> Float[Array, "v D"]:
        """Gather the output embedding: all columns of the device's part of the vocabulary."""
        return self._gather(table, name, dtype, name in self.summed_over_data())

    def local_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a device's shard of a parameter."""
        parts = [
            math.prod(lax.axis_size(a) for a in sharding.axes_of(self.specs.get(name, P()), i))
            for i in range(len(shape))
        ]
        return tuple(size // n for size, n in zip(shape, parts, strict=True))

    def whole_vocabulary(self, logits: Float[Array, "*batch v"], name: str) -> Float[Array, "*batch V"]:
        """Gather the logits of the full vocabulary over `tensor`. Do not differentiate through it."""
        if not self.splits_vocabulary(name):
            return logits
        return lax.all_gather(logits, "tensor", axis=logits.ndim - 1, tiled=True)

    def splits_vocabulary(self, name: str) -> bool:
        """Tell whether the table `name` has its vocabulary sharded over `tensor`."""
        return self.tensor > 1 and "tensor" in sharding.axes_of(self.specs.get(name, P()), 0)

    def copy_to_tensor(self, x: Array) -> Array:
        """Use `x`, equal on all devices of `tensor`, as input of sharded layers; sums its gradient over `tensor`."""
        return copy_over_tensor(x) if self.tensor > 1 else x

    def reduce_from_tensor(self, x: Array) -> Array:
        """Sum the partial results of the devices of `tensor`."""
        return sum_over_tensor(x) if self.tensor > 1 else x

    def sum_of_rows(self, x: Array) -> Array:
        """Sum over the devices that share rows."""
        return lax.psum(x, "fsdp", axis_index_groups=groups(self.context)) if self.context > 1 else x

    def _over_tensor(self, name: str) -> bool:
        spec = self.specs.get(name, P())
        return any("tensor" in sharding.axes_of(spec, dimension) for dimension in range(len(spec)))

    def _features(self, name: str) -> tuple[int, tuple[str, ...]]:
        return sharding.features_of(name, self.specs.get(name, P()))

    def _gather(self, x: Array, name: str, dtype: DTypeLike, sum_over_data: bool) -> Array:
        dimension, axes = self._features(name)
        if not axes:
            return x.astype(dtype)
        from_end = dimension - len(sharding.logical_axes(name) or ())  # `x` may lack the axis of layers
        return _all_gather(x, (x.ndim + from_end, axes), jnp.dtype(dtype), self, sum_over_data)


def groups(context: int) -> list[list[int]]:
    """The groups of devices that share rows, by their index on `fsdp`. Call it inside `shard_map`."""
    return [list(range(first, first + context)) for first in range(0, lax.axis_size("fsdp"), context)]


UNSHARDED = Parallel()
"""Each device has all parameters."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _all_gather(
    x: Array, along: tuple[int, tuple[str, ...]], dtype: DTypeLike, parallel: Parallel, sum_over_data: bool
) -> Array:
    """All-gather a dimension of `x` over mesh axes, in `dtype`. Its gradient is reduce-scattered in `reduce_dtype`."""
    dimension, axes = along
    return lax.all_gather(x.astype(dtype), axes, axis=dimension, tiled=True)


def _all_gather_forward(x, along, dtype, parallel, sum_over_data):
    return _all_gather(x, along, dtype, parallel, sum_over_data), jnp.zeros((), x.dtype)


def _all_gather_backward(along, dtype, parallel, sum_over_data, like, gradient):
    (dimension, axes), own = along, gradient.astype(parallel.reduce_dtype)
    if "fsdp" in axes:
        own = _sum_scattered(own, dimension, parallel.scatter_stages)
    if "expert" in axes:
        own = lax.optimization_barrier(lax.psum_scatter(own, "expert", scatter_dimension=dimension, tiled=True))
    own = all_reduce_over_data(own, parallel.slices) if sum_over_data else own
    return (own.astype(like.dtype),)


def _sum_scattered(x: Array, axis: int, stages: tuple[int, ...]) -> Array:
    """Reduce-scatter `x` along `axis` over `fsdp`, in one stage per dimension of `stages`.

    The outermost dimension comes first: after it, a device has the shards of all devices that differ from it only in
    the remaining dimensions. The axis is moved to the front and kept there in memory, because the TPU compiler would
    otherwise use all-reduces for small shards of a last axis. They would send twice the bytes.
    """
    # The barriers keep the compiler from cutting a sum before it scatters it: it would then send twice the bytes.
    if len(stages) <= 1 and (axis or x.ndim < 3):
        return lax.optimization_barrier(lax.psum_scatter(x, "fsdp", scatter_dimension=axis, tiled=True))
    x = jnp.moveaxis(x, axis, 0)
    shape = x.shape
    x = x.reshape(-1, shape[-1])  # libtpu 0.0.50 fails to compile the scattered sums of stacked matrices
    row_major = Layout(major_to_minor=(0, 1))
    devices = np.arange(math.prod(stages)).reshape(stages)
    for i, size in enumerate(stages):
        groups = np.moveaxis(devices, i, -1).reshape(-1, size).tolist()
        x = lax.optimization_barrier(lax.psum_scatter(x, "fsdp", tiled=True, axis_index_groups=groups))
        x = with_layout_constraint(x, row_major) if axis else x
    return jnp.moveaxis(x.reshape(-1, *shape[1:]), 0, axis)


_all_gather.defvjp(_all_gather_forward, _all_gather_backward)


@jax.custom_vjp
def sum_over_tensor(x: Array) -> Array:
    """Sum over `tensor`. The gradient is passed through, because it is already equal on all devices."""
    return lax.psum(x, "tensor")


sum_over_tensor.defvjp(lambda x: (lax.psum(x, "tensor"), None), lambda _, gradient: (gradient,))


@jax.custom_vjp
def copy_over_tensor(x: Array) -> Array:
    """Return `x`; its gradient is summed over `tensor`."""
    return x


copy_over_tensor.defvjp(lambda x: (x, None), lambda _, gradient: (lax.psum(gradient, "tensor"),))


def all_reduce_over_data(x: Array, slices: int) -> Array:
    """Sum over `data`: over the devices of a slice first, then each device sums its own part with the other slices.

    The compiler would do the same for one sum over `data`. But with `xla_tpu_decompose_every_reduce_scatters_hlos`,
    libtpu 0.0.50 then fails, and without that option, reduce-scatters do not overlap.
    """
    if slices == 1:
        return lax.psum(x, "data")
    inside = lax.axis_size("data") // slices
    within = np.arange(slices * inside).reshape(slices, inside)
    between = within.T.tolist()
    x = lax.psum(x, "data", axis_index_groups=within.tolist())
    axis = next((i for i, size in enumerate(x.shape) if size % inside == 0), None)
    if axis is None:
        return lax.psum(x, "data", axis_index_groups=between)
    size = x.shape[axis] // inside
    part = lax.dynamic_slice_in_dim(x, lax.axis_index("data") % inside * size, size, axis)
    part = lax.psum(part, "data", axis_index_groups=between)
    return lax.all_gather(part, "data", axis=axis, axis_index_groups=within.tolist(), tiled=True)
