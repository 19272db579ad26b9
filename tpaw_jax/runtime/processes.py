"""The processes of a pod as one run: connecting, synchronizing, and checking that all of them match.

Every process runs the same code on the same data and holds its shards of every array. Only process 0 writes small
files, to a directory that all processes share. With one process, these functions do nothing.
"""

import hashlib
import io
import json
import platform
import socket
from collections import Counter
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # for a barrier that ends; see `heartbeat` too
from jax.experimental import multihost_utils

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
"""Packages whose versions must be the same on all processes."""

BARRIER_SECONDS = 3600
"""How long a process waits for the others. The longest wait is for the checkpoint of a slow disk."""

_reached: Counter[str] = Counter()


class NotConnected(ValueError):
    """The processes of a pod could not connect to each other."""


def join(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, timeout: float = 100.0
) -> None:
    """Connect to the other processes, found from the arguments or the pod's metadata. Call before any use of devices.

    JAX aborts all processes when it has not heard of one for `timeout` seconds.

    Raises:
        ValueError: only some of the arguments are given, or they cannot be used.
        NotConnected: the processes cannot connect.
    """
    given = [value is not None for value in (coordinator, processes, process)]
    if any(given) and not all(given):
        raise ValueError("--coordinator, --num-processes and --process-id go together: give all of them, or none.")
    try:
        jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=int(timeout))
    except RuntimeError as error:
        raise NotConnected(
            f"The processes of the pod could not connect to each other ({error}). Check the coordinator's address and "
            "port, and that every process has started."
        ) from error


def is_main() -> bool:
    """Whether this is process 0, which writes the small files and prints."""
    return jax.process_index() == 0


def barrier(where: str) -> None:
    """Wait until all processes reach this call; `where` must be the same on all.

    Raises:
        RuntimeError: a process did not reach it in `BARRIER_SECONDS`.
    """
    if jax.process_count() == 1:
        return
    _reached[where] += 1
    client: Any = distributed.global_state.client
    try:
        client.wait_at_barrier(f"tpaw: {where}, {_reached[where]}", 1000 * BARRIER_SECONDS)
    except RuntimeError as error:
        raise RuntimeError(
            f"The processes of the pod did not meet at the same place ('{where}', within {BARRIER_SECONDS} s): {error}"
        ) from error


def all_gather(**arrays: np.ndarray) -> list[dict[str, np.ndarray]]:
    """The arrays of every process, by process, on every process. Shapes may differ."""
    if jax.process_count() == 1:
        return [arrays]
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)  # type: ignore[arg-type] # numpy's stub takes names for options
    content = np.frombuffer(buffer.getvalue(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.array([content.size], np.int32))).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: content.size] = content
    gathered = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    decode = lambda part: dict(np.load(io.BytesIO(part.tobytes()), allow_pickle=False))
    return [decode(part[:size]) for part, size in zip(gathered, sizes, strict=True)]


def of_main(value: Any) -> Any:
    """Process 0's value, which JSON can hold, on every process."""
    return json.loads(all_gather(value=np.frombuffer(json.dumps(value).encode(), np.uint8))[0]["value"].tobytes())


def check_same(facts: Mapping[str, str]) -> None:
    """Check that all processes have the same facts.

    Raises:
        ValueError: one differs; names its host, the fact and both values.
    """
    own = json.dumps({"host": socket.gethostname(), "facts": dict(facts)})
    gathered = all_gather(facts=np.frombuffer(own.encode(), np.uint8))
    by_process = [json.loads(arrays["facts"].tobytes()) for arrays in gathered]
    first = by_process[0]
    for process, other in enumerate(by_process):
        for name, value in first["facts"].items():
            if other["facts"].get(name) != value:
                raise ValueError(
                    f"The processes of the pod differ: {name} is {other['facts'].get(name)} on process {process} "
                    f"({other['host']}) and {value} on process 0 ({first['host']}). It must be the same on all."
                )


def facts_of_this_host() -> dict[str, str]:
    """A hash of the package's code, the versions of Python and `PACKAGES`, and the kind and number of devices."""
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
        ValueError: a process does not see the file that process 0 wrote there.
    """
    if jax.process_count() == 1:
        return
    directory.mkdir(parents=True, exist_ok=True)
    marker = directory / ".seen_by_all"
    if is_main():
        marker.write_text(str(jax.process_count()))
    barrier("marker written")
    seen = all_gather(seen=np.array([marker.exists()]))
    barrier("marker read")
    if is_main():
        marker.unlink(missing_ok=True)
    blind = [str(process) for process, one in enumerate(seen) if not one["seen"][0]]
    if blind:
        raise ValueError(
            f"{directory}: process {', '.join(blind)} does not see what process 0 writes there. Choose a directory "
            "that all hosts share: a bucket (gs://) or a network file system."
        )
