"""Told to go: what a run does with SIGTERM, SIGINT and a pod's notice of preemption."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: the same command goes on."""


class Preempted(Exception):
    """The run was told to stop and has stopped; the message says where, and how to go on."""


class PreemptionNotice:
    """Whether the run was told to stop. As a context it listens to SIGTERM and SIGINT, on a pod JAX's service does.

    The first signal is noted, and the run stops at the next place from which it can go on without loss. The second
    ends the process at once: files are whole at any moment, but work since that place is done again.
    """

    def __init__(self) -> None:
        self.received = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> PreemptionNotice:
        alone = jax.process_count() == 1  # on a pod JAX's service must hear SIGTERM, and one process cannot stop alone
        if alone and threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def received_at(self, step: int) -> bool:
        """Whether to stop after this step, which all processes of a pod ask alike, each step once and in order.

        There JAX's own service hears SIGTERM on any host and has all of them stop at the same step.
        """
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.received

    def check(self, where: str) -> None:
        """End a stage whose finished work is on disk already; on a pod only training stops before it is killed.

        Raises:
            Preempted: this process was told to stop.
        """
        if self.received:
            raise Preempted(f"{where}; the same command goes on from there.")

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = True
        sentence = (
            f"tpaw: {signal.Signals(number).name}: the run stops when it has saved what it is at; twice: at once.\n"
        )
        os.write(2, sentence.encode())  # print may be what the signal has interrupted
