"""The command line: tpaw sft | play | eval | report | generate | prompts | export | plan."""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tpaw_jax.runtime.host import restart_with_huge_pages


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 2 with a sentence on standard error where the input cannot be used.

    75 where a run was told to stop and the same command goes on (`preemption.EXIT_CODE`).
    """
    if arguments is None:
        restart_with_huge_pages()
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        options.command(options, _overrides(rest))
    except KeyboardInterrupt:
        goes_on = "the same command goes on from "
        of_command = {"generate": goes_on + "the responses it has"}
        of_command |= dict.fromkeys(("play", "sft"), goes_on + "the last finished stage")
        after = of_command.get(options.command.__name__, "nothing was written")
        print(f"tpaw: interrupted; {after}.", file=sys.stderr)
        return 130
    except (OSError, ValueError, ImportError, FloatingPointError) as error:
        if options.traceback:
            raise
        print(f"tpaw: {error}", file=sys.stderr)
        return 2
    return 0


def play(options: argparse.Namespace, overrides: list[str]) -> None:
    """Run the rounds of self-play of a configuration, or what is left of them."""
    from tpaw_jax.config import config_file

    run = config_file.load(options.config, overrides)
    if run.objective.loss == "sft":
        raise ValueError(f"{' '.join(options.config)}: objective.loss is 'sft'; `tpaw sft` is for that.")
    _train(options, run, options.generations)


def sft(options: argparse.Namespace, overrides: list[str]) -> None:
    """Fine-tune a model on the targets of a configuration: theta_0 of self-play."""
    from tpaw_jax.config import config_file

    run = config_file.load(options.config, overrides, config_file.SFT)
    if run.objective.loss != "sft":
        raise ValueError(
            f"{' '.join(options.config)}: objective.loss is {run.objective.loss!r}; `tpaw play` is for that."
        )
    _train(options, run, None)


def _train(options: argparse.Namespace, run: Any, given: str | None) -> None:
    from tpaw_jax.models import hub
    from tpaw_jax.observe.monitoring import compile_log, parse_steps
    from tpaw_jax.runtime import preemption, processes
    from tpaw_jax.selfplay import loop

    profiled = parse_steps(options.profile) if options.profile else range(0)
    if options.pod or options.coordinator:
        if options.export:
            raise ValueError("--export is for one process; when the pod is done, run `tpaw export` on one host.")
        processes.join(options.coordinator, options.num_processes, options.process_id)
    if options.export:
        hub.check_export(options.export)
    generations = Path(given) if given else None
    with compile_log() as compiled, preemption.PreemptionNotice() as notice:
        try:
            loop.run(run, generations=generations, profiled=profiled, notice=notice, strict=options.strict)
        except preemption.Preempted as stopped:
            print(f"tpaw: {stopped}", file=sys.stderr)
            sys.exit(preemption.EXIT_CODE)
    if not processes.is_main():
        return
    print(f"Compiled {len(compiled)} programs in {sum(s for _, s in compiled):.0f} s:")
    for name in dict.fromkeys(name for name, _ in compiled):
        seconds = [s for n, s in compiled if n == name]
        print(f"  {len(seconds)} x {name}, {sum(seconds):.1f} s")
    where = Path(run.directory)
    texts = "" if run.objective.loss == "sft" else "round_*/samples.jsonl, "
    print(f"The run is in {where}: metrics.jsonl, {texts}round_*/summary.json, ring/policies.")
    if options.export:
        from tpaw_jax.selfplay import export_policy

        print(export_policy.write(where, None, Path(options.export)))


def export(options: argparse.Namespace, overrides: list[str]) -> None:
    """Write a policy of a run as a Hugging Face directory."""
    from tpaw_jax.selfplay import export_policy

    _no_overrides(overrides)
    print(export_policy.write(Path(options.run), options.round, Path(options.out)))


def prompts(options: argparse.Namespace, overrides: list[str]) -> None:
    """The prompts of a configuration as token ids, for another engine to answer; one JSON line a prompt."""
    from tpaw_jax.config import config_file
    from tpaw_jax.data import dataset
    from tpaw_jax.models import hub
    from tpaw_jax.storage import files

    run = config_file.load(options.config, overrides)
    template = dataset.make_template(hub.load_tokenizer(run.policy.tokenizer or run.policy.path), run.data)
    asked, _, report = dataset.load(run.data, template, run.seed)
    records = [
        {"prompt_id": int(i), "prompt": template.tokenizer.decode(tokens), "prompt_token_ids": tokens.tolist()}
        for i, tokens in zip(asked.ids, asked.prompt_tokens, strict=True)
    ]
    files.write_json_lines(Path(options.out), records)
    print(f"{len(asked)} prompts are in {options.out}; {len(report.skipped)} malformed records were skipped.")


def generate(options: argparse.Namespace, overrides: list[str]) -> None:
    """Answer the prompts of a configuration or of a file with a model; one JSON line a response."""
    from tpaw_jax.config import config_file
    from tpaw_jax.generation import completions
    from tpaw_jax.runtime import sharding

    if options.model:
        overrides = [*overrides, f"policy.path={options.model}"]
    run = config_file.load(options.config, overrides)
    count = 1 if options.num_generations is None else options.num_generations
    given = Path(options.prompts) if options.prompts else None
    completions.answer(run, sharding.make_mesh(run.mesh), Path(options.out), given, options.round or 0, count)


def evaluate(options: argparse.Namespace, overrides: list[str]) -> None:
    """Answer the tasks of a configuration greedily and say which share is right."""
    from tpaw_jax.config import config_file
    from tpaw_jax.evaluation import exact_match
    from tpaw_jax.generation.policy import open_policy
    from tpaw_jax.runtime import sharding
    from tpaw_jax.storage import files, journal, ring

    checkpoint = Path(options.checkpoint) if options.checkpoint else None
    of_run = checkpoint if checkpoint and (checkpoint / "journal.json").exists() else None
    if checkpoint and not of_run:
        overrides = [*overrides, f"policy.path={checkpoint}"]
    run = config_file.load(options.config, overrides)
    tasks = []
    if not options.harness:
        tasks = exact_match.chosen(run.evaluation, options.tasks.split(",") if options.tasks else [])
    player = open_policy(run, sharding.make_mesh(run.mesh))
    params = player.params
    if of_run:
        kept = ring.open_ring(journal.open_journal(of_run, reading=True), run.objective.n_max)
        params = ring.restore_policy(kept, ring.select_policy(kept, options.round), sharding.abstract(player.params))
    if options.harness:
        _harness(options, run, player, params)
        return
    evaluator = exact_match.make_evaluator(run, player, tasks)
    results = evaluator.results(params)
    for result in results:
        print(result)
    if options.out:
        records = [{"task": result.name, **record} for result in results for record in result.records]
        files.write_json_lines(Path(options.out), records)
        print(f"The {len(records)} responses are in {options.out}.")


def report(options: argparse.Namespace, overrides: list[str]) -> None:
    """One HTML page on finished rounds of a run, or of several beside each other."""
    _no_overrides(overrides)
    try:
        from tpaw_jax.report import run_report
    except ImportError as error:
        raise ImportError("tpaw report needs matplotlib; pip install 'tpaw_jax[report]'.") from error

    pictures = Path(options.png) if options.png else None
    plots = run_report.write(options.runs, Path(options.out), pictures)
    where = f"; pictures are in {pictures}" if pictures else ""
    print(f"{options.out} has {len(options.runs)} runs in {plots} plots{where}.")


def _harness(options: argparse.Namespace, run: Any, player: Any, params: Any) -> None:
    from tpaw_jax.runtime import sharding
    from tpaw_jax.storage import files

    try:
        from lm_eval.utils import make_table

        from tpaw_jax.evaluation import harness
    except ImportError as error:
        raise ImportError("--harness needs lm-eval; pip install 'tpaw_jax[eval]'.") from error
    policy = harness.PolicyLM(player, params, run, sharding.make_mesh(run.mesh))
    results = harness.run(
        policy,
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


def plan(options: argparse.Namespace, overrides: list[str]) -> None:
    """Compile a configuration for TPU topologies, without a TPU, and say what fits and how long the run would take."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    from tpaw_jax.config import config_file
    from tpaw_jax.models import hub
    from tpaw_jax.planning import lowering, planner
    from tpaw_jax.runtime import tpu
    from tpaw_jax.storage import files

    os.environ.update({name: value for name, value in tpu.QUIET.items() if name not in os.environ})
    run = config_file.load(options.config, overrides)
    if run.objective.loss == "sft" or run.data.responses == "rejected":
        raise ValueError(f"{' '.join(options.config)}: rounds of self-play are planned, not supervised runs or DPO.")
    architecture = hub.load_architecture(options.architecture or run.policy.path)
    stages = tuple(options.stages.split(",")) if options.stages else planner.STAGES
    if unknown := [name for name in stages if name not in planner.STAGES]:
        raise ValueError(f"--stages: there is no stage '{unknown[0]}'; known are {', '.join(planner.STAGES)}.")
    topologies = [tpu.parse_topology(text.strip(), options.slices or 1) for text in options.topology.split(",")]
    prompts, reports = options.prompts or run.data.max_prompts or planner.PROMPTS, []
    if prompts < 1:
        raise ValueError(f"--prompts is {prompts}; a round plays on one at least.")
    jax.config.update("jax_enable_compilation_cache", False)  # from which nothing for absent devices can be read back
    for topology in topologies:
        target = lowering.target_of(run, architecture, topology)
        say = lambda line: print(line, file=sys.stderr, flush=True)
        reports.append(planner.plan(target, prompts, stages, options.search, say))
        print(planner.text(reports[-1]) + "\n", flush=True)
        if options.json:  # after each, since the next may take minutes
            files.write_bytes(Path(options.json), json.dumps(reports, indent=1).encode())
    if len(reports) > 1:
        print(planner.comparison(reports))


