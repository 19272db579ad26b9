"""The commands: tpaw sft | play | eval | report | generate | prompts | export | plan."""

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
    """Run one command. Returns the exit code: 0 on success, 2 if the input cannot be used, 130 after Ctrl-C.

    A run that was asked to stop exits with 75 (`preemption.EXIT_CODE`); the same command resumes it.
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
        resumes = {
            "generate": "the same command resumes from the finished responses",
            "play": "the same command resumes from the last finished stage",
            "sft": "the same command resumes from the last saved step",
        }
        hint = resumes.get(options.command.__name__)
        print(f"tpaw: interrupted{'; ' + hint if hint else ''}.", file=sys.stderr)
        return 130
    except (OSError, ValueError, ImportError, FloatingPointError) as error:
        if options.traceback:
            raise
        print(f"tpaw: {error}", file=sys.stderr)
        return 2
    return 0


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
    from tpaw_jax.runtime import preemption, processes
    from tpaw_jax.selfplay import loop

    profiled = parse_steps(options.profile) if options.profile else range(0)
    if options.pod or options.coordinator:
        if options.export:
            raise ValueError(
                "--export works in one process only. When the pod has finished, run `tpaw export` on one host."
            )
        processes.join(options.coordinator, options.num_processes, options.process_id)
    if options.export:
        hub.check_export(options.export)
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

    print(f"Compiled {len(compiled)} programs in {sum(s for _, s in compiled):.0f} s.")
    if options.verbose:
        for name in dict.fromkeys(name for name, _ in compiled):
            seconds = [s for n, s in compiled if n == name]
            print(f"  {len(seconds)} x {name}, {sum(seconds):.1f} s")
    texts = "" if run.objective.loss == "sft" else "round_*/samples.jsonl, "
    print(f"Results are in {run.directory}: metrics.jsonl, {texts}round_*/summary.json, ring/policies.")
    if options.export:
        print(exporting.write(Path(run.directory), None, Path(options.export)))


def export(options: argparse.Namespace, overrides: list[str]) -> None:
    """Write a policy of a run as a Hugging Face directory."""
    from tpaw_jax.selfplay import export as exporting

    _no_overrides(overrides)
    print(exporting.write(Path(options.run), options.round, Path(options.out)))


def prompts(options: argparse.Namespace, overrides: list[str]) -> None:
    """Write the prompts of a configuration as token ids, one JSON line per prompt, for another engine to answer."""
    from tpaw_jax.config import config_file
    from tpaw_jax.data import dataset, templates
    from tpaw_jax.models import hub
    from tpaw_jax.storage import files

    run = config_file.load(options.config, overrides)
    template = templates.make_template(hub.load_tokenizer(run.policy.tokenizer or run.policy.path), run.data)
    asked, _, report = dataset.load(run.data, template, run.seed)
    records = [
        {"prompt_id": int(i), "prompt": template.tokenizer.decode(tokens), "prompt_token_ids": tokens.tolist()}
        for i, tokens in zip(asked.ids, asked.prompt_tokens, strict=True)
    ]
    files.write_json_lines(Path(options.out), records)
    print(f"{len(asked)} prompts are in {options.out}; {len(report.skipped)} malformed records were skipped.")


def generate(options: argparse.Namespace, overrides: list[str]) -> None:
    """Sample responses to the prompts of a configuration or of a file, one JSON line per response."""
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
    """Answer the tasks of a configuration greedily and print the accuracy."""
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
        tasks = exact_match.select_tasks(run.evaluation, options.tasks.split(",") if options.tasks else [])
    policy = open_policy(run, sharding.make_mesh(run.mesh))
    params = policy.params
    if of_run:
        kept = ring.open_ring(journal.open_journal(of_run, read_only=True), run.objective.n_max)
        params = ring.restore_policy(kept, ring.select_policy(kept, options.round), sharding.abstract(policy.params))
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


def report(options: argparse.Namespace, overrides: list[str]) -> None:
    """Write an HTML page that shows a run, or compares several."""
    _no_overrides(overrides)
    try:
        from tpaw_jax.report import run_report
    except ImportError as error:
        raise ImportError("tpaw report needs matplotlib; pip install 'tpaw_jax[report]'.") from error

    pictures = Path(options.png) if options.png else None
    plots = run_report.write(options.runs, Path(options.out), pictures)
    where = f" The plots are in {pictures} too." if pictures else ""
    print(f"{options.out} shows {len(options.runs)} runs in {plots} plots.{where}")


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


def plan(options: argparse.Namespace, overrides: list[str]) -> None:
    """Compile a run for TPU topologies, without a TPU, and predict memory, time and cost."""
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
    for topology in topologies:
        target = lowering.target_of(run, architecture, topology)
        say = lambda line: print(line, file=sys.stderr, flush=True)
        reports.append(planner.plan(target, prompts, stages, options.search, say))
        print(planner.text(reports[-1]) + "\n", flush=True)
        if options.json:  # after each topology: the next may take minutes
            files.write_bytes(Path(options.json), json.dumps(reports, indent=1).encode())
    if len(reports) > 1:
        print(planner.comparison(reports))


_CONFIGURATION = (True, "YAML files, each overriding the ones before; set any key with --key.subkey value", list)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tpaw", description="Team-based self-play fine-tuning of language models.")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(required=True, metavar="command")
    command = functools.partial(_command, commands)
    _training_commands(command)
    _model_commands(command)
    _reading_commands(command)
    return parser


def _training_commands(command: Callable[..., None]) -> None:
    training: dict[str, Any] = dict(
        config=_CONFIGURATION,
        export=(False, "also export the last policy to this directory, for transformers and vLLM", str),
        profile=(False, "trace these steps of each stage of the first round, as steps=10:13", str),
        strict=(False, "stop at the end of a round that shows a sign of divergence", None),
        verbose=(False, "print all metrics of each round, and compile times by program", None),
        pod=(False, "run as one process of a TPU pod", None),
        coordinator=(False, "run as one of several processes: HOST:PORT of process 0", str),
        num_processes=(False, "with --coordinator: the number of processes", int),
        process_id=(False, "with --coordinator: the index of this process, from 0", int),
    )
    command(sft, **training)
    given = (False, "responses of another engine, JSONL; plays the one round that they answer", str)
    command(play, **training, generations=given)


def _model_commands(command: Callable[..., None]) -> None:
    command(
        evaluate,
        "eval",
        config=_CONFIGURATION,
        checkpoint=(False, "a run directory, a model or a .gguf file; default: the configuration's policy.path", str),
        round=(False, "with a run directory: the policy of this round; default: the newest", int),
        tasks=(False, "names of evaluation.tasks, separated by commas; default: all", str),
        out=(False, "write every response to this file, JSONL; with --harness, the results as JSON", str),
        harness=(False, "run these lm-eval tasks instead, separated by commas", str),
        harness_path=(False, "with --harness: a directory of task YAML files instead of lm-eval's own tasks", str),
        chat_template=(False, "with --harness: apply the chat template to the contexts", None),
        num_fewshot=(False, "with --harness: number of few-shot examples", int),
        limit=(False, "with --harness: number of documents per task, from the first", int),
    )
    command(
        generate,
        config=_CONFIGURATION,
        prompts=(False, "prompts, JSONL, such as `tpaw prompts` writes; default: the configuration's data", str),
        model=(False, "use this model instead of the configuration's policy.path", str),
        round=(False, "use the random stream of this round; default: 0", int),
        num_generations=(False, "responses per prompt; default: 1", int),
        out=(True, "the JSONL file to write", str),
    )
    command(
        export,
        run=(True, "a run directory", str),
        round=(False, "the policy of this round; default: the newest", int),
        out=(True, "the directory to write", str),
    )


def _reading_commands(command: Callable[..., None]) -> None:
    command(
        report,
        runs=(True, "run directories; NAME=DIRECTORY groups runs under one name", tuple),
        out=(True, "the HTML file to write", str),
        png=(False, "also write each plot as a PNG to this directory", str),
    )
    command(prompts, config=_CONFIGURATION, out=(True, "the JSONL file to write", str))
    command(
        plan,
        config=_CONFIGURATION,
        topology=(True, "such as v5e:16x16, or '2 x v5e:16x16' for two slices; several separated by commas", str),
        slices=(False, "number of slices of each topology; default: 1", int),
        architecture=(False, "where config.json is, if not at policy.path; weights are not needed", str),
        prompts=(False, "prompts per round; default: data.max_prompts, or 50,000", int),
        stages=(False, "plan only some of step,scoring,prefill,decode", str),
        search=(False, "also search for the most rows per device and the longest row that fit", None),
        json=(False, "also write the numbers to this file", str),
    )


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
            raise ValueError(f"Unexpected argument '{word}'. Write overrides as --key value.")
    if waiting is not None:
        raise ValueError(f"The override '--{waiting}' has no value.")
    return found


def _no_overrides(overrides: list[str]) -> None:
    if overrides:
        raise ValueError(f"'--{overrides[0].partition('=')[0]}' is not an option of this command.")


if __name__ == "__main__":
    sys.exit(main())
