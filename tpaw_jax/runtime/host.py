"""Work of the host beside the device: memory in huge pages, and prefetching in a thread."""

import importlib.util
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import entry_points
from pathlib import Path
from typing import Generic, TypeVar

HUGE_PAGES = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000"
"""GLIBC_TUNABLES that keep buffers in huge pages and do not return them to the system between steps."""

NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}
"""Environment variables that keep libtpu, on a machine without a TPU, from searching for one and from logging."""

TPU_LOGS = {"TPU_STDERR_LOG_LEVEL": "3", "GRPC_VERBOSITY": "ERROR"}
"""Environment variables that keep libtpu's log out of the terminal. Not tried on a TPU yet."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def restart_with_huge_pages() -> None:
    """Restart this process with `HUGE_PAGES`, if JAX computes on the CPU; glibc reads it only at the start.

    By default malloc maps the buffers of every step anew, and page faults take a third of the step. If GLIBC_TUNABLES
    is already set, even to nothing, the process is not restarted.
    """
    if "GLIBC_TUNABLES" in os.environ or not _has_glibc() or _has_accelerator():
        return
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "GLIBC_TUNABLES": HUGE_PAGES})


def quiet_libtpu(compute: bool = True) -> None:
    """Keep libtpu from writing to the terminal, and, without a TPU or `compute`, from searching for one.

    It must be called before JAX makes its first array. Variables that the user has set keep their values.
    """
    for name, value in (TPU_LOGS if compute and _has_tpu() else NO_TPU).items():
        os.environ.setdefault(name, value)


class Prefetch(Iterator[Result], Generic[Item, Result]):
    """Iterate over `make(item)` in order, computed in a thread up to `depth` items ahead.

    An exception in `make` is raised when its item is requested. `waited` counts the seconds the consumer waited.
    """

    def __init__(self, make: Callable[[Item], Result], items: Iterable[Item], depth: int = 1) -> None:
        self.waited = 0.0
        self._make, self._items, self._depth = make, iter(items), depth
        self._pending: deque[Future[Result]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tpaw-prefetch")

    def __enter__(self) -> "Prefetch[Item, Result]":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __next__(self) -> Result:
        for item in self._items:
            self._pending.append(self._pool.submit(self._make, item))
            if len(self._pending) > self._depth:
                break
        if not self._pending:
            raise StopIteration
        start = time.perf_counter()
        result = self._pending.popleft().result()
        self.waited += time.perf_counter() - start
        return result


def _has_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, OSError, ValueError):  # not Linux, or another C library
        return False


def _has_accelerator() -> bool:
    """Whether JAX could choose a backend other than the CPU."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms != "cpu"
    if entry_points(group="jax_plugins") or importlib.util.find_spec("jax_plugins"):
        return True
    return _has_tpu() and importlib.util.find_spec("libtpu") is not None  # without a chip, libtpu serves `tpaw plan`


def _has_tpu() -> bool:
    return any([*Path("/dev").glob("accel*"), *Path("/dev/vfio").glob("[0-9]*")])
