"""Run directories on Cloud Storage, `gs://bucket/run`.

Objects are whole or absent. The journal is replaced only if nobody else has replaced it since it was read (`replace`).
Paths are those of etils.epath, as in Orbax, over gcsfs; conditional writes go through TensorStore.
"""

import contextlib
import functools
import importlib.util
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import jax
import tensorstore
from etils import epath
from etils.epath import backend

Generation = bytes
"""Which version of an object it is, as TensorStore tells."""

_COMMITTED = "commit_success.txt"
"""Orbax writes this object last; a checkpoint without it is incomplete."""

_STATUS = re.compile(
    r"\b(ABORTED|CANCELLED|DEADLINE_EXCEEDED|INTERNAL|PERMISSION_DENIED|RESOURCE_EXHAUSTED|UNAUTHENTICATED|UNAVAILABLE|"
    r"UNKNOWN)\b|retry attempts|CURL error"
)
"""What TensorStore says, mostly in a ValueError, when a request failed."""

_CLIENTS = ("aiohttp", "gcsfs", "google", "requests", "urllib3")
"""The packages that send requests."""

_REFUSED = re.compile(r"forbidden|permission|denied|unauthenticated|credentials|not_found|does not exist", re.I)
"""What errors say that will not go away by themselves."""


class BucketError(OSError):
    """A bucket could not be used, whatever it holds."""

    def __init__(self, path: Path, error: BaseException) -> None:
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        self.passes = not _REFUSED.search(f"{reason} {type(error).__name__}")  # may pass by itself
        super().__init__(
            f"{path}: the bucket could not be used ({type(error).__name__}: {reason}). Check that it exists, that this "
            "host's account may read and write its objects, and the network. All finished work is intact: run the same "
            "command again to resume."
        )


def open_path(path: str) -> Path:
    """A path of a run: local, or an object or prefix of a bucket.

    Raises:
        ImportError: gcsfs is not installed.
        ValueError: the scheme is not `gs://`, or the name has characters that patterns and URLs use.
    """
    scheme, separator, name = path.partition("://")
    if not separator:
        return Path(path)
    if scheme != "gs":
        raise ValueError(
            f"{path}: a run's directory is local or on Cloud Storage (gs://); Orbax writes checkpoints to no other "
            "object store. Mount the bucket as a file system and name the mount."
        )
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)+/?", name):
        raise ValueError(
            f"{path}: name a bucket and a directory, gs://BUCKET/RUN, in letters, digits and the characters . _ - /."
        )
    if importlib.util.find_spec("gcsfs") is None:
        raise ImportError(f"{path} needs gcsfs; pip install 'tpaw_jax[gcs]'.")
    # The bucket's type would be asked for with every operation, by another API that an account may not have.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    os.environ.setdefault("EPATH_USE_TF", "false")  # its file system is slower and has other errors
    import fsspec.config

    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False  # other processes write here too
    logging.getLogger("gcsfs").setLevel(logging.ERROR)
    return cast(Path, epath.Path(path.rstrip("/")))  # `stat`, `absolute` and `rglob` differ from pathlib's


def is_remote(path: Path) -> bool:
    """Whether the path is in a bucket."""
    return not isinstance(path, Path)


def absolute(path: Path) -> Path:
    """The path from the root of the file system or bucket."""
    return path if is_remote(path) else path.absolute()


