"""Kernels for sampling on CPUs: products of packed matrices, and attention over pages.

XLA's own products read SmolLM2's matrices, for 8 rows of x, at half the speed of a sum over them, and multiply
bfloat16, for 512, at half the speed of the machine's instructions for it. The kernels are in C++, compiled for the
machine when they are first needed; without AVX-512 or a C++ compiler they are not `available`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from tpaw_jax.types import AnyArray

LANES = 16
"""Rows of a matrix that are multiplied at once, and rows of a panel of x."""

DTYPES = {jnp.dtype("float32"), jnp.dtype("bfloat16")}
"""What matrices and pages may be of."""

SOURCE = Path(__file__).with_suffix(".cc")
OPTIONS = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fPIC", "-shared", "-w"]


class PackedMatrix(struct.PyTreeNode):
    """A matrix [F, D] in lines of 64 bytes, each of `LANES` rows; zeros fill the last of them. Or one such a layer."""

    lines: Float[Array, "*L F/16 D 16"] | Float[Array, "*L F/16 D/2 16 2"]  # of float32; of bfloat16
    shape: tuple[int, int] = struct.field(pytree_node=False)


def pack(transposed: Float[Array, "*L D F"]) -> PackedMatrix:
    """The matrix whose transpose is given, of float32 or bfloat16; or each layer's."""
    if transposed.ndim == 3:
        return jax.vmap(pack)(transposed)
    depth, rows = transposed.shape
    of_line = 4 // transposed.dtype.itemsize
    padded = jnp.pad(transposed, [(0, -depth % of_line), (0, -rows % LANES)])
    lines = padded.reshape(-1, of_line, padded.shape[1] // LANES, LANES).transpose(2, 0, 3, 1)
    return PackedMatrix(lines if of_line > 1 else lines[..., 0], (rows, depth))


def dot(
    x: Float[Array, "M D"],
    matrix: PackedMatrix,
    scale: Float[Array, "*L D"] | None = None,
    epsilon: float = 0.0,
    layer: Int[Array, ""] | int | None = None,
) -> Float[Array, "M F"]:
    """x w^T in float32, of operands in the matrix's dtype; with `scale`, of `rms_norm(x, scale, epsilon)`.

    The rows of x and of w alone decide how a sum is rounded. `matrix` and `scale` may be those of all layers, `layer`
    the one that is meant: nothing is moved, where slices of a stack are copied.
    """
    lines, layer = (matrix.lines[None], 0) if layer is None else (matrix.lines, layer)
    scales = jnp.zeros(0, jnp.float32) if scale is None else scale.astype(jnp.float32)
    made = jax.ShapeDtypeStruct((len(x), matrix.shape[0]), jnp.float32)
    scratch = jax.ShapeDtypeStruct((-(-len(x) // LANES), lines.shape[2], LANES), jnp.uint32)
    product = jax.ffi.ffi_call("tpaw_packed_dot", (made, scratch))
    of_layer = jnp.asarray(layer, jnp.int32)
    return product(lines, of_layer, x.astype(jnp.float32), scales, epsilon=np.float32(epsilon))[0]


def take(matrix: PackedMatrix, rows: Int[Array, "M"]) -> Float[Array, "M D"]:
    """Some rows of the matrix."""
    lines, dtype = matrix.lines, matrix.lines.dtype
    if dtype.itemsize == 2:  # XLA's CPU backend widens all of a table of 16-bit floats to read a row, but not integers
        lines = jax.lax.bitcast_convert_type(lines, jnp.uint16)
    found = lines[rows // LANES, :, rows % LANES].reshape(rows.shape[0], -1)[:, : matrix.shape[1]]
    return found if found.dtype == dtype else jax.lax.bitcast_convert_type(found, dtype)


def attend_pages(
    heads: Float[Array, "R S N+2K H"],
    angles: tuple[Float[Array, "R S H/2"], Float[Array, "R S H/2"]],
    pool_keys: Float[Array, "R U P E"],
    pool_values: Float[Array, "R U P E"],
    of_slot: Int[AnyArray, "R S J"],
    positions: Int[AnyArray, "R S"],
) -> tuple[Float[Array, "R S N H"], Float[Array, "R U P E"], Float[Array, "R U P E"]]:
    """What the queries find, and the pools with the new tokens: `rotate`, `cache.attend_pages` and `cache.write_token`.

    `heads` are the queries, then the keys, then the values of the new tokens. Queries and softmax weights stay float32
    whatever the pools are of. XLA would compute the cosines of `angles` again for every head of every layer.
    """
    *rs, count, size = heads.shape
    of_queries = jax.ShapeDtypeStruct((*rs, count - 2 * pool_keys.shape[3] // size, size), jnp.float32)
    made = of_queries, jax.typeof(pool_keys), jax.typeof(pool_values)
    attend = jax.ffi.ffi_call("tpaw_attend_pages", made, input_output_aliases={3: 1, 4: 2})
    table = jnp.asarray(of_slot), jnp.asarray(positions)
    found, pool_keys, pool_values = attend(heads, *angles, pool_keys, pool_values, *table)
    return found, pool_keys, pool_values


@functools.cache
def available() -> bool:
    """Whether the machine has AVX-512 and a C++ compiler, and it compiles the kernels; they are registered then.

    Warns if it does not compile them.
    """
    compiler = _compiler()
    if compiler is None:
        return False
    try:
        if "__AVX512F__" not in _machine(compiler):
            return False
        library = ctypes.CDLL(str(_library(compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        problem = f"{SOURCE.name} cannot be compiled or kept in {_folder()} (XDG_CACHE_HOME says where)"
        warnings.warn(f"{problem}; sampling goes on without it, slower. {said}", stacklevel=2)
        return False
    for name, handler in (("tpaw_packed_dot", library.TpawPackedDot), ("tpaw_attend_pages", library.TpawAttendPages)):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
    return True


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, [os.environ.get("CXX", "c++"), "g++", "clang++"])), None)


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "tpaw_jax"


def _machine(compiler: str) -> str:
    """What it defines: its own version and the instruction set of the machine."""
    return _run([compiler, *OPTIONS, "-dM", "-E", "-x", "c++", os.devnull])


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _library(compiler: str) -> Path:
    """The compiled library for this machine, made unless it is there."""
    made_of = "\n".join([SOURCE.read_text(), *OPTIONS, _machine(compiler), jaxlib.__version__])
    folder = _folder()
    path = folder / f"cpu_kernels_{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / path.name
            _run([compiler, *OPTIONS, f"-I{jax.ffi.include_dir()}", str(SOURCE), "-o", str(made)])
            made.replace(path)
    return path
