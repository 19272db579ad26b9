"""What the host does for the device: memory that stays, and work that is ready before it is needed."""

from __future__ import annotations

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
"""GLIBC_TUNABLES that keep buffers in huge pages and do not give them back to the system between steps."""

Item = TypeVar("Item")
Made = TypeVar("Made")


def restart_with_huge_pages() -> None:
    """Begin this process again under `HUGE_PAGES`, which glibc reads only once, where JAX computes on the CPU.

    There the buffers of a step come from malloc, which by default maps them anew each time: page faults then cost a
    third of the step. A GLIBC_TUNABLES that is already set, be it empty, is left alone.
    """
    if "GLIBC_TUNABLES" in os.environ or not _has_glibc() or _has_accelerator():
        return
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "GLIBC_TUNABLES": HUGE_PAGES})


class Prefetch(Iterator[Made], Generic[Item, Made]):
    """`make(item)` of each item in order, made by a thread up to `depth` items before it is asked for.

    What `make` raises is raised where its item is asked for. `waited` is the time the consumer stood still, seconds.
    """

    def __init__(self, make: Callable[[Item], Made], items: Iterable[Item], depth: int = 1) -> None:
        self.waited = 0.0
        self._make, self._items, self._depth = make, iter(items), depth
        self._pending: deque[Future[Made]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tpaw-ahead")

    def __enter__(self) -> Prefetch[Item, Made]:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __next__(self) -> Made:
        for item in self._items:
            self._pending.append(self._pool.submit(self._make, item))
            if len(self._pending) > self._depth:
                break
        if not self._pending:
            raise StopIteration
        start = time.perf_counter()
        made = self._pending.popleft().result()
        self.waited += time.perf_counter() - start
        return made


def _has_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, OSError, ValueError):  # not Linux, or another C library
        return False


def _has_accelerator() -> bool:
    """Whether JAX could choose another backend than the CPU."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms != "cpu"
    if entry_points(group="jax_plugins") or importlib.util.find_spec("jax_plugins"):
        return True
    chips = [*Path("/dev").glob("accel*"), *Path("/dev/vfio").glob("[0-9]*")]
    return bool(chips) and importlib.util.find_spec("libtpu") is not None  # libtpu alone compiles, for `tpaw plan`
