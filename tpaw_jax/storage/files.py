"""Atomic file writes, a lock for directories, and readers that recognize corrupted files."""

import contextlib
import errno
import fcntl
import io
import json
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tpaw_jax.runtime import processes

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
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turn system errors from writing `path` into one sentence with the cause and what to do.

    Raises:
        OSError: the disk is full, the path cannot be written, or too many files are open.
    """
    try:
        yield
    except Exception as error:  # Orbax and TensorStore wrap the system's errors in many types
        number = getattr(error, "errno", None)
        number = number or next((n for n in _WRITE_ERRORS if os.strerror(n).lower() in str(error).lower()), None)
        if number not in _WRITE_ERRORS:
            raise
        raise OSError(
            f"{path} could not be written: {_WRITE_ERRORS[number]}. All finished work is intact. Fix the cause, then "
            "run the same command again to resume."
        ) from error


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory while the block runs. The lock is released however the process ends.

    File systems without locks, such as mounted buckets, are not guarded.

    Raises:
        ValueError: another process holds the lock; names its host and process number.
        OSError: the directory cannot be written.
    """
    with explain_os_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        opened = (directory / ".held").open("a+")
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "an unknown process"
            raise ValueError(
                f"{directory}: another process is using this directory: {holder}. Wait until it ends, stop it, or "
                "choose another directory."
            ) from error
        except OSError:
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def is_corruption(error: Exception) -> bool:
    """Whether a read error is caused by the file's content, not by memory, permissions or the network."""
    system = (errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.ENOMEM, errno.EIO)
    if isinstance(error, MemoryError) or getattr(error, "errno", None) in system:
        return False
    return not any(words in str(error).lower() for words in _NOT_CORRUPTION)


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file atomically, on process 0 only."""
    if processes.is_main():
        replace(path, content)


def replace(path: Path, content: bytes | memoryview) -> None:
    """Write a file atomically, on any process: write `partial_path(path)`, flush it to disk, rename it."""
    write_partial(path, content)
    with explain_os_errors(path):
        os.replace(partial_path(path), path)


def write_partial(path: Path, content: bytes | memoryview) -> None:
    """The first half of `replace`: write `partial_path(path)` and flush it to disk. On failure it is removed."""
    partial = partial_path(path)
    try:
        with explain_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def partial_path(path: Path) -> Path:
    """Where a file is written before it is renamed to `path`."""
    return path.with_name(path.name + ".partial")


def append_lines(path: Path, lines: Sequence[str]) -> None:
    """Append lines to a text file that only this process writes, and flush to disk. A kill can cut the last line."""
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write("".join(line + "\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())


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


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write an .npz file of named arrays."""
    write_bytes(path, npz(**arrays))


def npz(**arrays: np.ndarray) -> memoryview:
    """Encode named arrays as an .npz file; equal arrays give equal bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)  # type: ignore[arg-type] # numpy's stub takes names for options
    return buffer.getbuffer()  # not a copy: a round's responses may have gigabytes


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of an .npz file. Pickled content is rejected.

    Raises:
        CorruptedFile: the content cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # zipfile, struct, numpy and the system raise many types
        if not is_corruption(error):
            raise
        raise CorruptedFile(path, f"the file is damaged ({type(error).__name__}: {error})") from error
