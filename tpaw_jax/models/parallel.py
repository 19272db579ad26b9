"""How a model split over a mesh computes: its parameters come together layer by layer, its rows stay where they are.

All of this runs inside `shard_map`, on what one device holds. Over `fsdp`, parameters are split and gathered in the
compute dtype where they are used, forward and again backward; their gradients are summed and scattered back (ZeRO-3,
arXiv 1910.02054). Over `tensor`, heads, feed-forward and vocabulary stay split, and what they add up to is summed
(Megatron, arXiv 1909.08053). The table of what is split how is `sharding.PARAM_AXES`.

Nothing moves between devices that is not stated here or in the step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PyTree

from tpaw_jax.runtime import sharding

LANES = 128
"""Values of a TPU's tile along an array's last axis."""


class Parallel(NamedTuple):
    """Where the parameters of a model are split, and the dtype in which gradients travel."""

    specs: Mapping[str, P] = {}  # by flax path; none is split by default
    tensor: int = 1  # parts that heads, feed-forward and vocabulary are split into
    reduce_dtype: str = "float32"
    scatter_stages: tuple[int, ...] = ()  # sizes whose product is `fsdp`, see `sharding.scatter_stages`; (): at once

    def layer(self, params: PyTree[Array], dtype: jnp.dtype) -> PyTree[Array]:
        """One layer's parameters with all of their `fsdp` shards, matrices in the compute dtype."""

        def whole(path, x):
            name = "layers/" + sharding.path_name(path)
            spec = P(*self.specs.get(name, P())[1:])  # without the axis of layers
            if name.split("/")[1] in ("q_norm", "k_norm") and self.tensor > 1:
                x = copy_over_tensor(x)  # a scale that all heads share, each device having some of them
            return self._whole(x, spec, dtype if x.ndim > 1 else x.dtype)

        return jax.tree_util.tree_map_with_path(whole, params)

    def embed(
        self,
        table: Any,  # [v, d]: an array, or what `take` reads
        name: str,
        tokens: Int[Array, "M"],
        dtype: jnp.dtype,
        take: Callable[[Any, Array], Array] = lambda table, tokens: table[tokens],
    ) -> Float[Array, "M D"]:
        """Rows of the embedding table: devices look up all tokens in the columns they hold and exchange what they find.

        That moves M D values, where gathering the table would move V D. Gradients of a row are summed in the table's
        dtype.
        """
        spec = self.specs.get(name, P())
        by_column, by_token = "fsdp" in _axes(spec, 1), "tensor" in _axes(spec, 0)
        if by_column:
            tokens = lax.all_gather(tokens, "fsdp", tiled=True)
        if by_token:
            tokens = tokens - lax.axis_index("tensor") * table.shape[0]
            held = (tokens >= 0) & (tokens < table.shape[0])
            found = take(table, jnp.where(held, tokens, 0)).astype(dtype)
            found = sum_over_tensor(jnp.where(held[:, None], found, 0))
        else:
            found = take(table, tokens).astype(dtype)
        return lax.all_to_all(found, "fsdp", split_axis=0, concat_axis=1, tiled=True) if by_column else found

    def table(self, table: Float[Array, "v d"], name: str, dtype: jnp.dtype) -> Float[Array, "v D"]:
        """The output embedding with all of its columns and the device's part of the vocabulary."""
        return self._whole(table, self.specs.get(name, P()), dtype)

    def held(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a device's part of a parameter."""
        parts = [math.prod(lax.axis_size(a) for a in _axes(self.specs.get(name, P()), i)) for i in range(len(shape))]
        return tuple(size // n for size, n in zip(shape, parts, strict=True))

    def whole_vocabulary(self, logits: Float[Array, "*batch v"], name: str) -> Float[Array, "*batch V"]:
        """Logits of the whole vocabulary from those of each device's part of it. Has no gradient."""
        if not self.splits_vocabulary(name):
            return logits
        return lax.all_gather(logits, "tensor", axis=logits.ndim - 1, tiled=True)

    def splits_vocabulary(self, name: str) -> bool:
        """Whether each device holds the logits of a part of the vocabulary only."""
        return self.tensor > 1 and "tensor" in _axes(self.specs.get(name, P()), 0)

    def share(self, x: Array) -> Array:
        """`x`, the same on the devices of a tensor group, as the input of what they hold parts of."""
        return copy_over_tensor(x) if self.tensor > 1 else x

    def total(self, x: Array) -> Array:
        """The sum of the parts that the devices of a tensor group have computed."""
        return sum_over_tensor(x) if self.tensor > 1 else x

    def _whole(self, x: Array, spec: P, dtype: jnp.dtype) -> Array:
        axis = next((i for i in range(x.ndim) if "fsdp" in _axes(spec, i)), None)
        if axis is None:
            return x.astype(dtype)
        return _gather(x, axis, jnp.dtype(dtype), self.reduce_dtype, self.scatter_stages)


WHOLE = Parallel()
"""A model of which each device holds all."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _gather(x: Array, axis: int, dtype: jnp.dtype, reduce_dtype: str, stages: tuple[int, ...]) -> Array:
    """All shards of `x` along `axis`, in `dtype`; gradients are summed in `reduce_dtype` and scattered back."""
    return lax.all_gather(x.astype(dtype), "fsdp", axis=axis, tiled=True)


def _gather_forward(x, axis, dtype, reduce_dtype, stages):
    return _gather(x, axis, dtype, reduce_dtype, stages), jnp.zeros((), x.dtype)


def _gather_backward(axis, dtype, reduce_dtype, stages, like, gradient):
    return (_sum_scattered(gradient.astype(reduce_dtype), axis, stages).astype(like.dtype),)


def _sum_scattered(x: Array, axis: int, stages: tuple[int, ...]) -> Array:
    """The device's part along `axis` of the sum over `fsdp`: over one dimension of `stages` after the other.

    The outermost comes first, so that after it a device has the parts of all those that differ from it in the others.
    Parts of the last axis that are no whole tiles are put below each other first, since the TPU's compiler would sum
    everything instead, twice the bytes.
    """
    if len(stages) <= 1:
        return lax.psum_scatter(x, "fsdp", scatter_dimension=axis, tiled=True)
    count = math.prod(stages)
    devices = np.arange(count).reshape(stages)
    by_part = axis == x.ndim - 1 and x.shape[axis] // count % LANES
    if by_part:
        x = jnp.moveaxis(x.reshape(*x.shape[:-1], count, -1), -2, 0)
        shape, x = x.shape[1:], x.reshape(-1, x.shape[-1])
    for i, size in enumerate(stages):
        groups = np.moveaxis(devices, i, -1).reshape(-1, size).tolist()
        along = 0 if by_part else axis
        x = lax.psum_scatter(x, "fsdp", scatter_dimension=along, tiled=True, axis_index_groups=groups)
    return x.reshape(shape) if by_part else x


_gather.defvjp(_gather_forward, _gather_backward)


@jax.custom_vjp
def sum_over_tensor(x: Array) -> Array:
    """The sum over `tensor`; every device has the whole gradient of it already."""
    return lax.psum(x, "tensor")


sum_over_tensor.defvjp(lambda x: (lax.psum(x, "tensor"), None), lambda _, gradient: (gradient,))


@jax.custom_vjp
def copy_over_tensor(x: Array) -> Array:
    """`x`, whose gradient is the sum of those on the devices of a tensor group."""
    return x


copy_over_tensor.defvjp(lambda x: (x, None), lambda _, gradient: (lax.psum(gradient, "tensor"),))


def _axes(spec: P, dimension: int) -> tuple[Any, ...]:
    """The mesh axes that a dimension is split over."""
    axes = spec[dimension] if dimension < len(spec) else None
    return axes if isinstance(axes, tuple) else (axes,) if axes else ()
