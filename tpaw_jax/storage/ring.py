"""The ring on disk: Orbax checkpoints of the policies of the newest N_max rounds, and of the training state.

Saves are asynchronous and atomic: Orbax renames a complete checkpoint, or in a bucket writes an object that says so. An
old checkpoint is removed only after its successor is complete. Every process saves and restores its own shards; process
0 removes. A checkpoint holds a digest of each of its arrays, computed on the devices before writing and compared after
reading, on any mesh.
"""

import dataclasses
import hashlib
import re
import shutil
import time
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
from tpaw_jax.storage import bucket, files, journal
from tpaw_jax.storage.files import CorruptedFile
from tpaw_jax.storage.journal import Journal
from tpaw_jax.types import TrainState

_OTHER_MODEL = ("do not match", "not compatible with the stored shape")
"""Parts of Orbax's messages when the saved tree has other arrays or shapes than the requested one."""

_PRIMES = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)
"""The primes of xxHash, from which the weights of a digest are computed."""


SECONDS_BEFORE_READING_AGAIN = 5.0
"""Before a checkpoint in a bucket that could not be read counts as damaged, it is read again."""


@dataclasses.dataclass(frozen=True)
class Ring:
    """The policy of round 2 is `policies/00002`; its training state at step 40 is `training/00002_00000040`."""

    directory: Path
    n_max: int
    checkpointer: ocp.StandardCheckpointer
    journal: Journal
    pending: dict[Path, PyTree[Array]] = dataclasses.field(
        default_factory=dict
    )  # digests of the checkpoints being saved

    @property
    def policies(self) -> list[int]:
        """The rounds whose policies are complete on disk, oldest first."""
        return sorted(int(path.name) for path in _complete(self.directory / "policies", r"\d{5}"))

    @property
    def training_states(self) -> list[tuple[int, int]]:
        """The (round, step) of the training states that are complete on disk, oldest first."""
        paths = _complete(self.directory / "training", r"\d{5}_\d{8}")
        return sorted((int(path.name[:5]), int(path.name[6:])) for path in paths)


def open_ring(opened: Journal, n_max: int) -> Ring:
    """Open the ring of a run, in the folder `ring` beside its journal."""
    directory = bucket.absolute(opened.directory) / "ring"
    for kind in ("policies", "training") if not bucket.is_remote(directory) else ():
        with files.explain_errors(directory / kind):
            (directory / kind).mkdir(parents=True, exist_ok=True)
    return Ring(directory, n_max, ocp.StandardCheckpointer(), opened)


def remove_unfinished(ring: Ring) -> None:
    """Remove incomplete checkpoints and those that the journal does not list, except `*.damaged`.

    All processes of a pod must call this together; a process that only reads the run must not call it.
    """
    processes.barrier("before removal")
    for kind in ("policies", "training") if processes.is_main() else ():
        for path in _children(ring.directory / kind):
            unlisted = _name(ring, path) not in ring.journal.facts
            incomplete = bucket.is_remote(path) and not bucket.is_committed(path)
            if ".damaged" not in path.name and (unlisted or incomplete):
                bucket.remove_tree(path) if bucket.is_remote(path) else shutil.rmtree(path)
    processes.barrier("after removal")


def push(ring: Ring, params: PyTree[Array], round_number: int) -> None:
    """Start saving the policy that round `round_number` starts from; `finish_saves` completes it."""
    _start_save(ring, _policy_path(ring, round_number), params)


def save_training(ring: Ring, state: TrainState, round_number: int, step: int) -> None:
    """Start saving the training state, after completing earlier saves."""
    finish_saves(ring)
    _start_save(ring, _training_path(ring, round_number, step), state)


def finish_saves(ring: Ring) -> None:
    """Wait for the saves in progress, add them to the journal, then remove old checkpoints.

    Raises:
        OSError: a checkpoint could not be written; earlier ones are intact.
        RegeneratedDifferently: a lost policy was regenerated with another result.
    """
    with files.explain_errors(ring.directory):
        ring.checkpointer.wait_until_finished()
    processes.barrier("checkpoints are complete")
    removed_after = {_name(ring, path): _record(ring, path, digests) for path, digests in ring.pending.items()}
    ring.pending.clear()
    if processes.is_main():
        policies, states = ring.policies, ring.training_states
        for old in policies[: -ring.n_max]:
            _remove(ring, _policy_path(ring, old))
        for round_number, step in states:
            if step != max(s for r, s in states if r == round_number) or round_number + 1 in policies:
                _remove(ring, _training_path(ring, round_number, step))
    processes.barrier("old checkpoints are removed")
    for name, removed in removed_after.items():
        journal.raise_if_different(ring.journal, name, removed)


