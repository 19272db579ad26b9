"""Frozen projections in 8 bits: `kernel` is int8, and `kernel_scale` has a factor for each output.

Only `adapters.Linear` reads them. Rounding a kernel [D, F] this way moves each weight by at most half of
max |column| / 127 (absmax quantization, as in LLM.int8(), arXiv 2208.07339, without its outliers).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Float, Int8, PyTree

from tpaw_jax.models.adapters import PROJECTIONS
from tpaw_jax.runtime import sharding

Sharder = Callable[[str, tuple[int, ...]], Any]
"""(flax path, shape) -> sharding of the parameter."""


def quantize(kernel: Float[Array, "*L D F"]) -> tuple[Int8[Array, "*L D F"], Float[Array, "*L F"]]:
    """Round a kernel to int8, and return the factors of its columns, float32."""
    kernel = kernel.astype(jnp.float32)
    scale = jnp.max(jnp.abs(kernel), axis=-2) / 127
    scale = jnp.where(scale > 0, scale, 1)
    return jnp.round(kernel / scale[..., None, :]).astype(jnp.int8), scale


def quantizer(sharder: Sharder) -> Callable[[str, Array], dict[str, Array]]:
    """A function that replaces a parameter, given its flax path, if it is the kernel of a projection.

    The memory of the kernel is freed. `sharder` places the results.
    """

    def convert(name: str, kernel: Array) -> dict[str, Array]:
        if not _is_projection(name):
            return {name: kernel}
        placed = sharder(name, kernel.shape), sharder(f"{name}_scale", (*kernel.shape[:-2], kernel.shape[-1]))
        rounded, scale = jax.block_until_ready(jax.jit(quantize, out_shardings=placed)(kernel))
        kernel.delete()
        return {name: rounded, f"{name}_scale": scale}

    return convert


def quantize_projections(params: Mapping[str, Any], sharder: Sharder) -> PyTree[Array]:
    """The parameters with the kernels of all projections of attention and dense feed-forward in 8 bits.

    Kernels are replaced one at a time, and the memory of each is freed.
    """
    return _replaced(params, quantizer(sharder))


def abstract(params: Mapping[str, Any], sharder: Sharder) -> PyTree[jax.ShapeDtypeStruct]:
    """The shapes, dtypes and shardings of the result of `quantize_projections`, from those of its argument."""

    def convert(name: str, kernel: Any) -> dict[str, Any]:
        if not _is_projection(name):
            return {name: kernel}
        return dict(zip((name, f"{name}_scale"), quantize(kernel), strict=True))

    shapes = jax.eval_shape(lambda params: _replaced(params, convert), params)
    placed = lambda path, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharder(sharding.path_name(path), x.shape))
    return jax.tree_util.tree_map_with_path(placed, shapes)


def _is_projection(name: str) -> bool:
    module, leaf = name.split("/")[-2:]
    return leaf == "kernel" and module in PROJECTIONS.values()


def _replaced(params: Mapping[str, Any], convert: Callable[[str, Any], dict[str, Any]]) -> Any:
    replaced: dict[str, Any] = {}
    for name, value in traverse_util.flatten_dict(params, sep="/").items():
        replaced |= convert(name, value)
    return traverse_util.unflatten_dict(replaced, sep="/")
