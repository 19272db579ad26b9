"""One process at a time owns a run's directory: by a lock on a disk, by a lease in a bucket.

A lease is the object `.held`, which names its owner. The owner rewrites it every few seconds. One that has not changed
for `LEASE_SECONDS`, by the clock of the process that watches it, is free for the taking.
"""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tpaw_jax.storage import bucket, files

LEASE_SECONDS = 60.0
"""A network outage shorter than this costs nobody a run."""

BEATS = 6
"""How often an owner rewrites its lease in that time."""


@contextlib.contextmanager
def owned(directory: Path, say: Callable[[str], None], seconds: float = LEASE_SECONDS) -> Iterator[None]:
    """Own a directory while the block runs.

    A lock is released however the process ends. A lease that a dead process left is taken at once if that process ran
    on this host, else after `seconds`. File systems without locks, such as mounted buckets, are not guarded.

    Raises:
        ValueError: another process owns it; names its host and process number.
        OSError: the directory cannot be written.
    """
    with _leased(directory, say, seconds) if bucket.is_remote(directory) else _locked(directory):
        yield


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
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
        yield


@contextlib.contextmanager
def _leased(directory: Path, say: Callable[[str], None], seconds: float) -> Iterator[None]:
    path, own = directory / ".held", {**_this_process(), "key": secrets.token_hex(8)}
    with files.explain_errors(directory):
        generation = _take(path, own, say, seconds)
    ended = threading.Event()
    keeper = threading.Thread(target=_keep, args=(path, own, generation, seconds, ended), daemon=True)
    keeper.start()
    try:
        yield
    finally:
        ended.set()
        keeper.join()
        with contextlib.suppress(Exception):  # it runs out by itself
            content, generation = bucket.read(path)
            if _parsed(content).get("key") == own["key"]:
                bucket.replace(path, None, generation)


def _take(path: Path, own: dict[str, Any], say: Callable[[str], None], seconds: float) -> bucket.Generation:
    watched, since = None, time.monotonic()
    while True:
        content, generation = bucket.read(path)
        holder = _parsed(content)
        if watched is not None and generation != watched and content is not None:
            raise _in_use(path.parent, _name(holder.get("process"), holder.get("host")))
        waited = time.monotonic() - since
        if content is None or _has_ended(holder) or waited >= holder.get("seconds", seconds):
            taken = bucket.replace(path, _content(own, 0, seconds), generation)
            if taken is not None:
                return taken
        elif watched is None:
            watched = generation
            say(
                f"{path.parent}: {_name(holder.get('process'), holder.get('host'))} used this directory last and may "
                f"still do. Waiting {holder.get('seconds', seconds):g} s for a sign of life."
            )
        time.sleep(min(1.0, seconds / (2 * BEATS)))


def _keep(
    path: Path, own: dict[str, Any], generation: bucket.Generation, seconds: float, ended: threading.Event
) -> None:
    beat = 0
    while not ended.wait(seconds / BEATS):
        beat += 1
        with contextlib.suppress(Exception):  # a later beat may pass
            renewed = bucket.replace(path, _content(own, beat, seconds), generation)
            if renewed is None:
                content, generation = bucket.read(path)
                if _parsed(content).get("key") != own["key"]:
                    return  # the next save of the journal says so
            else:
                generation = renewed


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
    return here and _started(holder.get("process")) != holder.get("started")


def _boot() -> str:
    """What tells this boot of this host from others; empty where the system does not say."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    return ""


def _started(process: Any) -> str:
    """When a process was started, in ticks since the boot; empty if there is none."""
    with contextlib.suppress(OSError):
        after_name = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return "" if after_name[0] in "ZX" else after_name[19]
    return ""


def _name(process: Any, host: Any) -> str:
    return f"process {process} on {host}" if process else "an unknown process"


def _in_use(directory: Path, holder: str) -> ValueError:
    return ValueError(
        f"{directory}: another process is using this directory: {holder}. Wait until it ends, stop it, or choose "
        "another directory."
    )
