"""What a compiled program needs of a device's memory, and the rematerialisation that makes it fit."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from tpaw_jax.models.transformer import REMAT_POLICIES

Compiled = Any
"""jax.stages.Compiled"""

SHARE_TO_USE = 0.9
"""Of the memory a device has: the rest is for the runtime and what no program's analysis counts."""


class Fit(NamedTuple):
    """A program and the rematerialisation policy it was compiled with; bytes a device."""

    remat: str
    compiled: Compiled
    needed: int


def needed_bytes(compiled: Compiled) -> int:
    """The peak of a program on each device, its arguments included, bytes."""
    analysis = compiled.memory_analysis()
    if jax.default_backend() != "cpu":
        return int(analysis.peak_memory_in_bytes)
    # On the CPU the analysis counts no temporaries in its peak; arguments that are donated hold the outputs too.
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return int(analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + outputs)


def available_bytes() -> int:
    """Memory that a program may use on each local device, bytes."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics:
        return int(SHARE_TO_USE * statistics["bytes_limit"])
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, used = (Path("/sys/fs/cgroup") / f"memory.{name}" for name in ("max", "current"))
    if limit.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return int(SHARE_TO_USE * free / jax.local_device_count())


def choose_remat(compile_with: Callable[[str], Compiled], limit: int) -> Fit:
    """The first policy, from the least to recompute on, whose program fits `limit` bytes.

    Raises:
        ValueError: none fits; says how much the last one needs and how much there is.
    """
    needed = None
    for remat in REMAT_POLICIES:
        if remat == "offload" and jax.default_backend() == "cpu":  # there the host's memory is the device's
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
    much = "more than the compiler can place" if needed is None else f"{needed / 2**30:.2f} GiB"
    raise ValueError(
        f"policy.remat: the training step does not fit with any policy; it needs {much} with 'layer' "
        f"of the {limit / 2**30:.2f} GiB that a device has. Lower packing.rows_per_batch or packing.row_length, use "
        "policy.param_dtype: bfloat16, or more devices."
    )
