"""Where the time goes: seconds per stage, traces for XProf, compile times."""

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class Stopwatch:
    """Seconds spent in each named stage of a round."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.start = time.perf_counter()

    @property
    def goodput(self) -> float:
        """Share of the time so far that went into sampling, scoring and training."""
        busy = sum(self.seconds.get(stage, 0.0) for stage in ("sampling", "scoring", "training"))
        return busy / (time.perf_counter() - self.start)

    def report(self) -> dict[str, float]:
        """The seconds of each stage, and the total so far as `round`."""
        return {**self.seconds, "round": time.perf_counter() - self.start}

    @contextlib.contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Count the time of the block for a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


class Profiler:
    """Traces the given steps of each stage, once per run, for XProf or TensorBoard.

    A step is an optimizer step in training, a batch in scoring, and a call of refill and decode in sampling.
    """

    def __init__(self, directory: Path, steps: range) -> None:
        self.directory, self.steps = directory, steps
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
            jax.profiler.start_trace(str(self.directory / f"{self._stage}_{jax.process_index():04d}"))
            self._tracing = True
        return jax.profiler.StepTraceAnnotation(self._stage, step_num=number)

    def _stop(self) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False


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
