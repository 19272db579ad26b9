"""The parent of each process of a pod: it says how the process ended if that could not, and starts it again.

JAX aborts all processes with a stack trace when process 0 is gone; a process that is killed says nothing; one that is
stopped hangs. A parent that does not use JAX survives all of these.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

EXIT_CODE = 69
"""EX_UNAVAILABLE of sysexits.h: another process failed; the same command on all hosts resumes the run."""

PREEMPTED = 75
"""EX_TEMPFAIL of sysexits.h: the run was asked to stop; the same command resumes it."""

FINAL = (0, 2, PREEMPTED, 130)
"""Exit codes after which nothing is started again: success, unusable input, preemption, Ctrl-C."""

STATUS = "TPAW_STATUS"
"""Environment variable of the process: the file that it writes at every heartbeat, with the names of the hosts."""

GRACE = 5.0
"""Seconds that a process without heartbeats gets beyond 1.5 times the timeout, to say itself why it ends."""

SECONDS_BETWEEN_STARTS = 15.0
"""Beyond the timeout, in which the others notice a failure: a new process must not join an old coordinator."""


def supervise(command: Sequence[str], timeout: float, restarts: int) -> int:
    """Run a command until it ends for good. Returns its exit code; `EXIT_CODE` if it was killed, but not from here.

    SIGTERM, SIGINT and SIGHUP are passed on. After one of them, nothing is started again.

    Args:
        command: the process.
        timeout: seconds without a heartbeat after which the process counts as hung, counted from its first one.
        restarts: how often to start it again after a failure.
    """
    with tempfile.TemporaryDirectory(prefix="tpaw-") as folder, _Signals() as signals:
        status, attempt = Path(folder) / "status.json", 0
        while True:
            status.unlink(missing_ok=True)
            code, sentence = _wait(signals.start(command, status), status, timeout, signals)
            if sentence:
                _say(sentence)
            if code in FINAL or attempt >= restarts or signals.received:
                return code
            attempt += 1
            _say(f"exit code {code}; starting again, {attempt} of {restarts} times.")
            pause = time.monotonic() + SECONDS_BETWEEN_STARTS + timeout
            while time.monotonic() < pause and not signals.received:
                time.sleep(0.1)
            if signals.received:
                return 128 + signals.received


class _Signals:
    """Passes signals on to the process that runs, and remembers them."""

    def __init__(self) -> None:
        self.received = 0
        self._child: subprocess.Popen[bytes] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as SIGHUP is under nohup
                self._before[number] = signal.signal(number, self._forward)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def start(self, command: Sequence[str], status: Path) -> subprocess.Popen[bytes]:
        """Start the process, in a session of its own, so that Ctrl-C reaches it once: from here."""
        environment = {**os.environ, STATUS: str(status)}
        self._child = subprocess.Popen(command, env=environment, start_new_session=True)
        if self.received:  # while it started
            self._child.send_signal(self.received)
        return self._child

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if self._child is not None:
            self._child.send_signal(number)


def _wait(child: subprocess.Popen[bytes], status: Path, timeout: float, signals: _Signals) -> tuple[int, str]:
    """The exit code of the process, and what to say about its end."""
    hung, seen, changed = False, -1, time.monotonic()
    limit = 1.5 * timeout + GRACE  # the process watches the others; this watches the process
    while True:
        try:
            code = child.wait(timeout=1)
            break
        except subprocess.TimeoutExpired:
            try:
                beat = status.stat().st_mtime_ns
            except FileNotFoundError:
                beat = -1
            if beat != seen:
                seen, changed = beat, time.monotonic()
            elif beat != -1 and time.monotonic() - changed > limit:
                hung = True
                child.kill()
    if hung:
        return EXIT_CODE, f"{_name(status)} was stopped or hung: it had no heartbeat for {limit:.0f} s."
    if code >= 0:
        return code, ""
    if signals.received:
        return 128 - code, ""
    if code == -signal.SIGABRT and not status.exists():
        return EXIT_CODE, (
            "JAX has ended the process before it was connected to the others. Check the coordinator's address and "
            "port, and that every process has started."
        )
    if code == -signal.SIGABRT and _read(status).get("process"):
        first = _read(status)["hosts"].get("0", "unknown")
        return EXIT_CODE, (
            f"JAX has ended {_name(status)}, most likely because process 0 (host {first}) is gone: it was killed, or "
            "its host or network failed. The same command on all hosts resumes the run."
        )
    killed = " Was the memory of the host exhausted?" if code == -signal.SIGKILL else ""
    return EXIT_CODE, f"{_name(status)} was ended by {signal.Signals(-code).name}.{killed}"


def _name(status: Path) -> str:
    found = _read(status)
    if "process" not in found:
        return "The process"
    return f"Process {found['process']} (host {found['hosts'].get(str(found['process']), 'unknown')})"


def _read(status: Path) -> dict[str, Any]:
    try:
        return json.loads(status.read_text())
    except (OSError, ValueError):
        return {}


def end_with_parent() -> None:
    """Have this process killed if its supervisor is. Linux only."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _say(sentence: str) -> None:
    print(f"tpaw: {sentence}", file=sys.stderr, flush=True)
