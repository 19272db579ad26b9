"""metrics.jsonl, one record per step, and the same numbers in the run's trackers."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tpaw_jax.observe.trackers import Tracker, grouped
from tpaw_jax.runtime import processes
from tpaw_jax.storage import files


@dataclasses.dataclass(frozen=True)
class MetricsLog:
    """Appends records to metrics.jsonl and logs them to trackers."""

    file: files.LineLog
    trackers: Sequence[Tracker] = ()
    steps_before: int = 0  # of earlier rounds
    lost_seconds: float = 0.0  # of steps that were logged, but whose state was not saved

    def write(self, **record: Any) -> None:
        """Append the record of a step; trackers count its step over all rounds."""
        if not processes.is_main():
            return
        self.file.write(json.dumps(record))
        for tracker in self.trackers:
            tracker.log(grouped(record), self.steps_before + record["step"])

    def flush(self) -> None:
        """Write what a bucket has not got yet."""
        if processes.is_main():
            self.file.flush()


def open_metrics(directory: Path, round_number: int, step: int, trackers: Sequence[Tracker] = ()) -> MetricsLog:
    """The log of a run that resumes at (round, step): drops the round's records from there on, and corrupted lines."""
    path, lost = directory / "metrics.jsonl", 0.0
    if path.exists():
        records = _records(path)
        is_lost = lambda r: r["round"] == round_number and r.get("step", -1) >= step
        timed = [r for r in records if is_lost(r) and r.get("triplets_per_second")]
        lost = sum(r["triplets"] / r["triplets_per_second"] for r in timed)
        kept = [r for r in records if not is_lost(r)]
        files.write_bytes(path, "".join(json.dumps(r) + "\n" for r in kept).encode())
    return MetricsLog(files.LineLog(path), trackers, steps_before(directory, round_number), lost)


def steps_before(directory: Path, round_number: int) -> int:
    """The steps of the rounds before a round, as far as they are logged."""
    path = directory / "metrics.jsonl"
    ends: dict[int, int] = {}
    for record in _records(path) if path.exists() else []:
        if record["round"] < round_number:
            ends[record["round"]] = max(ends.get(record["round"], 0), record.get("step", -1) + 1)
    return sum(ends.values())


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
