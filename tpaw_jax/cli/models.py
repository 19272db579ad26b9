"""The commands that use a model."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from tpaw_jax.cli.overrides import refuse

_WITHOUT_ADAPTERS = [
    f"policy.lora.{key}"
    for key in ("rank=0", "path=", "rslora=false", "dora=false", "base_dtype=", "merge_each_round=false")
]
"""Overrides for a model that is not the one whose adapters the configuration describes."""


def evaluate(options: argparse.Namespace, overrides: list[str]) -> None:
    """Answer the tasks of a configuration greedily and print the accuracy."""
    from tpaw_jax.config import RunConfig, config_file
    from tpaw_jax.evaluation import exact_match
    from tpaw_jax.generation.policy import open_policy
    from tpaw_jax.models import adapters
    from tpaw_jax.runtime import sharding
    from tpaw_jax.selfplay.session import check_base
    from tpaw_jax.storage import bucket, files, journal, ring

    checkpoint = bucket.open_path(options.checkpoint) if options.checkpoint else None
    of_run = checkpoint if checkpoint and (checkpoint / "journal.json").exists() else None
    if checkpoint and not of_run:
        overrides = [f"policy.path={checkpoint}", *_WITHOUT_ADAPTERS, *overrides]
    run = config_file.load(options.config, overrides)
    opened = journal.open_journal(of_run, read_only=True) if of_run else None
    if opened and opened.config:
        played = config_file.parse(RunConfig, opened.config, str(of_run))
        lora = dataclasses.replace(played.policy.lora, path="")
        run = dataclasses.replace(run, rounds=played.rounds, policy=dataclasses.replace(run.policy, lora=lora))
    tasks = []
    if not options.harness:
        tasks = exact_match.select_tasks(run.evaluation, options.tasks.split(",") if options.tasks else [])
    policy = open_policy(run, sharding.make_mesh(run.mesh))
    params = policy.params
    if opened:
        kept = ring.open_ring(opened, run.objective.n_max)
        trained, frozen = adapters.parts(params, policy.model.lora)
        check_base(opened, frozen)
        trained = ring.restore_policy(kept, ring.select_policy(kept, options.round), sharding.abstract(trained))
        params = adapters.join(trained, *frozen)
    if options.harness:
        _harness(options, run, policy, params)
        return
    evaluator = exact_match.make_evaluator(run, policy, tasks)
    results = evaluator.results(params)
    for result in results:
        print(result)
    if options.out:
        records = [{"task": result.name, **record} for result in results for record in result.records]
        files.write_json_lines(Path(options.out), records)
        print(f"The {len(records)} responses are in {options.out}.")


def _harness(options: argparse.Namespace, run: Any, policy: Any, params: Any) -> None:
    from tpaw_jax.runtime import sharding
    from tpaw_jax.storage import files

    try:
        from lm_eval.utils import make_table

        from tpaw_jax.evaluation import harness
    except ImportError as error:
        raise ImportError("--harness needs lm-eval; pip install 'tpaw_jax[eval]'.") from error
    model = harness.PolicyLM(policy, params, run, sharding.make_mesh(run.mesh))
    results = harness.run(
        model,
        options.harness.split(","),
        options.harness_path,
        options.chat_template,
        options.num_fewshot,
        options.limit,
    )
    print(make_table(results))
    if options.out:
        kept = {key: results[key] for key in ("results", "configs", "versions", "n-samples", "samples")}
        files.write_bytes(Path(options.out), json.dumps(kept, indent=1, default=str).encode())
        print(f"Scores and samples are in {options.out}.")


def generate(options: argparse.Namespace, overrides: list[str]) -> None:
    """Sample responses to the prompts of a configuration or of a file, one JSON line per response."""
    from tpaw_jax.config import config_file
    from tpaw_jax.generation import completions
    from tpaw_jax.runtime import sharding

    if options.model:
        overrides = [f"policy.path={options.model}", *_WITHOUT_ADAPTERS, *overrides]
    run = config_file.load(options.config, overrides)
    count = 1 if options.num_generations is None else options.num_generations
    given = Path(options.prompts) if options.prompts else None
    completions.answer(run, sharding.make_mesh(run.mesh), Path(options.out), given, options.round or 0, count)


def export(options: argparse.Namespace, overrides: list[str]) -> None:
    """Write a policy of a run as a Hugging Face directory, or its adapters as a PEFT directory."""
    from tpaw_jax.selfplay import export as exporting
    from tpaw_jax.storage import bucket

    refuse(overrides)
    print(exporting.write(bucket.open_path(options.run), options.round, Path(options.out), options.merge))


def export_data(options: argparse.Namespace, overrides: list[str]) -> None:
    """Write a round's triplets with their scores, as Parquet or a saved dataset, for other trainers."""
    from tpaw_jax.selfplay import export as exporting
    from tpaw_jax.storage import bucket

    refuse(overrides)
    print(exporting.write_triplets(bucket.open_path(options.run), options.round, Path(options.out)))
