"""Arrays that the processes of a pod send each other through the run's directory, because devices may be too small."""

import contextlib
import os
from pathlib import Path

import jax
import numpy as np

from tpaw_jax.runtime import processes
from tpaw_jax.storage import array_files, files


def all_gather(directory: Path | None, name: str, **arrays: np.ndarray) -> list[dict[str, np.ndarray]]:
    """The arrays of every process, by process, on every process. Shapes may differ.

    They go through files in `directory`, which all processes share; if it is None, through `processes.all_gather`.

    Raises:
        OSError: the directory cannot be written.
    """
    count, own = jax.process_count(), jax.process_index()
    if directory is not None and processes.is_main():  # what a killed run left; all have read the exchange before
        for left in directory.glob(f".exchange_{name}_*.npz*"):
            left.unlink(missing_ok=True)
    if count == 1 or directory is None:
        return processes.all_gather(**arrays)
    # a name that was never used: a mounted bucket may show the former content of a file for a while
    token = processes.all_gather(token=np.frombuffer(os.urandom(8), np.int64))[0]["token"][0]
    path_of = lambda process: directory / f".exchange_{name}_{token & 0xFFFFFFFF:08x}_{process:05d}.npz"
    processes.barrier(f"exchange of {name} begins")
    files.replace(path_of(own), array_files.npz(**arrays))
    processes.barrier(f"{name} written")
    gathered = [arrays if process == own else _read(path_of(process)) for process in range(count)]
    processes.barrier(f"{name} read")
    with contextlib.suppress(Exception):  # it is removed at the next exchange
        path_of(own).unlink()
    return gathered


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        return array_files.read(path)
    except files.CorruptedFile as error:
        raise OSError(
            f"{error} Another process has just written it. Check the file system that the hosts share, then run the "
            "same command again."
        ) from error
