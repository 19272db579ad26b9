"""Where the time goes: seconds and goodput per stage, traces for XProf, compile times."""

import contextlib
import functools
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from tpaw_jax.storage import bucket, files

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


PRODUCTIVE = ("sampling", "scoring", "training")

BADPUT = {
    "startup": "training_prep",
    "compiling": "program_startup",
    "dry run": "program_startup",
    "packing": "data_loading_sync",
    "input wait": "data_loading_sync",
    "restoring": "unproductive_checkpoint_restore_time",
    "saving": "unproductive_checkpoint_save_time",
    "lost steps": "wasted_progress_from_disruption",
    "evaluation": "custom_badput_events",
    "held-out": "custom_badput_events",
}
"""The stages of a round that are not productive, and their category in ml-goodput-measurement's breakdown."""


class Stopwatch:
    """Seconds spent in each named stage of a round.

    A second belongs to one stage: what is timed or compiled inside a block does not count for the block's own stage.
    """

    def __init__(self, before: Mapping[str, float] | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self.start = time.perf_counter()
        self._inside: list[float] = []  # for each open block: seconds of other stages
        _count_compilations()
        for stage, seconds in (before or {}).items():
            self.add_past(stage, seconds)

    def shares(self) -> dict[str, float]:
        """Goodput and every category of badput as shares of the time so far, which add up to 1.

        Goodput is sampling, scoring and training, minus the time spent compiling or waiting for inputs and disks.
        """
        total = time.perf_counter() - self.start
        found = {"goodput": sum(self.seconds.get(stage, 0.0) for stage in PRODUCTIVE) / total}
        found |= dict.fromkeys((f"badput/{category}" for category in BADPUT.values()), 0.0)
        for stage, category in BADPUT.items():
            found[f"badput/{category}"] += self.seconds.get(stage, 0.0) / total
        return found | {"badput/other": max(0.0, 1 - sum(found.values()))}

    def report(self) -> dict[str, float]:
        """The seconds of each stage, and the total so far as `round`."""
        return {**self.seconds, "round": time.perf_counter() - self.start}

    def add(self, stage: str, seconds: float) -> None:
        """Count seconds of the open block for another stage."""
        self._add(stage, seconds)
        if self._inside:
            self._inside[-1] += seconds

    def add_past(self, stage: str, seconds: float) -> None:
        """Count seconds from before the watch was started."""
        self._add(stage, seconds)
        self.start -= seconds

    @contextlib.contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Count the time of the block for a stage."""
        start, compiled = time.perf_counter(), _compiled.seconds
        self._inside.append(0.0)
        before = self.seconds.get("compiling", 0.0)
        try:
            yield
        finally:
            counted = self.seconds.get("compiling", 0.0) - before  # by the blocks inside
            self.add("compiling", max(0.0, _compiled.seconds - compiled - counted))
            elapsed = time.perf_counter() - start
            self._add(stage, max(0.0, elapsed - self._inside.pop()))
            if self._inside:
                self._inside[-1] += elapsed

    def _add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds


class _Compiled(threading.local):
    seconds = 0.0  # of the thread: what others compile happens beside its stages


_compiled = _Compiled()


@functools.cache
def _count_compilations() -> None:
    """From now on, add the seconds of every compilation to `_compiled`."""

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == COMPILE_EVENT:
            _compiled.seconds += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)


class Profiler:
    """Traces the given steps of each stage, once per run, for XProf or TensorBoard.

    A step is an optimizer step in training, a batch in scoring, and a call of refill and decode in sampling.
    """

    def __init__(self, directory: Path, steps: range) -> None:
        self.directory, self.steps = directory, steps
        self._local: Path | None = None  # where a trace is written that goes to a bucket
        self._stage, self._tracing = "", False
        self._seen: dict[str, int] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Steps inside the block belong to this stage; its end also ends a trace."""
        self._stage = name
        try:
            yield
        finally:
            self._stop()

    def step(self) -> contextlib.AbstractContextManager[Any]:
        """Call between the steps of a stage. A `with` block on the result is marked as the step in the trace."""
        number = self._seen[self._stage] = self._seen.get(self._stage, -1) + 1
        if number >= self.steps.stop:
            self._stop()
        if self.steps and number == self.steps.start:
            if bucket.is_remote(self.directory):
                self._local = Path(tempfile.mkdtemp(prefix="tpaw_profile_"))
            name = f"{self._stage}_{jax.process_index():04d}"
            jax.profiler.start_trace(str((self._local or self.directory) / name))
            self._tracing = True
        return jax.profiler.StepTraceAnnotation(self._stage, step_num=number)

    def _stop(self) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
            if self._local is not None:
                for path in filter(Path.is_file, self._local.rglob("*")):
                    files.replace(self.directory / path.relative_to(self._local).as_posix(), path.read_bytes())
                shutil.rmtree(self._local)


def parse_steps(text: str) -> range:
    """`steps=10:13` as the steps 10, 11 and 12.

    Raises:
        ValueError: the text has another form.
    """
    match = re.fullmatch(r"steps=(\d+):(\d+)", text)
    if match is None or int(match.group(1)) >= int(match.group(2)):
        raise ValueError(
            f"--profile {text}: write the steps to trace as steps=10:13, the first and the one after the last."
        )
    return range(int(match.group(1)), int(match.group(2)))


@contextlib.contextmanager
def compile_log() -> Iterator[list[tuple[str, float]]]:
    """A list that collects the (program, seconds) of every compilation inside the block."""
    compiled: list[tuple[str, float]] = []

    def listen(event: str, duration_secs: float, **details: Any) -> None:
        if event == COMPILE_EVENT:
            compiled.append((str(details.get("fun_name", "unnamed")), duration_secs))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
