"""Files that appear whole or not at all. Of several processes the first one writes them."""

from __future__ import annotations

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

_NOT_DAMAGE = ("resource_exhausted", "out of memory", "permission", "unavailable", "deadline", "too many open files")
"""Words of an error that is none of the file that could not be read."""

_OUT_OF = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of disk space is used up",
    errno.EROFS: "the file system can only be read",
    errno.EACCES: "writing there is not permitted",
    errno.EPERM: "writing there is not permitted",
    errno.EMFILE: "this process has as many files open as it may (ulimit -n)",
    errno.ENFILE: "the system has as many files open as it can",
}


class CorruptedFile(ValueError):
    """A file or checkpoint that is not what was written; `path` is the one."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{path}: {what}.")
        self.path = path


@contextlib.contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Say in a sentence what of the system keeps `path` from being written.

    Raises:
        OSError: the disk is full, cannot be written, or too many files are open; says that nothing is lost.
    """
    try:
        yield
    except Exception as error:  # Orbax and TensorStore wrap the system's errors in many types
        number = getattr(error, "errno", None)
        number = number or next((n for n in _OUT_OF if os.strerror(n).lower() in str(error).lower()), None)
        if number not in _OUT_OF:
            raise
        raise OSError(
            f"{path} could not be written: {_OUT_OF[number]}. What was finished before is whole; when that is mended, "
            "the same command goes on from there."
        ) from error


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep other runs out of a directory while the block runs; a process that ends in any way lets go of it.

    File systems that know no locks, as mounted buckets, are left unguarded.

    Raises:
        ValueError: another process holds it; names its host and number.
        OSError: it cannot be written.
    """
    with explain_os_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        opened = (directory / ".held").open("a+")
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ValueError(
                f"{directory}: another process is playing this run: {file.read().strip() or 'it does not say which'}. "
                "Wait until it is through, stop it, or choose another directory."
            ) from error
        except OSError:
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def is_corruption(error: Exception) -> bool:
    """Whether an error in reading says something of the file, rather than of memory, permissions or the network."""
    system = (errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.ENOMEM, errno.EIO)
    if isinstance(error, MemoryError) or getattr(error, "errno", None) in system:
        return False
    return not any(words in str(error).lower() for words in _NOT_DAMAGE)


def write_bytes(path: Path, content: bytes) -> None:
    """`replace` by the process that writes; the others leave it to that one."""
    if processes.is_main():
        replace(path, content)


def replace(path: Path, content: bytes) -> None:
    """Write aside, flush to the disk, rename."""
    write_partial(path, content)
    with explain_os_errors(path):
        os.replace(partial_path(path), path)


def write_partial(path: Path, content: bytes) -> None:
    """The first half of `replace`: the content beside its place, on the disk. Nothing half-written stays there."""
    aside = partial_path(path)
    try:
        with explain_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise


def partial_path(path: Path) -> Path:
    """Where a file is written before it is renamed."""
    return path.with_name(path.name + ".partial")


def append_lines(path: Path, lines: Sequence[str]) -> None:
    """Add whole lines to a process's own text file, flushed to the disk; a kill can cut the last one short."""
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write("".join(line + "\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())


def parse_json(content: str | bytes, where: object) -> Any:
    """What a text in JSON says.

    Raises:
        ValueError: it is not JSON, or nested too deeply to be read; names `where`.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error}).") from error


def write_json(path: Path, value: Any) -> None:
    """A JSON file with one trailing newline."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def write_json_lines(path: Path, records: Iterable[Any]) -> None:
    """A JSON line a record."""
    write_bytes(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """An .npz file of named arrays."""
    write_bytes(path, npz(**arrays))


def npz(**arrays: np.ndarray) -> bytes:
    """Named arrays as the content of an .npz file: the same bytes for the same arrays."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)  # type: ignore[arg-type] # numpy's stub takes names for options
    return buffer.getvalue()


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; pickled content is refused.

    Raises:
        CorruptedFile: its content cannot be read back.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # of zipfile, struct, numpy and the system
        if not is_corruption(error):
            raise
        raise CorruptedFile(path, f"the file is damaged ({type(error).__name__}: {error})") from error
