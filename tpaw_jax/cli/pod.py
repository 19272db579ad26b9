"""What commands do as one of several processes: join the others, be supervised, and end together."""

import argparse
import contextlib
import sys

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


def end(code: int, sentence: str, consequence: bool) -> None:
    """End all processes if this one failed; otherwise wait until all have finished.

    Args:
        code: the exit code.
        sentence: why it failed.
        consequence: the failure of another process may be the cause; `sentence` is not printed yet.
    """
    from tpaw_jax.runtime import heartbeat

    if consequence:
        heartbeat.await_failure()
        with contextlib.suppress(OSError):  # the log may be on a full disk
            print(sentence, file=sys.stderr, flush=True)
        sentence = sentence.strip().splitlines()[-1]
    if code in (0, supervisor.PREEMPTED):
        heartbeat.finish()
    else:
        heartbeat.fail(code, sentence)


def _timeout(options: argparse.Namespace) -> float:
    return HOST_TIMEOUT if options.host_timeout is None else options.host_timeout
