"""One process at a time owns a run's directory: by a lock on a disk, by a lease in a bucket.

A lease is the object `.held`, which names its owner. The owner rewrites it every few seconds. One that has not changed
for `LEASE_SECONDS`, by the clock of the process that watches it, is free for the taking.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tpaw_jax.runtime import supervisor
from tpaw_jax.storage import bucket, files, journal

LEASE_SECONDS = 120.0
"""Longer than the processes of a pod outlive process 0 with the default `--host-timeout`."""

BEATS = 8
"""How often an owner rewrites its lease in that time."""


class Owner:
    """Proof that this process owns a directory."""

    def check(self) -> None:
        """Check that it still does.

        Raises:
            journal.TakenOver: another process has taken the lease.
        """


@contextlib.contextmanager
def owned(directory: Path, say: Callable[[str], None], seconds: float = LEASE_SECONDS) -> Iterator[Owner]:
    """Own a directory while the block runs.

    A lock is released however the process ends. A lease that a dead process left is taken at once if that process ran
    on this host, else after `seconds`. A process whose lease was taken ends at its next beat. File systems without
    locks, such as mounted buckets, are not guarded.

    Raises:
        ValueError: another process owns it; names its host and process number.
        OSError: the directory cannot be written.
    """
    with _leased(directory, say, seconds) if bucket.is_remote(directory) else _locked(directory) as owner:
        yield owner


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[Owner]:
    with files.explain_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        opened = (directory / ".held").open("a+")
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise _in_use(directory, file.read().strip() or "an unknown process") from error
        except OSError:
            pass
        file.truncate(0)
        file.write(_name(os.getpid(), socket.gethostname()) + "\n")
        file.flush()
        yield Owner()


@dataclasses.dataclass
class _Lease(Owner):
    """A lease, kept by a thread."""

    path: Path
    own: dict[str, Any]
    seconds: float
    generation: bucket.Generation
    ended: threading.Event = dataclasses.field(default_factory=threading.Event)

    def check(self) -> None:
        if not self._is_own(bucket.read(self.path)[0]):
            raise journal.taken_over(self.path.parent)

    def keep(self) -> None:
        """Renew the lease until `ended` is set. Ends the process if another one has taken the lease."""
        beat, store = 0, bucket.open_store(self.path.parent, retries=2, seconds=1)
        while not self.ended.wait(self.seconds / BEATS):
            beat += 1
            with contextlib.suppress(bucket.BucketError):  # a later beat may pass
                content = _content(self.own, beat, self.seconds)
                renewed = bucket.replace(self.path, content, self.generation, store)
                if renewed is not None:
                    self.generation = renewed
                    continue
                found, self.generation = bucket.read(self.path, store)
                if found is not None and not self._is_own(found):
                    print(f"tpaw: {journal.taken_over(self.path.parent)}", file=sys.stderr, flush=True)
                    os._exit(supervisor.EXIT_CODE)  # nothing that this process writes may meet what the other writes

    def release(self) -> None:
        """Remove it."""
        with contextlib.suppress(bucket.BucketError):  # it runs out by itself
            store = bucket.open_store(self.path.parent, retries=2, seconds=1)
            found, generation = bucket.read(self.path, store)
            if self._is_own(found):
                bucket.replace(self.path, None, generation, store)

    def _is_own(self, content: bytes | None) -> bool:
        return _parsed(content).get("key") == self.own["key"]


@contextlib.contextmanager
def _leased(directory: Path, say: Callable[[str], None], seconds: float) -> Iterator[Owner]:
    path, own = directory / ".held", {**_this_process(), "key": secrets.token_hex(8)}
    lease = _Lease(path, own, seconds, _take(path, own, say, seconds))
    keeper = threading.Thread(target=lease.keep, daemon=True)
    keeper.start()
    try:
        yield lease
    finally:
        lease.ended.set()
        keeper.join(timeout=5)
        lease.release()


def _take(path: Path, own: dict[str, Any], say: Callable[[str], None], seconds: float) -> bucket.Generation:
    watched, since = None, 0.0
    while True:
        content, generation = bucket.read(path)
        holder = _parsed(content)
        if watched is not None and generation != watched and content is not None:
            raise _in_use(path.parent, _name(holder.get("process"), holder.get("host")))
        waits = holder.get("seconds", seconds)
        over = watched is not None and time.monotonic() - since >= waits
        if content is None or over or _has_ended(holder):
            taken = bucket.replace(path, _content(own, 0, seconds), generation)
            if taken is not None:
                return taken
        elif watched is None:
            watched, since = generation, time.monotonic()
            say(
                f"{path.parent}: {_name(holder.get('process'), holder.get('host'))} used this directory last and may "
                f"still do. Waiting {waits:g} s for a sign of life."
            )
        time.sleep(min(1.0, seconds / (2 * BEATS)))


def _content(own: dict[str, Any], beat: int, seconds: float) -> bytes:
    return json.dumps({**own, "beat": beat, "seconds": seconds}).encode()


def _parsed(content: bytes | None) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        holder = json.loads(content or b"")
        return holder if isinstance(holder, dict) else {}
    return {}


def _this_process() -> dict[str, Any]:
    process = os.getpid()
    return {"process": process, "host": socket.gethostname(), "boot": _boot(), "started": _started(process)}


def _has_ended(holder: dict[str, Any]) -> bool:
    """Whether the holder ran on this host since it was started, and is gone."""
    here = holder.get("host") == socket.gethostname() and holder.get("boot") == _boot() != ""
    return here and _started(holder.get("process")) not in ("unknown", holder.get("started"))


def _boot() -> str:
    """What tells this boot of this host from others; empty where the system does not say."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    return ""


def _started(process: Any) -> str:
    """When a process was started, in ticks since the boot; empty if there is none."""
    try:
        os.kill(int(process), 0)
    except PermissionError:
        return "unknown"
    except (OSError, TypeError, ValueError):
        return ""
    with contextlib.suppress(OSError):
        after_name = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return "" if after_name[0] in "ZX" else after_name[19]
    return "unknown"


def _name(process: Any, host: Any) -> str:
    return f"process {process} on {host}" if process else "an unknown process"


def _in_use(directory: Path, holder: str) -> ValueError:
    return ValueError(
        f"{directory}: another process is using this directory: {holder}. Wait until it ends, stop it, or choose "
        "another directory."
    )
