"""Heartbeats of a pod: a host that fails ends the run on all hosts, with its name and the reason in every log.

Each process writes a beat to the key-value store of JAX's coordinator, which lives in process 0, and reads the others'.
A process that fails says so there. If a process says that, or stops beating, the others end. Collectives would
otherwise wait, for minutes until JAX aborts them or forever.
"""

import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from jax._src import distributed  # the only way to the key-value store; Orbax takes it too

from tpaw_jax.runtime.supervisor import EXIT_CODE, STATUS

INTERVAL = 1.0
"""Seconds between beats."""

LINGER = 10.0
"""Seconds that a failed process 0 waits for the others to read why: JAX aborts them once it is gone."""


class _End(NamedTuple):
    """How a process ended: its exit code, and the sentence for all if it was not the end of the run."""

    code: int
    sentence: str = ""


class Heartbeat:
    """The threads that beat and watch, from `start` to `finish`.

    Args:
        timeout: seconds without a beat after which a process counts as failed.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.own, self.count = _numbers()
        self.hosts = {self.own: socket.gethostname()}
        self._client: Any = distributed.global_state.client
        self._beats: dict[int, str] = {}  # the last beat of each process
        self._seen = dict.fromkeys(range(self.count), time.monotonic())  # when it was read
        self._ended: dict[int, _End] = {}
        self._answered = time.monotonic()  # when the coordinator last did
        self._written = ""  # the content of the file of `STATUS`
        self._stopped = threading.Event()
        self._ending = threading.Lock()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._watch)]
        for thread in self._threads:
            thread.start()
        self._exchange_hosts()

    def finish(self) -> None:
        """Wait until all processes have finished; a failure ends this one too, since files may be missing."""
        while len(self._ended) < self.count:
            if self.own not in self._ended:
                self._tell(_End(0))
            time.sleep(0.1)
        self._end_if_another_failed()
        self._stopped.set()
        for thread in self._threads:
            thread.join(2 * INTERVAL)
        with contextlib.suppress(OSError):  # the supervisor expects no more beats
            _status().unlink()

    def await_failure(self) -> None:
        """Wait as long as the failure of another process may take to be noticed; if it is, this process ends."""
        time.sleep(self.timeout + 2 * INTERVAL)
        with self._ending:  # not while `_watch` ends this process
            return

    def fail(self, code: int, sentence: str) -> None:
        """End this process, whose error is already printed, and all others with the same exit code."""
        self._end(_End(code, f"{self._name(self.own)} failed: {sentence}"), said=True)

    def _exchange_hosts(self) -> None:
        """Learn the hosts' names before anything can fail: a process that fails may take the coordinator with it."""
        with contextlib.suppress(Exception):  # a process did not come: `_watch` sees that
            self._client.key_value_set(f"tpaw/host/{self.own}", self.hosts[self.own])
            self._client.wait_at_barrier("tpaw hosts", int(1000 * self.timeout))
            self._read_hosts()

    def _read_hosts(self) -> None:
        for key, host in self._client.key_value_dir_get("tpaw/host/"):
            self.hosts[int(key.rsplit("/", 1)[1])] = host

    def _beat(self) -> None:
        number = 0
        while not self._stopped.is_set():
            with contextlib.suppress(Exception):  # the coordinator does not answer: `_watch` sees how long
                number += 1
                self._client.key_value_set(f"tpaw/beat/{self.own}", str(number), allow_overwrite=True)
                self._read()
            self._stopped.wait(INTERVAL)

    def _read(self) -> None:
        for key, value in self._client.key_value_dir_get("tpaw/beat/"):
            process = int(key.rsplit("/", 1)[1])
            if self._beats.get(process) != value:
                self._beats[process], self._seen[process] = value, time.monotonic()
        for key, value in self._client.key_value_dir_get("tpaw/ended/"):
            self._ended[int(key.rsplit("/", 1)[1])] = _End(*json.loads(value))
        if len(self.hosts) < self.count:
            self._read_hosts()
        self._answered = time.monotonic()
        if STATUS in os.environ:
            self._sign_of_life(json.dumps({"process": self.own, "hosts": self.hosts}))

    def _sign_of_life(self, content: str) -> None:
        """Tell the supervisor that this process lives. On a full disk, only the time of the file changes."""
        try:
            if content != self._written:
                partial = _status().with_suffix(".partial")
                partial.write_text(content)
                partial.replace(_status())
                self._written = content
            else:
                os.utime(_status())
        except OSError:
            with contextlib.suppress(OSError):
                os.utime(_status())

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._stopped.wait(INTERVAL / 4):
            now = time.monotonic()
            if now - last > 2 * INTERVAL:  # this process stood still, so it cannot know how the others are
                self._answered += now - last
                for process in self._seen:
                    self._seen[process] += now - last
            last = now
            self._end_if_another_failed()
            silent = self._silent()
            if silent is not None:
                self._end(
                    _End(
                        EXIT_CODE,
                        f"{self._name(silent)} has not answered for {self.timeout:.0f} s: the process was killed or "
                        "stopped, or its host or network failed. All processes end. The same command on all hosts "
                        "resumes the run.",
                    )
                )

    def _end_if_another_failed(self) -> None:
        failed = [end for process, end in list(self._ended.items()) if process != self.own and end.sentence]
        if failed:
            self._end(failed[0])

    def _silent(self) -> int | None:
        """A process that has not answered in time."""
        now = time.monotonic()
        if now - self._answered > self.timeout:
            return 0  # no news of any process, because the coordinator does not answer
        late = (p for p, seen in self._seen.items() if p not in self._ended and now - seen > self.timeout)
        return next((p for p in late if p != self.own), None)

    def _others_run(self) -> bool:
        """Whether another process may still want to read why all end: one that waits in `finish` does too."""
        ended, now = {process for process, end in self._ended.items() if end.code}, time.monotonic()
        return any(now - seen <= self.timeout for p, seen in self._seen.items() if p not in ended | {self.own})

    def _name(self, process: int) -> str:
        return f"Process {process} of {self.count} (host {self.hosts.get(process, 'unknown')})"

    def _end(self, end: _End, said: bool = False) -> None:
        """End this process. Both threads and the main thread may call this; the first call decides."""
        with self._ending:
            try:
                self._tell(end)
                if not said:  # not by `print`: the main thread may hold its lock
                    os.write(2, f"tpaw: {end.sentence}\n".encode())
                deadline = time.monotonic() + min(LINGER, self.timeout)
                while self.own == 0 and self._others_run() and time.monotonic() < deadline:
                    time.sleep(0.1)
            finally:
                os._exit(end.code)

    def _tell(self, end: _End) -> None:
        """Write to the store how this process ended, but do not wait for a coordinator that does not answer."""

        def write() -> None:
            with contextlib.suppress(Exception):
                self._client.key_value_set(f"tpaw/ended/{self.own}", json.dumps(end), allow_overwrite=True)

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        thread.join(2 * INTERVAL)


def _numbers() -> tuple[int, int]:
    """The index of this process and the number of all; unlike JAX's own functions, this does not open the devices."""
    return distributed.global_state.process_id, distributed.global_state.num_processes


def _status() -> Path:
    return Path(os.environ.get(STATUS, os.devnull + "/none"))


_RUNNING: list[Heartbeat] = []


def start(timeout: float) -> None:
    """Begin to beat and to watch the other processes, if there are any. `processes.join` comes before it."""
    if _numbers()[1] > 1:
        _RUNNING.append(Heartbeat(timeout))


def finish() -> None:
    """Wait until all processes have finished, then stop watching them."""
    while _RUNNING:
        _RUNNING.pop().finish()


def await_failure() -> None:
    """After an error that the failure of another process can cause: wait for that failure, which ends this process."""
    for running in _RUNNING:
        running.await_failure()


def fail(code: int, sentence: str) -> None:
    """End this process and all others with an exit code; `sentence` says why. Returns if there is only one process."""
    for running in _RUNNING:
        running.fail(code, sentence)
