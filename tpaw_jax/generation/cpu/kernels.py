"""C++ kernels for sampling on CPUs: products with packed matrices, and attention over pages.

On SmolLM2's matrices, XLA's own products with 8 rows of x read memory at half the speed of a sum over it, and those
with 512 rows of bfloat16 reach half the speed of the CPU's bfloat16 instructions. The kernels are compiled for this
machine when they are first needed; without AVX-512 or a C++ compiler they are not `available`.
"""

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
"""Rows of a matrix that are multiplied at once, and rows of x that are grouped in a panel."""

DTYPES = {jnp.dtype("float32"), jnp.dtype("bfloat16")}
"""The dtypes that matrices and pages may have."""

SOURCE = Path(__file__).with_suffix(".cc")
OPTIONS = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fPIC", "-shared", "-w"]


class PackedMatrix(struct.PyTreeNode):
    """A matrix [F, D], or one per layer, in lines of 64 bytes that span `LANES` rows; padded with zeros."""

    lines: Float[Array, "*L F/16 D 16"] | Float[Array, "*L F/16 D/2 16 2"]  # float32 | bfloat16
    shape: tuple[int, int] = struct.field(pytree_node=False)


def pack(transposed: Float[Array, "*L D F"]) -> PackedMatrix:
    """Pack a float32 or bfloat16 matrix, or one per layer, given its transpose."""
    if transposed.ndim == 3:
        return jax.vmap(pack)(transposed)
    depth, rows = transposed.shape
    per_line = 4 // transposed.dtype.itemsize
    padded = jnp.pad(transposed, [(0, -depth % per_line), (0, -rows % LANES)])
    lines = padded.reshape(-1, per_line, padded.shape[1] // LANES, LANES).transpose(2, 0, 3, 1)
    return PackedMatrix(lines if per_line > 1 else lines[..., 0], (rows, depth))


def dot(
    x: Float[Array, "M D"],
    matrix: PackedMatrix,
    scale: Float[Array, "*L D"] | None = None,
    epsilon: float = 0.0,
    layer: Int[Array, ""] | int | None = None,
) -> Float[Array, "M F"]:
    """x w^T in float32, with operands rounded to the matrix's dtype; with `scale`, of `rms_norm(x, scale, epsilon)`.

    The rounding of each sum depends only on its row of x and row of w, not on the batch. `matrix` and `scale` may hold
    all layers, of which `layer` selects one; this avoids the copy that slicing a stack would make.
    """
    lines, layer = (matrix.lines[None], 0) if layer is None else (matrix.lines, layer)
    scales = jnp.zeros(0, jnp.float32) if scale is None else scale.astype(jnp.float32)
    product = jax.ShapeDtypeStruct((len(x), matrix.shape[0]), jnp.float32)
    scratch = jax.ShapeDtypeStruct((-(-len(x) // LANES), lines.shape[2], LANES), jnp.uint32)
    call = jax.ffi.ffi_call("tpaw_packed_dot", (product, scratch))
    return call(lines, jnp.asarray(layer, jnp.int32), x.astype(jnp.float32), scales, epsilon=np.float32(epsilon))[0]


def take(matrix: PackedMatrix, rows: Int[Array, "M"]) -> Float[Array, "M D"]:
    """matrix[rows], unpacked."""
    lines, dtype = matrix.lines, matrix.lines.dtype
    if dtype.itemsize == 2:  # XLA's CPU backend converts an entire table of 16-bit floats to read one row
        lines = jax.lax.bitcast_convert_type(lines, jnp.uint16)
    taken = lines[rows // LANES, :, rows % LANES].reshape(rows.shape[0], -1)[:, : matrix.shape[1]]
    return taken if taken.dtype == dtype else jax.lax.bitcast_convert_type(taken, dtype)


def attend_pages(
    heads: Float[Array, "R S N+2K H"],
    angles: tuple[Float[Array, "R S H/2"], Float[Array, "R S H/2"]],
    pool_keys: Float[Array, "R U P E"],
    pool_values: Float[Array, "R U P E"],
    of_slot: Int[AnyArray, "R S J"],
    positions: Int[AnyArray, "R S"],
    *,
    window: int | None = None,
) -> tuple[Float[Array, "R S N H"], Float[Array, "R U P E"], Float[Array, "R U P E"]]:
    """Attention output and the pools with the new tokens: `rotate`, `cache.attend_pages` and `cache.write_token`.

    `heads` are the queries, then the keys, then the values of the new tokens; `angles` are cosines and sines. Queries
    and softmax weights stay float32 for any dtype of the pools. Cosines and sines are inputs, since XLA would compute
    them again for every head of every layer.
    """
    *rs, count, size = heads.shape
    output = jax.ShapeDtypeStruct((*rs, count - 2 * pool_keys.shape[3] // size, size), jnp.float32)
    results = output, jax.typeof(pool_keys), jax.typeof(pool_values)
    call = jax.ffi.ffi_call("tpaw_attend_pages", results, input_output_aliases={3: 1, 4: 2})
    table = jnp.asarray(of_slot), jnp.asarray(positions)
    seen = np.int64(2**62 if window is None else window)
    attended, pool_keys, pool_values = call(heads, *angles, pool_keys, pool_values, *table, window=seen)
    return attended, pool_keys, pool_values


@functools.cache
def available() -> bool:
    """Whether the kernels can be used: needs AVX-512 and a C++ compiler. The first call compiles and registers them.

    Warns if the compiler fails or the library cannot be stored.
    """
    compiler = _compiler()
    if compiler is None:
        return False
    try:
        if "__AVX512F__" not in _macros(compiler):
            return False
        library = ctypes.CDLL(str(_library(compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        problem = (
            f"{SOURCE.name} could not be compiled or stored in {_folder()} (set XDG_CACHE_HOME to change the folder)"
        )
        reason = getattr(error, "stderr", None) or str(error)
        warnings.warn(f"{problem}; sampling falls back to XLA, which is slower. {reason}", stacklevel=2)
        return False
    for name, handler in (("tpaw_packed_dot", library.TpawPackedDot), ("tpaw_attend_pages", library.TpawAttendPages)):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
    return True


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, [os.environ.get("CXX", "c++"), "g++", "clang++"])), None)


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "tpaw_jax"


def _macros(compiler: str) -> str:
    """The compiler's predefined macros: among others, its version and this machine's instruction set."""
    return _run([compiler, *OPTIONS, "-dM", "-E", "-x", "c++", os.devnull])


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _library(compiler: str) -> Path:
    """The compiled library for this machine; compiled if the cache folder does not have it."""
    inputs = "\n".join([SOURCE.read_text(), *OPTIONS, _macros(compiler), jaxlib.__version__])
    folder = _folder()
    path = folder / f"cpu_kernels_{hashlib.sha256(inputs.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            compiled = Path(scratch) / path.name
            _run([compiler, *OPTIONS, f"-I{jax.ffi.include_dir()}", str(SOURCE), "-o", str(compiled)])
            compiled.replace(path)
    return path
