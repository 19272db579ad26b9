"""Prefetching in a thread, and the restart that keeps buffers in huge pages."""

import os
import subprocess
import sys
import threading

import pytest

from tpaw_jax.runtime import host
from tpaw_jax.runtime.host import HUGE_PAGES, Prefetch

SHOW = """
import os

from tpaw_jax.runtime.host import restart_with_huge_pages

restart_with_huge_pages()
print(os.environ["GLIBC_TUNABLES"])
"""


def test_items_come_in_order_and_are_computed_in_another_thread():
    made_by = []

    def make(item):
        made_by.append(threading.current_thread())
        return item * item

    with Prefetch(make, range(7), depth=2) as ahead:
        assert list(ahead) == [0, 1, 4, 9, 16, 25, 36]
        assert ahead.waited >= 0
    assert threading.main_thread() not in made_by


def test_no_more_than_depth_items_are_computed_ahead():
    started, go_on = [], threading.Event()

    def make(item):
        started.append(item)
        return item

    with Prefetch(make, range(100), depth=2) as ahead:
        assert next(ahead) == 0
        ahead._pool.submit(go_on.set).result()  # everything submitted before has finished
        assert started == [0, 1, 2]


def test_an_exception_is_raised_when_its_item_is_requested():
    def make(item):
        if item == 2:
            raise ValueError("no such checkpoint")
        return item

    with Prefetch(make, range(5), depth=3) as ahead:
        assert [next(ahead), next(ahead)] == [0, 1]
        with pytest.raises(ValueError, match="no such checkpoint"):
            next(ahead)


def test_waiting_is_counted():
    gate = threading.Event()
    with Prefetch(lambda item: gate.wait(0.2), [0]) as ahead:
        next(ahead)
        assert ahead.waited > 0.1


def restarted(**variables):
    clean = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "JAX_PLATFORMS")}
    return subprocess.run(
        [sys.executable, "-c", SHOW], env={**clean, **variables}, capture_output=True, text=True, timeout=60
    )


@pytest.mark.skipif(not host._has_glibc(), reason="only glibc reads GLIBC_TUNABLES")
def test_a_process_on_the_cpu_restarts_with_huge_pages():
    assert restarted(JAX_PLATFORMS="cpu").stdout == HUGE_PAGES + "\n"


def test_no_restart_if_glibc_tunables_is_set_or_there_is_an_accelerator():
    assert restarted(JAX_PLATFORMS="cpu", GLIBC_TUNABLES="").stdout == "\n"
    assert "KeyError" in restarted(JAX_PLATFORMS="tpu").stderr
