"""Files that appear whole or not at all. Of several processes the first one writes them."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tpaw_jax import pod


@contextlib.contextmanager
def held(directory: Path) -> Iterator[None]:
    """Keep other runs out of a directory while the block runs; a process that ends in any way lets go of it.

    File systems that know no locks, as mounted buckets, are left unguarded.

    Raises:
        ValueError: another process holds it; names its host and number.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".held").open("a+") as file:
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


def write_bytes(path: Path, content: bytes) -> None:
    """`replace` by the process that writes; the others leave it to that one."""
    if pod.writes():
        replace(path, content)


def replace(path: Path, content: bytes) -> None:
    """Write aside, flush to the disk, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".partial")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def append_lines(path: Path, lines: Sequence[str]) -> None:
    """Add whole lines to a process's own text file, flushed to the disk; a kill can cut the last one short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write("".join(line + "\n" for line in lines).encode())
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """A JSON file with one trailing newline."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """An .npz file of named arrays."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)  # type: ignore[arg-type] # numpy's stub takes names for options
    write_bytes(path, buffer.getvalue())


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; pickled content is refused.

    Raises:
        ValueError: the file is damaged; names it.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # zipfile, struct, numpy and OS errors alike mean a damaged file
        raise ValueError(
            f"{path}: the file is damaged ({type(error).__name__}: {error}); delete it, and it is made again."
        ) from error