@contextlib.contextmanager
def explain_errors(path: Path, reason: Callable[[BaseException], bool] | None = None) -> Iterator[None]:
    """Turn the many errors of failed requests into one sentence; `reason` tells which they are, by default `is_outage`.

    Raises:
        BucketError: the bucket cannot be reached, does not exist, or may not be used.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, BucketError) or not (reason or is_outage)(error):
            raise
        raise BucketError(path, error) from error


def is_outage(error: BaseException | None) -> bool:
    """Whether an error of reading or writing a bucket comes from a request that failed.

    Then it says nothing of what the bucket holds.
    """
    while error is not None and not isinstance(error, jax.errors.JaxRuntimeError):
        if is_of_request(error) or isinstance(error, OSError):
            return not isinstance(error, FileNotFoundError)
        if _STATUS.search(str(error)):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def is_of_request(error: BaseException) -> bool:
    """Whether an error is one of the clients that send requests, whatever was read or written."""
    package = type(error).__module__.partition(".")[0]
    return package in _CLIENTS or isinstance(error, ConnectionError | TimeoutError)


def sizes(path: Path) -> dict[str, int]:
    """The bytes of all objects below a path, by their path relative to it."""
    root = os.fspath(path).removeprefix("gs://") + "/"
    with explain_errors(path):
        found = _file_system(path).find(os.fspath(path), detail=True)
    return {name.removeprefix(root): facts["size"] for name, facts in found.items() if name.startswith(root)}


def children(path: Path) -> list[Path]:
    """What is directly below a path; nothing if there are no objects."""
    with explain_errors(path):
        try:
            return list(path.iterdir())
        except FileNotFoundError:
            return []


def move(path: Path, new: Path) -> None:
    """Move an object, or all objects below a path."""
    with explain_errors(path):
        for name in sizes(path) or [""]:
            source, target = (os.fspath(p / name if name else p) for p in (path, new))
            try:
                _file_system(path).mv(source, target)
            except FileNotFoundError:  # a move that was answered too late, and repeated
                if not _file_system(path).exists(target):
                    raise


def remove_tree(path: Path) -> None:
    """Remove all objects below a path; of a checkpoint, first the one that says that it is complete."""
    with explain_errors(path), contextlib.suppress(FileNotFoundError):
        (path / _COMMITTED).unlink(missing_ok=True)
        cast(epath.Path, path).rmtree()


def is_committed(checkpoint: Path) -> bool:
    """Whether a checkpoint is complete."""
    return read(checkpoint / _COMMITTED)[0] is not None


def read(path: Path, store: tensorstore.KvStore | None = None) -> tuple[bytes | None, Generation]:
    """The content of an object, None if it is absent, and its generation for `replace`.

    Raises:
        BucketError: the bucket cannot be used.
    """
    try:
        found = (store or _store(path)).read(path.name).result()
    except Exception as error:  # mostly ValueError, for all reasons
        raise BucketError(path, error) from error
    return (None if found.state == "missing" else bytes(found.value)), found.stamp.generation


def replace(
    path: Path, content: bytes | None, generation: Generation, store: tensorstore.KvStore | None = None
) -> Generation | None:
    """Write an object, or remove it if `content` is None, if it still has the given generation.

    Returns its new generation, or None if another process has written or removed it.

    Raises:
        BucketError: the bucket cannot be used.
    """
    try:
        written = (store or _store(path)).write(path.name, content, if_equal=generation).result()
    except Exception as error:
        raise BucketError(path, error) from error
    if written.generation:
        return written.generation
    now, generation = read(path, store)  # a write that was answered too late, and repeated, meets itself
    return generation if now == content else None


def open_store(directory: Path, retries: int, seconds: float) -> tensorstore.KvStore:
    """The objects of a directory, for `read` and `replace`, with fewer retries than usual, `seconds` apart at most."""
    bucket, _, prefix = os.fspath(directory).removeprefix("gs://").partition("/")
    limits = {"max_retries": retries, "initial_delay": "0.5s", "max_delay": f"{seconds}s"}
    context = {"gcs_request_retries": limits}
    return tensorstore.KvStore.open(
        {"driver": "gcs", "bucket": bucket, "path": f"{prefix}/", "context": context}
    ).result()


def _file_system(path: Path) -> Any:
    return backend.fsspec_backend.fs(os.fspath(path))


@functools.lru_cache(maxsize=16)
def _open_store(directory: Path) -> tensorstore.KvStore:
    return open_store(directory, retries=10, seconds=16)


def _store(path: Path) -> tensorstore.KvStore:
    return _open_store(path.parent)