def restore_policy(ring: Ring, round_number: int, like: PyTree[Array]) -> PyTree[Array]:
    """Read the policy of a round with the shapes, dtypes and shardings of `like`, on any mesh.

    Raises:
        CorruptedFile: it cannot be read, or a value differs from what was written.
        ValueError: it belongs to another model.
        OSError: it cannot be read for lack of memory or permission, or because of the network.
    """
    return _restore(ring, _policy_path(ring, round_number), like)


def restore_training(ring: Ring, round_number: int, step: int, like: TrainState) -> TrainState:
    """Read the training state of (round, step) with the shapes, dtypes and shardings of `like`.

    Raises:
        CorruptedFile, ValueError, OSError: as in `restore_policy`.
    """
    return _restore(ring, _training_path(ring, round_number, step), like)


def select_policy(ring: Ring, round_number: int | None) -> int:
    """`round_number` if the ring holds that round's policy; the newest round it holds if None.

    Raises:
        ValueError: the ring does not hold it.
    """
    available = ring.policies
    if round_number is None and not available:
        raise ValueError(f"{ring.journal.directory}: the ring holds no policy yet.")
    selected = available[-1] if round_number is None else round_number
    if selected not in available:
        raise ValueError(
            f"{ring.journal.directory}: the policy of round {selected} is not in the ring; it holds {available}."
        )
    return selected


@jax.jit
def digests_of(tree: PyTree[Array]) -> PyTree[UInt32[Array, ""]]:
    """A digest of each array: the weighted sum of its values' bits modulo 2^32, with an odd weight for each position.

    A change of a single value always changes it. Integer sums are the same on every mesh.
    """

    def digest(x: Array) -> Array:
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
        weight = jnp.zeros(x.shape, jnp.uint32)
        for axis in range(x.ndim):
            position = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
            weight = weight * jnp.uint32(_PRIMES[axis % len(_PRIMES)]) + position
        return jnp.sum(bits * (2 * weight + 1), dtype=jnp.uint32)

    return jax.tree.map(digest, tree)


def fingerprint(tree: PyTree[Array]) -> str:
    """A digest of all arrays of a tree."""
    return _joined(digests_of(tree))


def _joined(digests: PyTree[Array]) -> str:
    numbers = [int(number) for number in jax.device_get(jax.tree.leaves(digests))]
    return hashlib.sha256(np.asarray(numbers, np.uint32).tobytes()).hexdigest()


def _policy_path(ring: Ring, round_number: int) -> Path:
    return ring.directory / "policies" / f"{round_number:05d}"


def _training_path(ring: Ring, round_number: int, step: int) -> Path:
    return ring.directory / "training" / f"{round_number:05d}_{step:08d}"


def _start_save(ring: Ring, path: Path, tree: PyTree[Array]) -> None:
    if path not in _complete(path.parent, re.escape(path.name)):
        journal.begin(ring.journal, _name(ring, path), *_stage_and_round(path))
        ring.pending[path] = digests_of(tree)
        with files.explain_errors(path):
            ring.checkpointer.save(path, {"values": tree, "digests": ring.pending[path]})


def _record(ring: Ring, path: Path, digests: PyTree[Array]) -> list[str] | None:
    """Add a complete checkpoint to the journal (see `journal.record`)."""
    count, size = journal.measure(path)
    stage, round_number = _stage_and_round(path)
    facts = {
        "round": round_number,
        "stage": stage,
        "bytes": size,
        "files": count,
        "same": _joined(digests),
    }
    return journal.record(ring.journal, _name(ring, path), facts)


def _stage_and_round(path: Path) -> tuple[str, int]:
    """The stage and round that made a checkpoint. The policy of round t was made by round t - 1."""
    number = int(path.name[:5])
    return ("training", number) if path.parent.name == "training" else ("policy", number - 1)


