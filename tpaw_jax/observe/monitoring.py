"""What a run tells: metrics.jsonl and TensorBoard, progress bars, the manifest and table of each round."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from tpaw_jax.runtime import processes
from tpaw_jax.storage import files

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass(frozen=True)
class MetricsLog:
    """Appends records to metrics.jsonl, and to TensorBoard where it is on."""

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


def open_metrics(directory: Path, round_number: int, step: int, tensorboard: bool) -> MetricsLog:
    """The log of a run that goes on at (round, step): the round's records from there on are dropped, to be made again.

    So are lines that a kill cut short or that are damaged.

    Raises:
        ImportError: TensorBoard is wanted and tensorboardX is not installed.
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
    """Fetched step metrics as plain floats; per-player ones carry the player's round and leave missing players out."""
    record: dict[str, float] = {}
    for name, value in metrics.items():
        value = np.asarray(value)
        if name.startswith("player/"):
            of_player = name.removeprefix("player/")
            record |= {f"player_{j}/{of_player}": float(value[place]) for place, j in enumerate(players)}
        else:
            record[name] = float(value)
    return record


@contextlib.contextmanager
def progress(description: str, total: int, unit: str) -> Iterator[Any]:
    """A progress bar with rate and time left; silent where the output is not a terminal, and on all hosts but one."""
    disable = None if processes.is_main() else True
    with tqdm(total=total, desc=description, unit=unit, disable=disable, leave=False, dynamic_ncols=True) as bar:
        yield bar


class Stopwatch:
    """Seconds spent in each named stage of a round."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.start = time.perf_counter()

    @property
    def goodput(self) -> float:
        """Share of the time since the beginning in which the devices sampled, scored or trained."""
        busy = sum(self.seconds.get(stage, 0.0) for stage in ("sampling", "scoring", "training"))
        return busy / (time.perf_counter() - self.start)

    def report(self) -> dict[str, float]:
        """The seconds of every stage, and of all since the beginning as `round`."""
        return {**self.seconds, "round": time.perf_counter() - self.start}

    @contextlib.contextmanager
    def time(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


class Profiler:
    """Traces steps [first, end) of every stage of the first round that it sees, for XProf or TensorBoard.

    A step is an optimizer step in training, a batch in scoring, a look from the host in sampling.
    """

    def __init__(self, directory: Path, steps: range) -> None:
        self.directory, self.steps = directory, steps
        self._seen: dict[str, int] = {}
        self._tracing = ""

    def step(self, stage: str) -> None:
        """Called before each step of a stage."""
        number = self._seen[stage] = self._seen.get(stage, -1) + 1
        if self._tracing and (stage != self._tracing or number >= self.steps.stop):
            self.stop()
        if self.steps and number == self.steps.start:
            jax.profiler.start_trace(str(self.directory / f"{stage}_{jax.process_index():04d}"))
            self._tracing = stage

    def stop(self) -> None:
        """End a trace that is being taken."""
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = ""


def parse_steps(text: str) -> range:
    """`steps=10:13` as the steps 10, 11 and 12.

    Raises:
        ValueError: it is not of that form.
    """
    match = re.fullmatch(r"steps=(\d+):(\d+)", text)
    if match is None or int(match.group(1)) >= int(match.group(2)):
        raise ValueError(
            f"--profile {text}: write the steps to trace as steps=10:13, the first and the one after the last."
        )
    return range(int(match.group(1)), int(match.group(2)))


@contextlib.contextmanager
def compile_log() -> Iterator[list[tuple[str, float]]]:
    """The (program, seconds) of everything compiled inside the block, filled in as it happens."""
    compiled: list[tuple[str, float]] = []

    def listen(event: str, duration_secs: float, **details: Any) -> None:
        if event == COMPILE_EVENT:
            compiled.append((str(details.get("fun_name", "unnamed")), duration_secs))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def manifest(round_number: int, rounds: int, facts: dict[str, Any]) -> str:
    """What a round starts from, as lines of text."""
    width = max(map(len, facts))
    lines = [f"  {name:<{width}}  {value}" for name, value in facts.items()]
    return "\n".join([f"Round {round_number} of {rounds} (0 to {rounds - 1})", *lines])


def table(columns: Sequence[dict[str, Any]]) -> str:
    """One column a record, one line a field; numbers to four significant digits."""
    if not columns:
        return "  (no finished round)"
    names = list(dict.fromkeys(name for column in columns for name in column))
    lines = [[name, *(_cell(column.get(name)) for column in columns)] for name in names]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns) + 1)]
    align = lambda line: "  ".join(
        [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
    )
    return "\n".join("  " + align(line) for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _records(path: Path) -> list[dict[str, Any]]:
    """The records of a log whose lines are whole."""
    found = []
    for line in path.read_bytes().splitlines():
        try:
            record = files.parse_json(line, path)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("round"), int):
            found.append(record)
    return found
