"""Products of many small matrices with few vectors each on CPUs, as attention over pages has them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

AT_ONCE = 8
"""Vectors whose sums fit in the registers of a core."""

ANY_ORDER = {
    "xla_cpu_enable_fast_math": True,
    **{f"xla_cpu_fast_math_honor_{kept}": True for kept in ("nans", "infs", "division", "functions")},
}
"""Compiler options for programs with `dots`: sums in any order, which is what lets XLA vectorise them."""


def dots(matrix: Float[Array, "*batch F D"], vectors: Float[Array, "*batch N D"]) -> Float[Array, "*batch N F"]:
    """Inner products of each vector with the rows of a matrix, in float32; `AT_ONCE` vectors read the matrix once.

    One reduction sums the products of all of them; XLA's own dot takes longer with a batch of small matrices. A vector
    must come from an operation that XLA does not fuse, such as one that changes its layout: it would be computed again
    for every row.
    """
    found = []
    for first in range(0, vectors.shape[-2], AT_ONCE):
        some = jnp.unstack(vectors[..., first : first + AT_ONCE, :].astype(jnp.float32), axis=-2)
        products = [matrix.astype(jnp.float32) * vector[..., None, :] for vector in some]
        zeros = [jnp.zeros((), jnp.float32)] * len(products)
        add = lambda sums, more: [a + b for a, b in zip(sums, more, strict=True)]
        found += jax.lax.reduce(products, zeros, add, (matrix.ndim - 1,))
    return jnp.stack(found, axis=-2)
