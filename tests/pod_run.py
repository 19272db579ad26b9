"""One process of a small run or benchmark, for test_processes.py."""

import json
import os
import signal
import time
from pathlib import Path

import jax
import numpy as np
from conftest import STORIES, small_run

from tpaw_jax.cli import pod
from tpaw_jax.config import DataConfig
from tpaw_jax.data import dataset, encoding, sources, templates
from tpaw_jax.models import hub
from tpaw_jax.planning import planner
from tpaw_jax.planning.measured import bench, readings
from tpaw_jax.runtime import heartbeat, processes
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


def load_data(directory: Path, port: int, count: int, process: int, config: DataConfig) -> None:
    """Load data in chunks of three records; each process writes what it found to a file in `directory`."""
    processes.join(f"127.0.0.1:{port}", count, process)
    sources.CHUNK = 3
    encoded, check = 0, encoding.check

    def counted(task, template, config):
        nonlocal encoded
        encoded += task.chunk.records
        return check(task, template, config)

    encoding.check = counted
    template = templates.make_template(hub.load_tokenizer(str(STORIES)), config)
    prompts, _, report = dataset.load(config, template, 3, directory)
    tokens = np.concatenate(prompts.prompt_tokens)
    np.savez(directory / f"of_{process}.npz", tokens=tokens, report=repr(report), encoded=encoded)
    jax.distributed.shutdown()


def beat(directory: Path, port: int, count: int, process: int, fault: str, timeout: float) -> int:
    """Watch the others and be watched, and fail in a way; prints the seconds that the process waited for them."""
    processes.join(f"127.0.0.1:{port}", count, process)
    heartbeat.start(timeout)
    processes.barrier("all processes beat")
    start = time.monotonic()
    if fault == "waits":
        time.sleep(60)
    if fault.endswith("late"):
        time.sleep(2)
    if fault in ("killed", "stopped"):
        os.kill(os.getpid(), signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
    if fault.startswith("fails"):
        heartbeat.fail(2, "the disk is full.")
    if fault == "suffers":
        pod.end(1, "Traceback ...\na collective failed", pod.Told("a collective failed", consequence=True))
    if fault == "barrier":
        processes.BARRIER_SECONDS = 1
        try:
            processes.barrier("here")
        except RuntimeError as error:
            heartbeat.fail(1, str(error))
    heartbeat.finish()
    print(time.monotonic() - start)
    jax.distributed.shutdown()
    return 0


def measure(directory: Path, port: int, count: int, process: int, settings: dict[str, str]) -> None:
    """Measure two calls of each stage; the first process writes the readings to a file beside `directory`."""
    processes.join(f"127.0.0.1:{port}", count, process)
    run = small_run(directory, **{"mesh.fsdp": -1, "packing.rows_per_batch": 8, **settings})
    records = bench.measure(run, hub.load_architecture(STORIES), planner.STAGES, 2, lambda text: None)
    if processes.is_main():
        readings.write(directory.with_suffix(".jsonl"), records)
    jax.distributed.shutdown()  # waits for the others, which a forked process does not do when it exits
