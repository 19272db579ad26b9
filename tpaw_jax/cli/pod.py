"""What commands do as one of several processes: join the others, be supervised, and end together."""

import argparse
import contextlib
import sys
from typing import NamedTuple

from tpaw_jax.runtime import supervisor

HOST_TIMEOUT = 60.0
"""Seconds. Long enough for a host to be moved to another machine."""


def is_one_of_several(options: argparse.Namespace) -> bool:
    """Whether the command runs as one process of a pod."""
    return bool(getattr(options, "pod", False) or getattr(options, "coordinator", None))


def supervise(options: argparse.Namespace) -> int:
    """Run the command in a child of this process; returns its exit code."""
    command = [sys.executable, *sys.orig_argv[1:]]
    return supervisor.supervise(command, _timeout(options), options.max_restarts or 0)


def join(options: argparse.Namespace) -> None:
    """Connect to the other processes, if the command is one of several, and begin to watch them."""
    if not is_one_of_several(options):
        return
    from tpaw_jax.runtime import heartbeat, processes

    if _timeout(options) < 5:
        raise ValueError(f"--host-timeout is {options.host_timeout:g}; it must be at least 5 seconds.")
    jax_timeout = max(100.0, 2 * _timeout(options))  # JAX aborts without a sentence: `heartbeat` has to come first
    try:
        processes.join(options.coordinator, options.num_processes, options.process_id, jax_timeout)
    except processes.NotConnected as error:  # the same command may find the others later
        print(f"tpaw: {error}", file=sys.stderr)
        sys.exit(supervisor.EXIT_CODE)
    heartbeat.start(_timeout(options))


class Told(NamedTuple):
    """What a process that ends tells the others."""

    sentence: str
    consequence: bool = False  # the failure of another process may be the cause


def end(code: int, printed: str, told: Told) -> None:
    """Print the error, if any, and end all processes if this one failed; otherwise wait until all have finished."""
    from tpaw_jax.runtime import heartbeat

    try:
        if told.consequence:
            heartbeat.await_failure()
        if printed:
            with contextlib.suppress(OSError):  # the log may be on a full disk
                print(printed, file=sys.stderr, flush=True)
        if code in (0, supervisor.PREEMPTED):
            heartbeat.finish()
    except KeyboardInterrupt:
        code, told = 130, Told("interrupted.")
    if code not in (0, supervisor.PREEMPTED):
        heartbeat.fail(code, told.sentence)


def _timeout(options: argparse.Namespace) -> float:
    return HOST_TIMEOUT if options.host_timeout is None else options.host_timeout
