"""The gradients of a train step: summed over its micro-batches, then over the devices that hold the rows."""

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

from tpaw_jax.models import parallel
from tpaw_jax.runtime import sharding


def accumulate(
    gradient_of: Callable[[Any], tuple[Any, PyTree[Array]]], micro_batches: Any, max_micro_batches: int
) -> tuple[Any, PyTree[Array]]:
    """Sum ((loss, sums), gradients) = gradient_of(i) over the first `micro_batches`; gradients are float32.

    Of `sums["max"]`, take the maximum.
    """
    if max_micro_batches == 1:  # without a loop, there is no accumulator, and XLA cannot duplicate the body
        outputs, gradients = gradient_of(0)
        return outputs, jax.tree.map(lambda g: g.astype(jnp.float32), gradients)

    def add(i, carry):
        (loss, sums), gradients = carry
        (new_loss, new_sums), new_gradients = gradient_of(i)
        largest = jnp.maximum(sums["max"], new_sums["max"])
        sums = {**jax.tree.map(jnp.add, sums, new_sums), "max": largest}
        add_float32 = lambda a, b: a + b.astype(jnp.float32)
        return (loss + new_loss, sums), jax.tree.map(add_float32, gradients, new_gradients)

    (_, sums), gradients = jax.eval_shape(lambda: gradient_of(0))
    zero_sums = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), sums)
    zero_gradients = jax.tree.map(lambda g: jnp.zeros(g.shape, jnp.float32), gradients)
    return lax.fori_loop(0, micro_batches, add, ((jnp.zeros(()), zero_sums), zero_gradients))


def sum_over_devices(
    gradients: PyTree[Array], specs: PyTree[P], dtype: str, summed_over_data: Collection[str], slices: int
) -> PyTree[Array]:
    """Sum gradients in `dtype` over the devices that hold the rows of a batch, inside `shard_map`; return float32.

    Args:
        gradients: those of the device's rows. Over the axes that shard a parameter, and over `data` for the names in
            `summed_over_data`, the backward pass has summed them already.
        specs: how each parameter is sharded.
        dtype: of the sums.
        summed_over_data: names of parameters, as in `sharding.PARAM_AXES`.
        slices: the number of slices that `data` spans.
    """

    def summed(path, gradient, spec):
        sharded_over = {axis for dimension in range(len(spec)) for axis in sharding.axes_of(spec, dimension)}
        rows_over = set(sharding.MESH_AXES_OF["embed"]) - sharded_over
        gradient = lax.psum(gradient.astype(dtype), sorted(rows_over)) if rows_over else gradient.astype(dtype)
        if sharding.path_name(path) not in summed_over_data:
            gradient = parallel.all_reduce_over_data(gradient, slices)
        return gradient.astype(jnp.float32)

    return jax.tree_util.tree_map_with_path(summed, gradients, specs)
