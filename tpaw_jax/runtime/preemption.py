"""How a run stops on SIGTERM, SIGINT or a pod's preemption notice without losing work."""

import os
import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: the same command resumes the run."""


class Preempted(Exception):
    """The run has stopped on request; the message says where, and how to resume."""


class PreemptionNotice:
    """Whether the run was asked to stop. As a context it handles SIGTERM and SIGINT; on a pod JAX's service does.

    After the first signal the run stops at the next point from which it can resume without loss. A second signal ends
    the process at once: no file is corrupted, but work since the last save is repeated.
    """

    def __init__(self) -> None:
        self.received = False
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> "PreemptionNotice":
        alone = jax.process_count() == 1  # on a pod JAX's service handles SIGTERM, so that all processes stop together
        if alone and threading.current_thread() is threading.main_thread():  # only the main thread may set handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers.clear()

    def received_at(self, step: int) -> bool:
        """Whether to stop after this step. All processes of a pod must ask once for every step, in order.

        On a pod JAX's preemption service receives SIGTERM on any host and makes all processes stop at the same step.
        """
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.received

    def check(self, where: str) -> None:
        """Stop here if asked to, in a stage whose finished work is on disk. On a pod only `received_at` stops a run.

        Raises:
            Preempted: this process was asked to stop.
        """
        if self.received:
            raise Preempted(f"{where}; run the same command to resume there.")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = True
        message = (
            f"tpaw: {signal.Signals(number).name}: the run stops once its current work is saved; a second signal stops "
            "it at once.\n"
        )
        os.write(2, message.encode())  # print is not safe here: the signal may have interrupted it
