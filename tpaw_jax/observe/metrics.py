"""metrics.jsonl, one record per step, and the same numbers in TensorBoard."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tpaw_jax.runtime import processes
from tpaw_jax.storage import files


@dataclasses.dataclass(frozen=True)
class MetricsLog:
    """Appends records to metrics.jsonl and, if it is on, to TensorBoard."""

    path: Path
    tensorboard: Any = None

    def write(self, **record: Any) -> None:
        """Append one record; numbers also become TensorBoard scalars over the round's steps."""
        if not processes.is_main():
            return
        with files.explain_os_errors(self.path), self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if self.tensorboard is not None and "step" in record:
            for name, value in record.items():
                if isinstance(value, float):
                    self.tensorboard.add_scalar(f"round_{record['round']}/{name}", value, record["step"])

    def close(self) -> None:
        """Write what TensorBoard still buffers."""
        if self.tensorboard is not None:
            self.tensorboard.close()


def open_metrics(directory: Path, round_number: int, step: int, tensorboard: bool) -> MetricsLog:
    """The log of a run that resumes at (round, step): drops the round's records from there on, and corrupted lines.

    Raises:
        ImportError: TensorBoard is on and tensorboardX is not installed.
    """
    path = directory / "metrics.jsonl"
    if path.exists():
        kept = [r for r in _records(path) if r["round"] != round_number or r.get("step", -1) < step]
        files.write_bytes(path, "".join(json.dumps(r) + "\n" for r in kept).encode())
    if not tensorboard or not processes.is_main():
        return MetricsLog(path)
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError("tensorboard: true needs tensorboardX; pip install 'tpaw_jax[tensorboard]'.") from error
    return MetricsLog(path, SummaryWriter(str(directory / "tensorboard")))


def read_metrics(directory: Path, round_number: int) -> list[dict[str, float]]:
    """The step records of a round."""
    return [record for record in _records(directory / "metrics.jsonl") if record["round"] == round_number]


def step_record(metrics: dict[str, Any], players: Sequence[int]) -> dict[str, float]:
    """Step metrics as floats. Per-player metrics are named by the player's round; missing players are left out."""
    record: dict[str, float] = {}
    for name, value in metrics.items():
        value = np.asarray(value)
        if name.startswith("player/"):
            metric = name.removeprefix("player/")
            record |= {f"player_{j}/{metric}": float(value[i]) for i, j in enumerate(players)}
        else:
            record[name] = float(value)
    return record


def _records(path: Path) -> list[dict[str, Any]]:
    """The records of a log; a line that a kill cut short is ignored."""
    found = []
    for line in path.read_bytes().splitlines():
        try:
            record = files.parse_json(line, path)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("round"), int):
            found.append(record)
    return found
