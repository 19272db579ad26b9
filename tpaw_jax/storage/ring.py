"""The ring of historical policies on disk: Orbax checkpoints of the newest N_max rounds, and the training state.

Saves are atomic and asynchronous. What falls out of the ring is removed only after its successor is whole. Every
process saves and restores its own shards; process 0 removes. A checkpoint carries a digest of each of its arrays, taken
on the devices before it is written and again after it is read, on any mesh.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree, UInt32

from tpaw_jax.runtime import processes, sharding
from tpaw_jax.storage import files, journal
from tpaw_jax.storage.files import CorruptedFile
from tpaw_jax.storage.journal import Journal
from tpaw_jax.types import TrainState

_OTHER_MODEL = ("do not match", "not compatible with the stored shape")
"""Words of Orbax where a tree has other arrays, or others of their shapes, than the one that was saved."""

_ODD = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)
"""Primes that make the weights of a digest (those of xxHash)."""


@dataclasses.dataclass(frozen=True)
class Ring:
    """Policies in `policies/00002`, the training state in `training/00002_00000040` (round, step)."""

    directory: Path
    n_max: int
    checkpointer: ocp.StandardCheckpointer
    journal: Journal  # of the run, whose directory is the ring's parent
    pending: dict[Path, PyTree[Array]] = dataclasses.field(default_factory=dict)  # digests of what is being saved

    @property
    def policies(self) -> list[int]:
        """The rounds whose policies are whole on disk, oldest first."""
        return sorted(int(path.name) for path in _whole(self.directory / "policies", r"\d{5}"))

    @property
    def training_states(self) -> list[tuple[int, int]]:
        """The (round, step) of the training states that are whole on disk, oldest first."""
        found = _whole(self.directory / "training", r"\d{5}_\d{8}")
        return sorted((int(path.name[:5]), int(path.name[6:])) for path in found)


def open_ring(opened: Journal, n_max: int) -> Ring:
    """The ring of a run whose journal is open."""
    directory = opened.directory.absolute() / "ring"
    for kind in ("policies", "training"):
        with files.explain_os_errors(directory / kind):
            (directory / kind).mkdir(parents=True, exist_ok=True)
    return Ring(directory, n_max, ocp.StandardCheckpointer(), opened)


def remove_unfinished(ring: Ring) -> None:
    """Remove what a killed run left half-written, and what the journal does not have. What is damaged stays aside.

    For those that play the run, all of them at once.
    """
    processes.barrier("before removal")
    for kind in ("policies", "training") if processes.is_main() else ():
        for path in (ring.directory / kind).iterdir():
            if path.is_dir() and ".damaged" not in path.name and _name(ring, path) not in ring.journal.facts:
                shutil.rmtree(path)
    processes.barrier("after removal")


def push(ring: Ring, params: PyTree[Array], round_number: int) -> None:
    """Begin to save the policy that starts `round_number`; `finish_saves` makes sure of it."""
    _begin(ring, ring.directory / "policies" / f"{round_number:05d}", params)


def save_training(ring: Ring, state: TrainState, round_number: int, step: int) -> None:
    """Begin to save the training state, after the one before is whole."""
    finish_saves(ring)
    _begin(ring, ring.directory / "training" / f"{round_number:05d}_{step:08d}", state)


def finish_saves(ring: Ring) -> None:
    """Wait until what was begun is whole, put it into the journal, then remove what is no longer needed.

    Raises:
        OSError: it could not be written; what was there before is whole.
        RegeneratedDifferently: a policy that was lost came out otherwise.
    """
    with files.explain_os_errors(ring.directory):
        ring.checkpointer.wait_until_finished()
    processes.barrier("checkpoints are whole")
    changed = {_name(ring, path): _record(ring, path, digests) for path, digests in ring.pending.items()}
    ring.pending.clear()
    if processes.is_main():
        policies, states = ring.policies, ring.training_states
        for old in policies[: -ring.n_max]:
            _remove(ring, ring.directory / "policies" / f"{old:05d}")
        for round_number, step in states:
            if step != max(s for r, s in states if r == round_number) or round_number + 1 in policies:
                _remove(ring, ring.directory / "training" / f"{round_number:05d}_{step:08d}")
    processes.barrier("old checkpoints are removed")
    for name, later in changed.items():
        journal.raise_if_different(ring.journal, name, later)


def restore_policy(ring: Ring, round_number: int, like: PyTree[Array]) -> PyTree[Array]:
    """The policy of a round, in the shapes, dtypes and shardings of `like`: any mesh will do.

    Raises:
        CorruptedFile: it cannot be read back as it was written; names the checkpoint.
        ValueError: it is of another model.
        OSError: memory, permissions or the network are in the way.
    """
    return _restore(ring, ring.directory / "policies" / f"{round_number:05d}", like)


def restore_training(ring: Ring, round_number: int, step: int, like: TrainState) -> TrainState:
    """The training state of (round, step), in the shapes and shardings of `like`.

    Raises:
        CorruptedFile: it cannot be read back as it was written; names the checkpoint.
    """
    return _restore(ring, ring.directory / "training" / f"{round_number:05d}_{step:08d}", like)


def select_policy(ring: Ring, round_number: int | None) -> int:
    """The round of a policy that the ring holds: the one asked for, or the newest.

    Raises:
        ValueError: it is not in the ring.
    """
    there = ring.policies
    wanted = there[-1] if round_number is None and there else round_number
    if wanted not in there:
        raise ValueError(
            f"{ring.journal.directory}: the policy of round {wanted} is not in the ring; it holds {there}."
        )
    return wanted


def players(ring: Ring, round_number: int) -> list[int]:
    """The main players of a round, newest first: fewer in the first rounds."""
    return [j for j in range(round_number, max(-1, round_number - ring.n_max), -1)]


@jax.jit
def digests_of(tree: PyTree[Array]) -> PyTree[UInt32[Array, ""]]:
    """A digest of each array: the sum of its bits, each value's times an odd number of its place, modulo 2^32.

    One wrong value always changes it; sums of integers are the same on every mesh.
    """

    def of_array(x: Array) -> Array:
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
        weight = jnp.zeros(x.shape, jnp.uint32)
        for axis in range(x.ndim):
            place = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
            weight = weight * jnp.uint32(_ODD[axis % len(_ODD)]) + place
        return jnp.sum(bits * (2 * weight + 1), dtype=jnp.uint32)

    return jax.tree.map(of_array, tree)


def _begin(ring: Ring, path: Path, tree: PyTree[Array]) -> None:
    if not path.exists():
        journal.begin(ring.journal, _name(ring, path), *_place(path))
        ring.pending[path] = digests_of(tree)
        with files.explain_os_errors(path):
            ring.checkpointer.save(path, {"values": tree, "digests": ring.pending[path]})


def _record(ring: Ring, path: Path, digests: PyTree[Array]) -> list[str] | None:
    """Put a checkpoint that is whole into the journal (see `journal.record`)."""
    numbers = [int(number) for number in jax.device_get(jax.tree.leaves(digests))]
    files, size = journal.measure(path)
    stage, round_number = _place(path)
    facts = {
        "round": round_number,
        "stage": stage,
        "bytes": size,
        "files": files,
        "same": hashlib.sha256(np.asarray(numbers, np.uint32).tobytes()).hexdigest(),
    }
    return journal.record(ring.journal, _name(ring, path), facts)


def _place(path: Path) -> tuple[str, int]:
    """The stage that makes a checkpoint and its round: a policy is what the round before it has made."""
    number = int(path.name[:5])
    return ("training", number) if path.parent.name == "training" else ("policy", number - 1)


def _name(ring: Ring, path: Path) -> str:
    return f"ring/{path.relative_to(ring.directory).as_posix()}"


def _remove(ring: Ring, path: Path) -> None:
    """Forget, rename, then delete, so that a kill in between leaves nothing that looks whole."""
    journal.forget(ring.journal, _name(ring, path))
    shutil.rmtree(path.rename(path.with_name(path.name + ".removed")))


def _restore(ring: Ring, path: Path, like: PyTree[Array]) -> PyTree[Any]:
    abstract = sharding.abstract(like)
    place = jax.tree.leaves(abstract)[0].sharding
    if isinstance(place, NamedSharding):
        place = NamedSharding(place.mesh, P())
    scalars = jax.tree.map(lambda _: jax.ShapeDtypeStruct((), jnp.uint32, sharding=place), abstract)
    read, fault = None, ""
    try:
        read = ring.checkpointer.restore(path, {"values": abstract, "digests": scalars})
    except Exception as error:  # orbax and tensorstore raise many types; the user needs one sentence
        if not files.is_corruption(error):
            raise OSError(
                f"{path} could not be read and is left as it is ({type(error).__name__}: {error})."
            ) from error
        if any(words in str(error) for words in _OTHER_MODEL):
            raise ValueError(f"{path}: the checkpoint is of another model than policy.path's ({error}).") from error
        reason = str(error).strip().splitlines()[:1]
        fault = f"the checkpoint cannot be read back ({type(error).__name__}: {' '.join(reason)[:200]})"
    faults = [
        one["fault"].tobytes().decode() for one in processes.all_gather(fault=np.array(list(fault.encode()), np.uint8))
    ]
    if not any(faults):  # on no host
        assert read is not None
        now, then = jax.device_get((digests_of(read["values"]), read["digests"]))
        same = jax.tree.leaves_with_path(jax.tree.map(lambda a, b: int(a) == int(b), now, then))
        wrong = [jax.tree_util.keystr(leaf, simple=True, separator="/") for leaf, equal in same if not equal]
        if not wrong:
            if not ring.journal.is_complete(_name(ring, path)):  # a kill came before it was known to be whole
                journal.raise_if_different(ring.journal, _name(ring, path), _record(ring, path, read["digests"]))
            return read["values"]
        faults = [f"the checkpoint is damaged: {len(wrong)} arrays are not what was written, {wrong[0]} first"]
    raise CorruptedFile(path, next(filter(None, faults)))


def _whole(directory: Path, pattern: str) -> list[Path]:
    """Orbax renames a checkpoint to its final name when it is complete."""
    return [path for path in directory.iterdir() if re.fullmatch(pattern, path.name)]
