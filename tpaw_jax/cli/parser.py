"""The options of all commands."""

import argparse
import functools
from collections.abc import Callable
from typing import Any

from tpaw_jax.cli.measuring import bench, tune
from tpaw_jax.cli.models import evaluate, export, export_data, generate
from tpaw_jax.cli.offline import data, plan, prompts, report
from tpaw_jax.cli.training import demo, play, sft


def _on_this_host(path: str) -> str:
    if "://" in path:
        raise argparse.ArgumentTypeError(f"{path} is not a path on this host; only run directories may be in a bucket")
    return path


_CONFIGURATION = (True, "YAML files, each overriding the ones before; set any key with --key.subkey value", list)


_PROCESSES: dict[str, Any] = dict(
    pod=(False, "run as one process of a TPU pod", None),
    coordinator=(False, "run as one of several processes: HOST:PORT of process 0", str),
    num_processes=(False, "with --coordinator: the number of processes", int),
    process_id=(False, "with --coordinator: the index of this process, from 0", int),
    host_timeout=(False, "seconds without a heartbeat after which a process counts as failed; default: 60", float),
    max_restarts=(False, "how often each process starts again after one has failed; default: 0", int),
)


def make_parser() -> argparse.ArgumentParser:
    """The parser of `tpaw`; the function of a command is its default for `command`."""
    parser = argparse.ArgumentParser(prog="tpaw", description="Team-based self-play fine-tuning of language models.")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(required=True, metavar="command")
    command = functools.partial(_command, commands)
    _training_commands(command)
    _model_commands(command)
    _measuring_commands(command)
    _offline_commands(command)
    return parser


def _training_commands(command: Callable[..., None]) -> None:
    training: dict[str, Any] = dict(
        config=_CONFIGURATION,
        export=(False, "also export the last policy to this directory, for transformers and vLLM", _on_this_host),
        profile=(False, "trace these steps of each stage of the first round, as steps=10:13", str),
        strict=(False, "stop at the end of a round that shows a sign of divergence", None),
        verbose=(False, "print all metrics of each round, and compile times by program", None),
        **_PROCESSES,
    )
    command(demo, **{name: option for name, option in training.items() if name != "config"})
    command(sft, **training)
    given = (False, "responses of another engine, JSONL; plays the one round that they answer", _on_this_host)
    command(play, **training, generations=given)


def _model_commands(command: Callable[..., None]) -> None:
    command(
        evaluate,
        "eval",
        config=_CONFIGURATION,
        checkpoint=(False, "a run directory, a model or a .gguf file; default: the configuration's policy.path", str),
        round=(False, "with a run directory: the policy of this round; default: the newest", int),
        tasks=(False, "names of evaluation.tasks, separated by commas; default: all", str),
        out=(False, "write every response to this file, JSONL; with --harness, the results as JSON", _on_this_host),
        harness=(False, "run these lm-eval tasks instead, separated by commas", str),
        harness_path=(
            False,
            "with --harness: a directory of task YAML files instead of lm-eval's own tasks",
            _on_this_host,
        ),
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
        out=(True, "the JSONL file to write", _on_this_host),
    )
    command(
        export,
        run=(True, "a run directory", str),
        round=(False, "the policy of this round; default: the newest", int),
        merge=(False, "merge adapters into their base, instead of writing them alone", None),
        out=(True, "the directory to write", _on_this_host),
    )
    command(
        export_data,
        "export-data",
        run=(True, "a run directory", str),
        round=(False, "the triplets of this round; default: the newest that is scored", int),
        out=(True, "the .parquet file, or the directory of a saved dataset, to write", _on_this_host),
    )


def _measuring_commands(command: Callable[..., None]) -> None:
    command(
        bench,
        config=(False, *_CONFIGURATION[1:]),
        architecture=(False, "where config.json is, if not at policy.path; weights are not needed", _on_this_host),
        stages=(False, "measure only some of step,scoring,prefill,decode", str),
        calls=(False, "timed calls of each stage; default: 10", int),
        data=(False, "use the lengths of the configuration's data, instead of assumed ones", None),
        plan=(False, "take the predictions from this plan of these devices, of tpaw plan --json", _on_this_host),
        json=(False, "append the readings to this file, one JSON object per line", _on_this_host),
        compare=(False, "measure nothing; compare two files that --json wrote: BEFORE AFTER", list),
        **_PROCESSES,
    )
    command(
        tune,
        config=_CONFIGURATION,
        out=(True, "the YAML file to write, for --config RUN.yaml OUT.yaml", _on_this_host),
        minutes=(False, "how long to search; default: 20", float),
        architecture=(False, "where config.json is, if not at policy.path; weights are not needed", _on_this_host),
        stages=(False, "tune only some of step,scoring,prefill,decode", str),
        calls=(False, "timed calls of each program; default: 10", int),
        **_PROCESSES,
    )


def _offline_commands(command: Callable[..., None]) -> None:
    command(
        report,
        runs=(True, "run directories; NAME=DIRECTORY groups runs under one name", tuple),
        out=(True, "the HTML file to write", _on_this_host),
        png=(False, "also write each plot as a PNG to this directory", _on_this_host),
    )
    command(data, config=_CONFIGURATION, show=(False, "also show this many prompts and targets as tokens", int))
    command(prompts, config=_CONFIGURATION, out=(True, "the JSONL file to write", _on_this_host))
    command(
        plan,
        config=_CONFIGURATION,
        topology=(True, "such as v5e:16x16, or '2 x v5e:16x16' for two slices; several separated by commas", str),
        slices=(False, "number of slices of each topology; default: 1", int),
        architecture=(False, "where config.json is, if not at policy.path; weights are not needed", _on_this_host),
        prompts=(False, "prompts per round; default: data.max_prompts, or 50,000", int),
        stages=(False, "plan only some of step,scoring,prefill,decode", str),
        calibration=(False, "readings on such chips, of tpaw bench --json, by which to scale the times", _on_this_host),
        search=(False, "also search for the most rows per device and the longest row that fit", None),
        json=(False, "also write the numbers to this file", _on_this_host),
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
