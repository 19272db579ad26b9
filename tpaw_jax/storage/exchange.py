"""Arrays that the processes of a pod send each other through the run's directory, because devices may be too small."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from tpaw_jax.runtime import processes
from tpaw_jax.storage import array_files, files
from tpaw_jax.storage.array_files import Spool


def all_gather(directory: Path | None, name: str, **arrays: np.ndarray) -> list[dict[str, np.ndarray]]:
    """The arrays of every process, by process, on every process. Shapes may differ.

    They go through files in `directory`, which all processes share; if it is None, through `processes.all_gather`.

    Raises:
        OSError: the directory cannot be written.
    """
    return all_gather_joined(directory, name, {}, **arrays)[0]


def all_gather_joined(
    directory: Path | None, name: str, joined: Mapping[str, np.ndarray], **arrays: np.ndarray
) -> tuple[list[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """As `all_gather`; beside it, those of `joined` end to end, in the order of the processes.

    They are copied only once, to a temporary file if they are large.

    Raises:
        OSError: the directory cannot be written.
    """
    count, own = jax.process_count(), jax.process_index()
    if directory is not None and processes.is_main():  # what a killed run left; all have read the exchange before
        for left in directory.glob(f".exchange_{name}_*.npz*"):
            left.unlink(missing_ok=True)
    if count == 1:
        return [arrays], dict(joined)
    if directory is None:
        parts = processes.all_gather(**arrays, **joined)
        taken = {key: [part.pop(key) for part in parts] for key in joined}
        return parts, {key: array_files.join(of_all, joined[key].dtype) for key, of_all in taken.items()}
    # a name that was never used: a mounted bucket may show the former content of a file for a while
    token = processes.all_gather(token=np.frombuffer(os.urandom(8), np.int64))[0]["token"][0]
    path_of = lambda process: directory / f".exchange_{name}_{token & 0xFFFFFFFF:08x}_{process:05d}.npz"
    processes.barrier(f"exchange of {name} begins")
    array_files.replace(path_of(own), **arrays, **joined)
    processes.barrier(f"{name} written")
    spools = {key: Spool(of_own.dtype) for key, of_own in joined.items()}
    gathered = []
    for process in range(count):
        if process != own:
            gathered.append(_read(path_of(process), spools))
            continue
        gathered.append(arrays)
        for key, of_own in joined.items():
            spools[key].append(of_own)
    processes.barrier(f"{name} read")
    with contextlib.suppress(Exception):  # it is removed at the next exchange
        path_of(own).unlink()
    return gathered, {key: spool.array() for key, spool in spools.items()}


def _read(path: Path, spools: Mapping[str, Spool]) -> dict[str, np.ndarray]:
    try:
        return array_files.read(path, into=spools)
    except files.CorruptedFile as error:
        raise OSError(
            f"{error} Another process has just written it. Check the file system that the hosts share, then run the "
            "same command again."
        ) from error