_CONFIGURATION = (True, "a YAML file; further ones are read over it; any key can follow as --key.subkey value", list)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tpaw", description="Team-based self-play fine-tuning of language models.")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(required=True, metavar="command")

    command = functools.partial(_command, commands)
    _training_commands(command)
    command(
        evaluate,
        "eval",
        config=_CONFIGURATION,
        checkpoint=(False, "a run directory, a model or a .gguf file; by default the configuration's policy.path", str),
        round=(False, "of a run directory: the round that the policy starts; the newest by default", int),
        tasks=(False, "names of evaluation.tasks with commas between; by default all", str),
        out=(False, "also write every response to this file, JSONL; of --harness all results, JSON", str),
        harness=(False, "instead, lm-eval's tasks of these names, with commas between", str),
        harness_path=(False, "of --harness: a directory of task YAML files, instead of lm-eval's own", str),
        chat_template=(False, "of --harness: put the chat template around contexts", None),
        num_fewshot=(False, "of --harness: examples before each question", int),
        limit=(False, "of --harness: the first so many documents of each task", int),
    )
    command(
        report,
        runs=(True, "run directories; NAME=DIRECTORY puts runs of one name together", tuple),
        out=(True, "the HTML file to write", str),
        png=(False, "also write every plot as a picture to this directory", str),
    )
    command(prompts, config=_CONFIGURATION, out=(True, "the JSONL file to write", str))
    command(
        generate,
        config=_CONFIGURATION,
        prompts=(False, "a JSONL file of prompts, or what tpaw prompts writes; by default the configuration's", str),
        model=(False, "a model other than the configuration's policy.path", str),
        round=(False, "the round whose random stream is used; 0 by default", int),
        num_generations=(False, "responses to each prompt; 1 by default", int),
        out=(True, "the JSONL file to write", str),
    )
    command(
        export,
        run=(True, "a run directory", str),
        round=(False, "the round that the policy starts; the newest by default", int),
        out=(True, "the directory to write", str),
    )
    command(
        plan,
        config=_CONFIGURATION,
        topology=(True, "v5e:16x16, '2 x v5e:16x16' for two slices; several with commas between", str),
        slices=(False, "slices of each topology; 1 by default", int),
        architecture=(False, "where config.json is, if not at the configuration's policy.path; no weights", str),
        prompts=(False, "prompts of a round; by default data.max_prompts, or 50,000", int),
        stages=(False, "only some of step,scoring,prefill,decode", str),
        search=(False, "also find the most rows a device, and the longest row, that fit", None),
        json=(False, "also write the figures to this file", str),
    )
    return parser


