"""Memory of compiled programs, and the choice of a rematerialization policy that fits."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from tpaw_jax.models.transformer import REMAT_POLICIES

Compiled = Any
"""jax.stages.Compiled"""

SHARE_TO_USE = 0.9
"""Fraction of a device's memory for programs; the rest is for the runtime and what XLA's analysis does not count."""


class Fit(NamedTuple):
    """A compiled program that fits."""

    remat: str  # its rematerialization policy
    compiled: Compiled
    needed: int  # bytes per device


def needed_bytes(compiled: Compiled) -> int:
    """Return a program's peak memory per device, including its arguments, in bytes."""
    analysis = compiled.memory_analysis()
    if jax.default_backend() != "cpu":
        return int(analysis.peak_memory_in_bytes)
    # On CPU, the reported peak leaves out temporaries. Donated arguments share their memory with outputs.
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return int(analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + outputs)


def available_bytes() -> int:
    """Return the memory that a program may use on each local device, in bytes."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics:
        return int(SHARE_TO_USE * statistics["bytes_limit"])
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, used = (Path("/sys/fs/cgroup") / f"memory.{name}" for name in ("max", "current"))
    if limit.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return int(SHARE_TO_USE * free / jax.local_device_count())


def choose_remat(compile_with: Callable[[str], Compiled], limit: int) -> Fit:
    """Compile with one policy of `REMAT_POLICIES` after the other, and return the first program that fits.

    The first policies recompute least.

    Args:
        compile_with: policy -> compiled program.
        limit: available memory per device, bytes.

    Raises:
        ValueError: no policy fits. Names the needed and the available memory.
    """
    needed = None
    for remat in REMAT_POLICIES:
        if remat == "offload" and jax.default_backend() == "cpu":  # host memory is device memory there
            continue
        try:
            compiled = compile_with(remat)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            needed = None
            continue
        needed = needed_bytes(compiled)
        if needed <= limit:
            return Fit(remat, compiled, needed)
    amount = "more memory than the compiler can allocate" if needed is None else f"{needed / 2**30:.2f} GiB"
    raise ValueError(
        f"policy.remat: the training step does not fit with any policy. With 'layer' it needs {amount} per device, and "
        f"{limit / 2**30:.2f} GiB are available. Lower packing.rows_per_batch or packing.row_length, use "
        "policy.param_dtype: bfloat16, or use more devices."
    )
