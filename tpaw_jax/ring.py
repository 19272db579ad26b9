"""The ring of historical policies on disk: Orbax checkpoints of the newest N_max rounds, and the training state.

Saves are atomic and asynchronous. What falls out of the ring is removed only after its successor is whole. Every
process saves and restores its own shards; process 0 removes.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import orbax.checkpoint as ocp
from jaxtyping import Array, PyTree

from tpaw_jax import pod, sharding
from tpaw_jax.types import TrainState


@dataclasses.dataclass(frozen=True)
class Ring:
    """Policies in `policies/00002`, the training state in `training/00002_00000040` (round, step)."""

    directory: Path
    n_max: int
    checkpointer: ocp.StandardCheckpointer

    @property
    def policies(self) -> list[int]:
        """The rounds whose policies are whole on disk, oldest first."""
        return sorted(int(path.name) for path in _whole(self.directory / "policies", r"\d{5}"))

    @property
    def training_states(self) -> list[tuple[int, int]]:
        """The (round, step) of the training states that are whole on disk, oldest first."""
        found = _whole(self.directory / "training", r"\d{5}_\d{8}")
        return sorted((int(path.name[:5]), int(path.name[6:])) for path in found)


def open_ring(directory: Path, n_max: int) -> Ring:
    """The ring of a run directory, which another process may be writing to."""
    for kind in ("policies", "training"):
        (directory / kind).mkdir(parents=True, exist_ok=True)
    return Ring(directory.absolute(), n_max, ocp.StandardCheckpointer())


def remove_unfinished(ring: Ring) -> None:
    """Remove what a killed run left half-written. For those that play it, all of them at once."""
    pod.meet("before removal")
    for kind in ("policies", "training") if pod.writes() else ():
        for path in (ring.directory / kind).iterdir():
            if path.is_dir() and not re.fullmatch(r"\d{5}|\d{5}_\d{8}", path.name):
                shutil.rmtree(path)
    pod.meet("after removal")


def push(ring: Ring, params: PyTree[Array], round_number: int) -> None:
    """Begin to save the policy that starts `round_number`; `settle` makes sure of it."""
    path = ring.directory / "policies" / f"{round_number:05d}"
    if not path.exists():
        ring.checkpointer.save(path, params)


def save_training(ring: Ring, state: TrainState, round_number: int, step: int) -> None:
    """Begin to save the training state, after the one before is whole."""
    settle(ring)
    path = ring.directory / "training" / f"{round_number:05d}_{step:08d}"
    if not path.exists():
        ring.checkpointer.save(path, state)


def settle(ring: Ring) -> None:
    """Wait until what was begun is whole, then remove what is no longer needed."""
    ring.checkpointer.wait_until_finished()
    pod.meet("checkpoints are whole")
    if pod.writes():
        policies, states = ring.policies, ring.training_states
        for old in policies[: -ring.n_max]:
            _remove(ring.directory / "policies" / f"{old:05d}")
        for round_number, step in states:
            if (round_number, step) != states[-1] or round_number < policies[-1]:
                _remove(ring.directory / "training" / f"{round_number:05d}_{step:08d}")
    pod.meet("old checkpoints are removed")


def restore_policy(ring: Ring, round_number: int, like: PyTree[Array]) -> PyTree[Array]:
    """The policy of a round, in the shapes, dtypes and shardings of `like`: any mesh will do.

    Raises:
        ValueError: it is damaged or of another model; names the checkpoint.
    """
    return _restore(ring, ring.directory / "policies" / f"{round_number:05d}", like)


def restore_training(ring: Ring, round_number: int, step: int, like: TrainState) -> TrainState:
    """The training state of (round, step), in the shapes and shardings of `like`."""
    return _restore(ring, ring.directory / "training" / f"{round_number:05d}_{step:08d}", like)


def players(ring: Ring, round_number: int) -> list[int]:
    """The main players of a round, newest first: fewer in the first rounds."""
    return [j for j in range(round_number, max(-1, round_number - ring.n_max), -1)]


def _remove(path: Path) -> None:
    """Rename, then delete, so that a kill in between leaves nothing that looks whole."""
    shutil.rmtree(path.rename(path.with_name(path.name + ".removed")))


def _restore(ring: Ring, path: Path, like: PyTree[Array]) -> PyTree[Array]:
    try:
        return ring.checkpointer.restore(path, sharding.abstract(like))
    except Exception as error:  # orbax and tensorstore raise many types; the user needs one sentence
        raise ValueError(f"{path}: the checkpoint cannot be read back ({type(error).__name__}: {error}).") from error


def _whole(directory: Path, pattern: str) -> list[Path]:
    """Orbax renames a checkpoint to its final name when it is complete."""
    return [path for path in directory.iterdir() if re.fullmatch(pattern, path.name)]