def _name(ring: Ring, path: Path) -> str:
    """The name of a checkpoint in the journal."""
    return f"ring/{path.relative_to(ring.directory).as_posix()}"


def _remove(ring: Ring, path: Path) -> None:
    """Forget, then delete, so that a kill in between leaves none that is listed but incomplete."""
    journal.forget(ring.journal, _name(ring, path))
    files.remove_tree(path)


def _restore(ring: Ring, path: Path, like: PyTree[Array]) -> PyTree[Any]:
    read, faults = _read_by_all(ring, path, like)
    if any(faults) and bucket.is_remote(path):  # gcsfs takes some failed requests for absent objects
        time.sleep(SECONDS_BEFORE_READING_AGAIN)
        read, faults = _read_by_all(ring, path, like)
    if not any(faults):
        assert read is not None
        now, written = jax.device_get((digests_of(read["values"]), read["digests"]))
        same = jax.tree.leaves_with_path(jax.tree.map(lambda a, b: int(a) == int(b), now, written))
        wrong = [jax.tree_util.keystr(leaf, simple=True, separator="/") for leaf, equal in same if not equal]
        if not wrong:
            listed = ring.journal.read_only or ring.journal.is_complete(_name(ring, path))
            if not listed:  # a kill came before the journal listed it as complete
                journal.raise_if_different(ring.journal, _name(ring, path), _record(ring, path, read["digests"]))
            return read["values"]
        faults = [
            f"the checkpoint is damaged: {len(wrong)} arrays differ from what was written, the first is {wrong[0]}"
        ]
    raise CorruptedFile(path, next(filter(None, faults)))


def _read_by_all(ring: Ring, path: Path, like: PyTree[Array]) -> tuple[dict[str, PyTree[Any]] | None, list[str]]:
    """What this process read, and the faults of all processes, each empty if there was none."""
    read, fault = _try_to_read(ring, path, sharding.abstract(like))
    gathered = processes.all_gather(fault=np.array(list(fault.encode()), np.uint8))
    return read, [one["fault"].tobytes().decode() for one in gathered]


def _try_to_read(ring: Ring, path: Path, abstract: PyTree[Any]) -> tuple[dict[str, PyTree[Any]] | None, str]:
    """The values and digests of a checkpoint, or None and what is wrong if it is corrupted.

    Raises:
        ValueError: it belongs to another model.
        OSError: it cannot be read for lack of memory or permission, or because of the network.
    """
    placement = jax.tree.leaves(abstract)[0].sharding
    if isinstance(placement, NamedSharding):
        placement = NamedSharding(placement.mesh, P())
    digests = jax.tree.map(lambda _: jax.ShapeDtypeStruct((), jnp.uint32, sharding=placement), abstract)
    try:
        return ring.checkpointer.restore(path, {"values": abstract, "digests": digests}), ""
    except Exception as error:  # Orbax and TensorStore raise many types
        if bucket.is_remote(path) and not files.is_corruption(error, path):
            raise bucket.BucketError(path, error) from error
        if not files.is_corruption(error, path):
            raise OSError(
                f"{path} could not be read and was left as it is ({type(error).__name__}: {error}). Fix the cause, "
                "then run the same command again."
            ) from error
        if any(words in str(error) for words in _OTHER_MODEL):
            raise ValueError(
                f"{path}: the checkpoint belongs to another model than the one at policy.path, or to other adapters "
                f"than policy.lora describes ({error})."
            ) from error
        reason = str(error).strip().splitlines()[:1]
        return None, f"the checkpoint cannot be read ({type(error).__name__}: {' '.join(reason)[:200]})"


def _complete(directory: Path, pattern: str) -> list[Path]:
    """The checkpoints in a directory that Orbax has marked as complete."""
    found = [path for path in _children(directory) if re.fullmatch(pattern, path.name)]
    return [path for path in found if bucket.is_committed(path)] if bucket.is_remote(directory) else found


def _children(directory: Path) -> list[Path]:
    if bucket.is_remote(directory):
        return bucket.children(directory)
    return [path for path in directory.iterdir() if path.is_dir()]
