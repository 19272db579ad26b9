"""The command that measures."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tpaw_jax.cli.overrides import refuse


def bench(options: argparse.Namespace, overrides: list[str]) -> None:
    """Measure a run's step, scoring and sampling on these devices, with random weights; or compare two such runs."""
    from tpaw_jax.planning import readings

    if options.compare:
        refuse(overrides)
        if len(options.compare) != 2:
            raise ValueError("--compare takes two files: BEFORE AFTER.")
        print(readings.comparison(*(readings.read(Path(name)) for name in options.compare)))
        return
    if not options.config:
        raise ValueError("tpaw bench needs --config, or --compare with two files.")

    import jax

    from tpaw_jax.config import config_file
    from tpaw_jax.models import hub
    from tpaw_jax.planning import bench as benchmark
    from tpaw_jax.planning import planner
    from tpaw_jax.runtime import processes

    run = config_file.load(options.config, overrides)
    if run.objective.loss == "sft" or run.data.responses == "rejected":
        raise ValueError(
            f"{' '.join(options.config)}: `tpaw bench` measures rounds of self-play, not supervised runs or DPO."
        )
    stages = options.stages.split(",") if options.stages else list(planner.STAGES)
    if unknown := set(stages) - set(planner.STAGES):
        raise ValueError(f"--stages: unknown {', '.join(sorted(unknown))}; choose from {', '.join(planner.STAGES)}.")
    calls = 10 if options.calls is None else options.calls
    if calls < 1:
        raise ValueError(f"--calls is {calls}; it must be at least 1.")
    if options.pod or options.coordinator:
        processes.join(options.coordinator, options.num_processes, options.process_id)
    predicted = readings.predictions(Path(options.plan), jax.device_count()) if options.plan else {}
    say = lambda text: print(text, flush=True) if processes.is_main() else None
    architecture = hub.load_architecture(options.architecture or run.policy.path)
    records: Sequence[readings.Record] = benchmark.measure(run, architecture, stages, calls, say)
    if processes.is_main():
        records = readings.with_predictions(records, predicted) if predicted else records
        print(readings.table(records))
        if options.json:
            readings.write(Path(options.json), records)
