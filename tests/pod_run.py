"""One process of a small run or benchmark, for test_processes.py."""

import json
from pathlib import Path

import jax
import numpy as np
from conftest import STORIES, small_run

from tpaw_jax.models import hub
from tpaw_jax.planning import planner
from tpaw_jax.planning.measured import bench, readings
from tpaw_jax.runtime import processes
from tpaw_jax.selfplay import loop, round_store


def play(directory: Path, port: int, count: int, process: int, settings: dict[str, str]) -> None:
    """Play the run in process number `process` of `count`; the first one writes the table of rounds to table.json."""
    if count > 1:
        processes.join(f"127.0.0.1:{port}", count, process)
    table = loop.play(small_run(directory, **{"mesh.fsdp": -1, "packing.rows_per_batch": 8, **settings}))
    if processes.is_main():
        (directory / "table.json").write_text(json.dumps(table))


def play_not_finite(directory: Path, port: int, count: int, process: int, settings: dict[str, str]) -> None:
    """Play a run whose scores are infinite, up to the error that ends it, and write its text beside `directory`."""
    processes.join(f"127.0.0.1:{port}", count, process)
    scores = round_store.team_scores

    def poisoned(*arguments):
        found = scores(*arguments)
        return found.replace(log_probs=found.log_probs * np.float32(np.inf))

    round_store.team_scores = poisoned
    try:
        loop.play(small_run(directory, **{"mesh.fsdp": -1, "packing.rows_per_batch": 8, **settings}))
    except FloatingPointError as error:
        directory.with_name(f"{directory.name}_{process}.txt").write_text(str(error))
    jax.distributed.shutdown()


def measure(directory: Path, port: int, count: int, process: int, settings: dict[str, str]) -> None:
    """Measure two calls of each stage; the first process writes the readings to a file beside `directory`."""
    processes.join(f"127.0.0.1:{port}", count, process)
    run = small_run(directory, **{"mesh.fsdp": -1, "packing.rows_per_batch": 8, **settings})
    records = bench.measure(run, hub.load_architecture(STORIES), planner.STAGES, 2, lambda text: None)
    if processes.is_main():
        readings.write(directory.with_suffix(".jsonl"), records)
    jax.distributed.shutdown()  # waits for the others, which a forked process does not do when it exits
