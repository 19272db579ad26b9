"""Several processes as one run: how they meet, who writes, and what all of them must have in common.

Every process runs the same code on the same data and holds its part of every array. Small files are written by process
0 alone, into a directory that all of them see. In one process all of this is nothing.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import socket
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
"""Packages whose versions the processes of a run must share."""


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Become one of the processes of a pod, as its metadata tell or as stated; before anything else asks for devices.

    Raises:
        ValueError: some of the three are given and others not, or the processes cannot find each other.
    """
    given = [value is not None for value in (coordinator, processes, process)]
    if any(given) and not all(given):
        raise ValueError("--coordinator, --num-processes and --process-id go together: give all of them, or none.")
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"The processes of the pod cannot find each other ({error}).") from error


def is_main() -> bool:
    """Whether this process writes the run's small files and speaks for all."""
    return jax.process_index() == 0


def barrier(where: str) -> None:
    """Wait until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def all_gather(**arrays: np.ndarray) -> list[dict[str, np.ndarray]]:
    """What each process has given, in their order, on every process. Shapes may differ."""
    if jax.process_count() == 1:
        return [arrays]
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)  # type: ignore[arg-type] # numpy's stub takes names for options
    content = np.frombuffer(buffer.getvalue(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.array([content.size], np.int32))).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: content.size] = content
    of_all = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    read = lambda part: dict(np.load(io.BytesIO(part.tobytes()), allow_pickle=False))
    return [read(part[:size]) for part, size in zip(of_all, sizes, strict=True)]


def check_same(facts: Mapping[str, str]) -> None:
    """Check that all processes state the same facts.

    Raises:
        ValueError: one does not; names its host, the fact and both values.
    """
    own = json.dumps({"host": socket.gethostname(), "facts": dict(facts)})
    gathered = all_gather(stated=np.frombuffer(own.encode(), np.uint8))
    stated = [json.loads(one["stated"].tobytes()) for one in gathered]
    first = stated[0]
    for process, other in enumerate(stated):
        for name, value in first["facts"].items():
            if other["facts"].get(name) != value:
                raise ValueError(
                    f"The processes of the pod differ: {name} is {other['facts'].get(name)} on process {process} "
                    f"({other['host']}) and {value} on process 0 ({first['host']}). Start all of them alike."
                )


def facts_of_this_host() -> dict[str, str]:
    """Versions of the code and of what it stands on, and the kind of devices."""
    code = hashlib.sha256()
    package = Path(__file__).parent.parent
    for path in sorted(package.rglob("*.py")):
        code.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return {
        "the code of tpaw_jax": code.hexdigest()[:16],
        "Python": platform.python_version(),
        **{f"the version of {name}": metadata.version(name) for name in PACKAGES},
        "the kind of devices": jax.local_devices()[0].device_kind,
        "the number of devices": str(jax.local_device_count()),
    }


def check_shared_directory(directory: Path) -> None:
    """Check that all processes see the same run directory.

    Raises:
        ValueError: a process does not see what process 0 has written there.
    """
    if jax.process_count() == 1:
        return
    directory.mkdir(parents=True, exist_ok=True)
    mark = directory / ".seen_by_all"
    if is_main():
        mark.write_text(str(jax.process_count()))
    barrier("mark written")
    seen = all_gather(seen=np.array([mark.exists()]))
    barrier("mark read")
    if is_main():
        mark.unlink()
    blind = [str(process) for process, one in enumerate(seen) if not one["seen"][0]]
    if blind:
        raise ValueError(
            f"{directory}: process {', '.join(blind)} does not see what process 0 writes there. The run's directory "
            "must be one that all hosts share: a mounted bucket or a network file system."
        )
