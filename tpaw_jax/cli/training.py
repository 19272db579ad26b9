"""The commands that train."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import tpaw_jax
from tpaw_jax.cli import pod


def demo(options: argparse.Namespace, overrides: list[str]) -> None:
    """Play three rounds of self-play on a model of 260K parameters that is part of the package."""
    from tpaw_jax.config import config_file

    here, cwd = Path(tpaw_jax.__file__).parent / "demo", Path.cwd()
    place = lambda path: path.relative_to(cwd) if path.is_relative_to(cwd) else path
    model, stories = (json.dumps(str(place(here / name))) for name in ("stories260K", "tinystories.jsonl"))
    embedded = [f"policy.path={model}", f"data.sources=[{{path: {stories}}}]"]
    _train(options, config_file.load(here / "demo.yaml", [*embedded, *overrides]), None)


def play(options: argparse.Namespace, overrides: list[str]) -> None:
    """Play the rounds of self-play of a configuration, or resume them."""
    from tpaw_jax.config import config_file

    run = config_file.load(options.config, overrides)
    if run.objective.loss == "sft":
        raise ValueError(f"{' '.join(options.config)}: objective.loss is 'sft'. Use `tpaw sft` for that.")
    _train(options, run, options.generations)


def sft(options: argparse.Namespace, overrides: list[str]) -> None:
    """Fine-tune a model on the targets of a configuration, as theta_0 of self-play."""
    from tpaw_jax.config import config_file

    run = config_file.load(options.config, overrides, config_file.SFT)
    if run.objective.loss != "sft":
        raise ValueError(
            f"{' '.join(options.config)}: objective.loss is {run.objective.loss!r}. Use `tpaw play` for that."
        )
    _train(options, run, None)


def _train(options: argparse.Namespace, run: Any, given: str | None) -> None:
    from tpaw_jax.models import hub
    from tpaw_jax.observe.profiling import compile_log, parse_steps
    from tpaw_jax.planning import layouts
    from tpaw_jax.runtime import preemption, processes
    from tpaw_jax.selfplay import loop
    from tpaw_jax.storage import bucket, journal

    profiled = parse_steps(options.profile) if options.profile else range(0)
    if options.export and pod.is_one_of_several(options):
        raise ValueError(
            "--export works in one process only. When the pod has finished, run `tpaw export` on one host."
        )
    pod.join(options)
    if options.export:
        hub.check_export(options.export)
    begun = journal.open_journal(bucket.open_path(run.directory), read_only=True).config.get("packing", {})
    say = lambda line: print(line, flush=True) if processes.is_main() else None
    run = layouts.resolve_here(run, say, begun_with=begun.get("row_length", 0))
    generations = Path(given) if given else None
    with compile_log() as compiled, preemption.PreemptionNotice() as notice:
        try:
            loop.play(
                run,
                generations=generations,
                profiled=profiled,
                notice=notice,
                strict=options.strict,
                verbose=options.verbose,
            )
        except preemption.Preempted as stopped:
            print(f"tpaw: {stopped}", file=sys.stderr)
            sys.exit(preemption.EXIT_CODE)
    if processes.is_main():
        _report_run(options, run, compiled)


def _report_run(options: argparse.Namespace, run: Any, compiled: list[tuple[str, float]]) -> None:
    from tpaw_jax.selfplay import export as exporting
    from tpaw_jax.storage import bucket

    print(f"Compiled {len(compiled)} programs in {sum(s for _, s in compiled):.0f} s.")
    if options.verbose:
        for name in dict.fromkeys(name for name, _ in compiled):
            seconds = [s for n, s in compiled if n == name]
            print(f"  {len(seconds)} x {name}, {sum(seconds):.1f} s")
    texts = "" if run.objective.loss == "sft" else "round_*/samples.jsonl, "
    print(f"Results are in {run.directory}: metrics.jsonl, {texts}round_*/summary.json, ring/policies.")
    if options.export:
        print(exporting.write(bucket.open_path(run.directory), None, Path(options.export)))
