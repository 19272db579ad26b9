"""Atomic file writes, on disks and in buckets, and readers that recognize corrupted files."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from tpaw_jax.runtime import processes
from tpaw_jax.storage import bucket

_NOT_CORRUPTION = (
    "resource_exhausted",
    "out of memory",
    "permission",
    "unavailable",
    "deadline",
    "too many open files",
)
"""Parts of the messages of read errors that are not caused by the file's content."""

_WRITE_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is exhausted",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EMFILE: "this process has too many open files (see ulimit -n)",
    errno.ENFILE: "the system has too many open files",
}


class CorruptedFile(ValueError):
    """The file or checkpoint at `path` does not hold what was written."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}.")
        self.path = path


@contextlib.contextmanager
def explain_errors(path: Path) -> Iterator[None]:
    """Turn system errors from writing `path` into one sentence with the cause and what to do.

    Raises:
        OSError: the disk is full, the path cannot be written, too many files are open, or a bucket cannot be used.
    """
    if bucket.is_remote(path):
        with bucket.explain_errors(path):
            yield
        return
    try:
        yield
    except Exception as error:  # Orbax and TensorStore wrap the system's errors in many types
        number = getattr(error, "errno", None)
        number = number or next((n for n in _WRITE_ERRORS if os.strerror(n).lower() in str(error).lower()), None)
        if number not in _WRITE_ERRORS:
            raise
        explained = OSError(
            f"{path} could not be written: {_WRITE_ERRORS[number]}. All finished work is intact. Fix the cause, then "
            "run the same command again to resume."
        )
        explained.errno = number
        raise explained from error


def is_corruption(error: Exception, path: Path) -> bool:
    """Whether an error of reading `path` is caused by its content, not by memory, permissions or the network."""
    if bucket.is_remote(path) and bucket.is_outage(error):
        return False
    system = (*_WRITE_ERRORS, errno.ENOMEM, errno.EIO)
    if isinstance(error, MemoryError) or getattr(error, "errno", None) in system:
        return False
    return not any(words in str(error).replace(str(path), "").lower() for words in _NOT_CORRUPTION)


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file atomically, on process 0 only."""
    if processes.is_main():
        replace(path, content)


def replace(path: Path, content: bytes | memoryview) -> None:
    """Write a file atomically, on any process: write `partial_path(path)`, flush it to disk, rename it.

    In a bucket: put the object.
    """
    if bucket.is_remote(path):
        with bucket.explain_errors(path):
            path.write_bytes(content)
        return
    write_partial(path, content)
    finish_partial(path)


def write_partial(path: Path, content: bytes | memoryview | Callable[[IO[bytes]], None]) -> None:
    """The first half of `replace`: write `partial_path(path)` and flush it. On failure it is removed.

    On a disk, `content` may be a function that writes to the open file.
    """
    partial = partial_path(path)
    if not callable(content) and bucket.is_remote(path):
        replace(partial, content)
        return
    try:
        with explain_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                content(file) if callable(content) else file.write(content)
                file.flush()
                os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def finish_partial(path: Path) -> None:
    """The second half: give the written file its name."""
    with explain_errors(path):
        if bucket.is_remote(path):
            bucket.move(partial_path(path), path)
        else:
            os.replace(partial_path(path), path)


def partial_path(path: Path) -> Path:
    """Where a file is written before it is renamed to `path`."""
    return path.with_name(path.name + ".partial")


def size(path: Path) -> int:
    """The bytes of a file."""
    facts: Any = path.stat()
    return facts.length if bucket.is_remote(path) else facts.st_size


def sha256(path: Path) -> str:
    """The checksum of a file's content."""
    if bucket.is_remote(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def move(path: Path, new: Path) -> None:
    """Rename a file or directory; in a bucket, object by object."""
    if bucket.is_remote(path):
        bucket.move(path, new)
    else:
        path.rename(new)


def remove_tree(path: Path) -> None:
    """Remove a checkpoint so that a kill in between leaves none that looks complete."""
    if bucket.is_remote(path):
        bucket.remove_tree(path)
    else:
        shutil.rmtree(path.rename(path.with_name(path.name + ".removed")))


def append(path: Path, content: bytes) -> None:
    """Append to a file that only this process writes, and flush to disk. A kill can cut what is appended."""
    with explain_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


class LineLog:
    """Appends lines to a text file that only this process writes.

    On a disk, each line at once. Objects of a bucket cannot grow: there, the whole text is put again every
    `seconds`, or more rarely if that takes long, and by `flush`.
    """

    def __init__(self, path: Path, seconds: float = 10.0) -> None:
        self.path, self.seconds = path, seconds
        self._text = b""
        self._put = time.monotonic()
        if bucket.is_remote(path) and path.exists():
            self._text = path.read_bytes()

    def write(self, line: str) -> None:
        """Append a line."""
        if not bucket.is_remote(self.path):
            with explain_errors(self.path), self.path.open("a") as file:
                file.write(line + "\n")
            return
        self._text += line.encode() + b"\n"
        if time.monotonic() - self._put >= self.seconds:
            self.flush()

    def flush(self) -> None:
        """Write what is left."""
        if bucket.is_remote(self.path):
            begun = time.monotonic()
            replace(self.path, self._text)
            self._put = time.monotonic()
            self.seconds = max(self.seconds, 50 * (self._put - begun))


def parse_json(content: str | bytes, where: object) -> Any:
    """Decode JSON; `where` names the file or line in the error.

    Raises:
        ValueError: the content is not JSON, or nested too deeply.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error}).") from error


def write_json(path: Path, value: Any) -> None:
    """Write an indented JSON file."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def write_json_lines(path: Path, records: Iterable[Any]) -> None:
    """Write a file with one JSON record per line."""
    write_bytes(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
