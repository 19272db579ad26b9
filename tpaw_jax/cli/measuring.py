"""The command that measures."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tpaw_jax.cli import pod
from tpaw_jax.cli.overrides import refuse


def bench(options: argparse.Namespace, overrides: list[str]) -> None:
    """Measure a run's step, scoring and sampling on these devices, with random weights; or compare two such runs."""
    from tpaw_jax.planning.measured import readings

    if options.compare:
        refuse(overrides)
        if len(options.compare) != 2:
            raise ValueError("--compare takes two files: BEFORE AFTER.")
        print(readings.comparison(*(readings.read(Path(name)) for name in options.compare)))
        return
    if not options.config:
        raise ValueError("tpaw bench needs --config, or --compare with two files.")

    if options.plan and options.data:
        raise ValueError("tpaw bench: the plan is for assumed lengths; leave out --plan or --data.")
    run, architecture, stages = _measured(options, overrides, "bench")

    import jax

    from tpaw_jax.planning import planner, workload
    from tpaw_jax.planning.measured import bench as benchmark
    from tpaw_jax.runtime import processes

    lengths = workload.lengths_of_data(run, architecture.vocab_size) if options.data else None
    if options.plan:
        predicted = readings.predictions(Path(options.plan), jax.device_count())
    else:
        predicted = planner.predictions_here(run, architecture, stages, _say, lengths)
    records: Sequence[readings.Record] = benchmark.measure(run, architecture, stages, _calls(options), _say, lengths)
    if processes.is_main():
        records = readings.with_predictions(records, predicted) if predicted else records
        print(readings.table(records))
        if options.json:
            readings.write(Path(options.json), records)


def tune(options: argparse.Namespace, overrides: list[str]) -> None:
    """Search for the settings with which a run is fastest on these devices, and write them as a configuration file."""
    minutes = 20.0 if options.minutes is None else options.minutes
    if minutes <= 0:
        raise ValueError(f"--minutes is {minutes:g}; it must be above 0.")
    run, architecture, stages = _measured(options, overrides, "tune")

    from tpaw_jax.planning.measured import tune as tuning
    from tpaw_jax.runtime import processes
    from tpaw_jax.storage import files

    settings, trials = tuning.tune(run, architecture, stages, minutes, _calls(options), _say)
    if processes.is_main():
        files.write_bytes(Path(options.out), tuning.overlay(settings, trials).encode())
        print(Path(options.out).read_text() + f"\nWritten to {options.out}.")


def _measured(options: argparse.Namespace, overrides: list[str], name: str) -> tuple[Any, Any, list[str]]:
    """The run, its model's architecture, and the stages to measure, after joining the pod's other processes."""
    from tpaw_jax.config import config_file
    from tpaw_jax.models import hub
    from tpaw_jax.planning import layouts, planner

    run = config_file.load(options.config, overrides)
    if run.objective.loss == "sft" or run.data.responses == "rejected":
        raise ValueError(
            f"{' '.join(options.config)}: `tpaw {name}` measures rounds of self-play, not supervised runs or DPO."
        )
    stages = options.stages.split(",") if options.stages else list(planner.STAGES)
    if unknown := set(stages) - set(planner.STAGES):
        raise ValueError(f"--stages: unknown {', '.join(sorted(unknown))}; choose from {', '.join(planner.STAGES)}.")
    if _calls(options) < 1:
        raise ValueError(f"--calls is {options.calls}; it must be at least 1.")
    pod.join(options)
    architecture = hub.load_architecture(options.architecture or run.policy.path)
    return layouts.resolve_here(run, _say, architecture), architecture, stages


def _calls(options: argparse.Namespace) -> int:
    return 10 if options.calls is None else options.calls


def _say(text: str) -> None:
    from tpaw_jax.runtime import processes

    if processes.is_main():
        print(text, flush=True)
