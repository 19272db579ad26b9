"""The commands that need no accelerator."""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from tpaw_jax.cli.overrides import refuse
from tpaw_jax.runtime import host


def report(options: argparse.Namespace, overrides: list[str]) -> None:
    """Write an HTML page that shows a run, or compares several."""
    refuse(overrides)
    try:
        from tpaw_jax.report import run_report
    except ImportError as error:
        raise ImportError("tpaw report needs matplotlib; pip install 'tpaw_jax[report]'.") from error

    pictures = Path(options.png) if options.png else None
    plots = run_report.write(options.runs, Path(options.out), pictures)
    where = f" The plots are in {pictures} too." if pictures else ""
    print(f"{options.out} shows {len(options.runs)} runs in {plots} plots.{where}")


def prompts(options: argparse.Namespace, overrides: list[str]) -> None:
    """Write the prompts of a configuration as token ids, one JSON line per prompt, for another engine to answer."""
    from tpaw_jax.config import config_file
    from tpaw_jax.data import dataset, templates
    from tpaw_jax.models import hub
    from tpaw_jax.storage import files

    run = config_file.load(options.config, overrides)
    tokenizer = hub.load_tokenizer(run.policy.tokenizer or run.policy.path)
    template = templates.make_template(tokenizer, run.data, _vocabulary(run.policy.path))
    asked, _, report = dataset.load(run.data, template, run.seed)
    records = [
        {"prompt_id": int(i), "prompt": template.tokenizer.decode(tokens), "prompt_token_ids": tokens.tolist()}
        for i, tokens in zip(asked.ids, asked.prompt_tokens, strict=True)
    ]
    files.write_json_lines(Path(options.out), records)
    print(f"{len(asked)} prompts are in {options.out}; {len(report.skipped)} malformed records were skipped.")


def data(options: argparse.Namespace, overrides: list[str]) -> None:
    """Report on a configuration's data, and show how conversations become tokens."""
    from tpaw_jax.config import config_file
    from tpaw_jax.data import dataset, templates
    from tpaw_jax.models import hub
    from tpaw_jax.report import data_preview

    run = config_file.load(options.config, overrides)
    tokenizer = hub.load_tokenizer(run.policy.tokenizer or run.policy.path)
    template = templates.make_template(tokenizer, run.data, _vocabulary(run.policy.path))
    prompts, held_out, found = dataset.load(run.data, template, run.seed)
    print(data_preview.report(prompts, held_out, found, template))
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    shown = min(options.show or 0, len(prompts))
    if shown:
        print(f"\n{data_preview.legend(color)}")
    for number in range(shown):
        print("\n" + data_preview.show(prompts, number, template, shutil.get_terminal_size().columns, color))


def _vocabulary(path: str) -> int | None:
    """The number of the model's tokens; None where only a tokenizer is at `path`."""
    from tpaw_jax.models import hub

    try:
        return hub.load_architecture(path).vocab_size
    except FileNotFoundError:
        return None


def plan(options: argparse.Namespace, overrides: list[str]) -> None:
    """Compile a run for TPU topologies, without a TPU, and predict memory, time and cost."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    host.quiet_libtpu(compute=False)
    import jax

    from tpaw_jax.config import config_file
    from tpaw_jax.models import hub
    from tpaw_jax.planning import layouts, lowering, planner
    from tpaw_jax.planning.measured import readings
    from tpaw_jax.runtime import tpu
    from tpaw_jax.storage import files

    run = config_file.load(options.config, overrides)
    if run.objective.loss == "sft" or run.data.responses == "rejected":
        raise ValueError(
            f"{' '.join(options.config)}: `tpaw plan` plans rounds of self-play, not supervised runs or DPO."
        )
    architecture = hub.load_architecture(options.architecture or run.policy.path)
    stages = tuple(options.stages.split(",")) if options.stages else planner.STAGES
    if unknown := [name for name in stages if name not in planner.STAGES]:
        raise ValueError(f"--stages: there is no stage '{unknown[0]}'. The stages are {', '.join(planner.STAGES)}.")
    topologies = [tpu.parse_topology(text.strip(), options.slices or 1) for text in options.topology.split(",")]
    prompts, reports = options.prompts or run.data.max_prompts or planner.PROMPTS, []
    if prompts < 1:
        raise ValueError(f"--prompts is {prompts}; it must be at least 1.")
    jax.config.update("jax_enable_compilation_cache", False)  # it cannot be read back for devices that are not there
    say = lambda line: print(line, file=sys.stderr, flush=True)
    for topology in topologies:
        target = lowering.target_of(layouts.resolve(run, architecture, topology, say), architecture, topology)
        ratios = readings.calibration(Path(options.calibration), topology.generation) if options.calibration else {}
        reports.append(planner.plan(target, prompts, stages, options.search, say, ratios))
        print(planner.text(reports[-1]) + "\n", flush=True)
        if options.json:  # after each topology: the next may take minutes
            files.write_bytes(Path(options.json), json.dumps(reports, indent=1).encode())
    if len(reports) > 1:
        print(planner.comparison(reports))
