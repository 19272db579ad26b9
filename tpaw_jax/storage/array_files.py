"""Arrays in .npz files, and arrays too large for memory in temporary files.

An array of `LARGE` bytes or more lies in an unnamed file of the temporary directory (TMPDIR) and is mapped into memory,
so the system keeps as much of it in memory as fits. It is a copy, which a change of the original cannot damage.
"""

import contextlib
import hashlib
import io
import mmap
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from tpaw_jax.runtime import processes
from tpaw_jax.storage import bucket, files

LARGE = 64 * 2**20
"""Bytes from which on an array is not held in memory."""

_CHUNK = 16 * 2**20
"""Bytes that are copied at a time."""


class Spool:
    """An array that grows at its end."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = np.dtype(dtype)
        self._file = tempfile.SpooledTemporaryFile(LARGE, prefix="tpaw-")  # noqa: SIM115

    def append(self, values: np.ndarray) -> None:
        """Add values at the end.

        Raises:
            OSError: the temporary directory cannot be written.
        """
        step = _CHUNK // self.dtype.itemsize
        for first in range(0, len(values), step):
            self._write(np.ascontiguousarray(values[first : first + step], self.dtype).data.cast("B"))

    def append_stream(self, stream: IO[bytes]) -> None:
        """Add the rest of a stream of bytes at the end.

        Raises:
            OSError: the temporary directory cannot be written.
        """
        while some := stream.read(_CHUNK):
            self._write(some)

    def array(self) -> np.ndarray:
        """The whole array, read-only. Nothing can be added any more."""
        with self._file as file:
            with _explain_errors():
                file.flush()
            if file.tell() < LARGE:
                file.seek(0)
                return np.frombuffer(file.read(), self.dtype)
            return np.frombuffer(_mapped(file), self.dtype)

    def _write(self, some: bytes | memoryview) -> None:
        with _explain_errors():
            self._file.write(some)


def join(parts: Iterable[np.ndarray], dtype: Any) -> np.ndarray:
    """A copy of some arrays, end to end, which is in a temporary file if it is large.

    Raises:
        OSError: the temporary directory cannot be written.
    """
    spool = Spool(dtype)
    for part in parts:
        spool.append(part)
    return spool.array()


def write(path: Path, **arrays: np.ndarray) -> None:
    """Write an .npz file of named arrays, on process 0 only."""
    if processes.is_main():
        replace(path, **arrays)


def replace(path: Path, **arrays: np.ndarray) -> None:
    """Write an .npz file of named arrays atomically, on any process."""
    write_partial(path, **arrays)
    files.finish_partial(path)


def write_partial(path: Path, **arrays: np.ndarray) -> tuple[int, str]:
    """The first half of `replace`, as `files.write_partial`. Returns the file's bytes and SHA-256."""
    if bucket.is_remote(path):
        content = npz(**arrays)
        files.write_partial(path, content)
        return len(content), hashlib.sha256(content).hexdigest()
    digests: list[_Digest] = []

    def write_to(file: IO[bytes]) -> None:
        digests.append(_Digest(file))
        _save(digests[0], arrays)

    files.write_partial(path, write_to)
    return digests[0].size, digests[0].sha256.hexdigest()


class _Digest:
    """A file that can only be written, and the bytes and checksum of what was written."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.size, self.sha256 = file, 0, hashlib.sha256()

    def write(self, some: bytes) -> int:
        self.size += len(some)
        self.sha256.update(some)
        return self.file.write(some)

    def flush(self) -> None:
        self.file.flush()

    def read(self) -> bytes:  # numpy takes an object with this method for a file
        raise OSError("this file can only be written")


def npz(**arrays: np.ndarray) -> memoryview:
    """Encode named arrays as an .npz file; equal arrays give equal bytes."""
    large = sum(values.nbytes for values in arrays.values()) >= LARGE
    with _explain_errors(), tempfile.TemporaryFile(prefix="tpaw-") if large else io.BytesIO() as file:
        _save(file, arrays)
        file.flush()
        return memoryview(_mapped(file) if large else file.getvalue())  # type: ignore[union-attr]


def read(path: Path, *names: str, into: Mapping[str, Spool] | None = None) -> dict[str, np.ndarray]:
    """Read the named arrays of an .npz file, by default all. Pickled content is rejected.

    The arrays named in `into` are appended to its spools and not returned.

    Raises:
        CorruptedFile: the content cannot be read.
    """
    spools = into or {}
    try:
        with _open(path) as stream, zipfile.ZipFile(stream) as archive:
            names = names or tuple(name.removesuffix(".npy") for name in archive.namelist())
            for name, spool in spools.items():
                _append_member(archive, name, spool)
            return {name: _read_member(archive, name) for name in names if name not in spools}
    except Exception as error:  # zipfile, struct, numpy and the system raise many types
        if not files.is_corruption(error, path):
            raise
        raise files.CorruptedFile(path, f"the file is damaged ({type(error).__name__}: {error})") from error


def _read_member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    member = archive.getinfo(f"{name}.npy")
    with archive.open(member) as stream:
        if member.file_size < LARGE:
            return npy.read_array(stream, allow_pickle=False)
        shape, in_columns, dtype = _read_header(stream)
        if dtype.hasobject:
            raise ValueError(f"{name} holds Python objects")
        spool = Spool(dtype)
        spool.append_stream(stream)
    return spool.array().reshape(shape, order="F" if in_columns else "C")


def _append_member(archive: zipfile.ZipFile, name: str, spool: Spool) -> None:
    with archive.open(f"{name}.npy") as stream:
        dtype = _read_header(stream)[-1]
        if dtype != spool.dtype:
            raise ValueError(f"{name} holds {dtype}, not {spool.dtype}")
        spool.append_stream(stream)


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    read_header = npy.read_array_header_1_0 if npy.read_magic(stream) == (1, 0) else npy.read_array_header_2_0
    return read_header(stream)


def _save(file: Any, arrays: Mapping[str, np.ndarray]) -> None:
    np.savez(file, allow_pickle=False, **arrays)  # type: ignore[arg-type] # numpy's stub takes names for options


def _open(path: Path) -> IO[bytes]:
    if not bucket.is_remote(path):
        return path.open("rb")
    with bucket.explain_errors(path):
        if files.size(path) < LARGE:
            return io.BytesIO(path.read_bytes())
        stream = path.open("rb")
    with stream:
        copy = tempfile.TemporaryFile(prefix="tpaw-")  # noqa: SIM115
        while True:
            with bucket.explain_errors(path):
                some = stream.read(_CHUNK)
            if not some:
                break
            with _explain_errors():
                copy.write(some)
    copy.seek(0)
    return copy


def _mapped(file: Any) -> mmap.mmap:
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


@contextlib.contextmanager
def _explain_errors() -> Iterator[None]:
    with files.explain_errors(Path(tempfile.gettempdir())):
        yield