def _training_commands(command: Callable[..., None]) -> None:
    training: dict[str, Any] = dict(
        config=_CONFIGURATION,
        export=(False, "also write the last policy to this directory", str),
        profile=(False, "trace these steps of every stage of the first round: steps=10:13", str),
        strict=(False, "stop at the end of a round that shows a sign of divergence", None),
        pod=(False, "one of several processes, as the pod's metadata tell", None),
        coordinator=(False, "one of several processes: HOST:PORT of the first of them", str),
        num_processes=(False, "how many they are", int),
        process_id=(False, "which of them this is, from 0", int),
    )
    command(sft, **training)
    given = (False, "a JSONL file of another engine's responses; plays the one round they answer", str)
    command(play, **training, generations=given)


def _command(
    commands: Any, function: Callable[..., None], called: str = "", **arguments: tuple[bool, str, Any]
) -> None:
    sub = commands.add_parser(
        called or function.__name__, help=function.__doc__, description=function.__doc__, allow_abbrev=False
    )
    sub.set_defaults(command=function)
    for name, (required, text, kind) in arguments.items():
        flag = f"--{name.replace('_', '-')}"
        if kind is None:
            sub.add_argument(flag, help=text, action="store_true")
        elif kind is tuple:
            sub.add_argument(name, help=text, nargs="+")
        elif kind is list:
            sub.add_argument(flag, required=required, help=text, nargs="+")
        else:
            sub.add_argument(flag, required=required, help=text, type=kind)


def _overrides(rest: list[str]) -> list[str]:
    """--key value and --key=value as 'key=value'."""
    found, waiting = [], None
    for word in rest:
        if waiting is not None:
            found.append(f"{waiting}={word}")
            waiting = None
        elif word.startswith("--") and "=" in word:
            found.append(word[2:])
        elif word.startswith("--"):
            waiting = word[2:]
        else:
            raise ValueError(f"'{word}' was not expected; overrides are written --key value.")
    if waiting is not None:
        raise ValueError(f"The override '--{waiting}' has no value.")
    return found


def _no_overrides(overrides: list[str]) -> None:
    if overrides:
        raise ValueError(f"'--{overrides[0].partition('=')[0]}' is not an option of this command.")


if __name__ == "__main__":
    sys.exit(main())
