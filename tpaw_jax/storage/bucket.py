"""Run directories on Cloud Storage, `gs://bucket/run`.

Objects are whole or absent, so nothing is renamed or flushed here. A file under a final name counts once the journal
lists it, and the journal is replaced only if nobody else has replaced it since it was read (`replace`). Paths are those
of etils.epath, as in Orbax, over gcsfs; conditional writes go through TensorStore.
"""

import functools
import importlib.util
import logging
import os
from pathlib import Path
from typing import Any, cast

import tensorstore
from etils import epath
from etils.epath import backend

Generation = bytes
"""Which version of an object it is, as TensorStore tells."""

_COMMITTED = "commit_success.txt"
"""Orbax writes this object last; a checkpoint without it is incomplete."""


def open_path(path: str) -> Path:
    """A path of a run: local, or an object or prefix of a bucket.

    Raises:
        ImportError: gcsfs is not installed.
        ValueError: the scheme is not `gs://`.
    """
    scheme, separator, _ = path.partition("://")
    if not separator:
        return Path(path)
    if scheme != "gs":
        raise ValueError(
            f"{path}: a run's directory is local or on Cloud Storage (gs://); Orbax writes checkpoints to no other "
            "object store. Mount the bucket as a file system and name the mount."
        )
    if importlib.util.find_spec("gcsfs") is None:
        raise ImportError(f"{path} needs gcsfs; pip install 'tpaw_jax[gcs]'.")
    import fsspec.config

    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False  # other processes write here too
    logging.getLogger("gcsfs").setLevel(logging.ERROR)
    return cast(Path, epath.Path(path.rstrip("/")))  # has what pathlib.Path has, but for `stat` and `absolute`


def is_remote(path: Path) -> bool:
    """Whether the path is in a bucket."""
    return not isinstance(path, Path)


def absolute(path: Path) -> Path:
    """The path from the root of the file system or bucket."""
    return path if is_remote(path) else path.absolute()


def sizes(path: Path) -> dict[str, int]:
    """The bytes of all objects below a path, by their path relative to it."""
    root = os.fspath(path).removeprefix("gs://") + "/"
    found = _file_system(path).find(os.fspath(path), detail=True)
    return {name.removeprefix(root): facts["size"] for name, facts in found.items()}


def move(path: Path, new: Path) -> None:
    """Move an object, or all objects below a path."""
    for name in sizes(path) if path.is_dir() else [""]:
        _file_system(path).mv(os.fspath(path / name), os.fspath(new / name))


def remove_tree(path: Path) -> None:
    """Remove all objects below a path; of a checkpoint, first the one that says that it is complete."""
    (path / _COMMITTED).unlink(missing_ok=True)
    if path.exists():
        cast(epath.Path, path).rmtree()


def is_committed(checkpoint: Path) -> bool:
    """Whether a checkpoint is complete."""
    return (checkpoint / _COMMITTED).exists()


def read(path: Path) -> tuple[bytes | None, Generation]:
    """The content of an object, None if it is absent, and its generation for `replace`."""
    found = _store(path).read(path.name).result()
    return (None if found.state == "missing" else bytes(found.value)), found.stamp.generation


def replace(path: Path, content: bytes | None, generation: Generation) -> Generation | None:
    """Write an object, or remove it if `content` is None, if it still has the given generation.

    Returns its new generation, or None if another process has written or removed it.
    """
    written = _store(path).write(path.name, content, if_equal=generation).result()
    if written.generation:
        return written.generation
    now, generation = read(path)  # a write that was answered too late, and repeated, meets itself
    return generation if now == content else None


def _file_system(path: Path) -> Any:
    return backend.fsspec_backend.fs(os.fspath(path))


@functools.lru_cache(maxsize=16)
def _open_store(directory: str) -> tensorstore.KvStore:
    return tensorstore.KvStore.open(directory + "/").result()


def _store(path: Path) -> tensorstore.KvStore:
    return _open_store(os.fspath(path.parent))
