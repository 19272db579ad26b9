"""Read a configuration from YAML files and command-line overrides, check it, and turn it back into plain values."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from tpaw_jax.config.schema import (
    DataConfig,
    EvaluationConfig,
    ObjectiveConfig,
    PackingConfig,
    RunConfig,
    SamplingConfig,
    TrainConfig,
)

SFT: dict[str, Any] = {
    "directory": "runs/sft",
    "rounds": 1,
    "objective": {"loss": "sft"},
    "data": {"max_length": 2048, "max_prompt_length": 1024},
    "train": {"optimizer": "adamw", "learning_rate": 2e-5, "schedule": "cosine", "epochs": 1, "batch_triplets": 128},
}
"""The defaults of `tpaw sft` that differ from those of `tpaw play`: the recipe of zephyr-7b-sft-full."""


def load(
    paths: str | Path | Sequence[str | Path], overrides: Sequence[str] = (), defaults: Mapping[str, Any] | None = None
) -> RunConfig:
    """Read a configuration. Later files override earlier ones, which override `defaults`.

    Overrides of the form `key.subkey=value` are applied last.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: not YAML, an unknown key, or a value of the wrong type or out of range; names the file and the key.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    fields = dict(defaults or {})
    for path in map(Path, paths):
        in_file = _read(path)
        parse(RunConfig, in_file, str(path))
        fields = _merge(in_file, fields)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"The override '{override}' is not of the form key=value.")
        try:
            _set(fields, key, yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise ValueError(f"The value of the override '{override}' is not valid YAML.") from error
    where = " with ".join(map(str, paths))
    config = parse(RunConfig, fields, where)
    validate(config, where)
    return config


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such configuration file.")
    try:
        fields = yaml.safe_load(path.read_text()) or {}
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line}: not valid YAML ({error.problem or error.context}).") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid YAML ({error}).") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: a mapping of keys to values was expected, not {type(fields).__name__}.")
    return fields


def parse(cls: type, fields: Any, where: str, prefix: str = "") -> Any:
    """Make the dataclass `cls` from a mapping; `where` and `prefix` name the place in errors.

    Raises:
        ValueError: an unknown key, or a value of the wrong type; names the key.
    """
    if not isinstance(fields, Mapping):
        raise ValueError(f"{where}: '{prefix.rstrip('.')}' must be a mapping of keys, not {fields!r}.")
    hints = typing.get_type_hints(cls)
    unknown = [key for key in fields if key not in hints]
    if unknown:
        close = difflib.get_close_matches(str(unknown[0]), hints, n=1)
        hint = f" Did you mean '{prefix}{close[0]}'?" if close else f" Known keys: {', '.join(hints)}."
        raise ValueError(f"{where}: unknown key '{prefix}{unknown[0]}'.{hint}")
    return cls(**{key: _coerce(hints[key], value, where, prefix + key) for key, value in fields.items()})


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as dictionaries and lists that YAML can hold; `parse` reads it back."""
    return plain(dataclasses.asdict(config))


class Check(NamedTuple):
    """A condition on the configuration; if it does not hold, the error is `{key} {problem}`."""

    holds: bool
    key: str
    problem: str


def validate(config: RunConfig, where: str) -> None:
    """Check the values of a configuration; `where` names its files in the error.

    Raises:
        ValueError: a value is out of range or does not fit another one; names the first such key.
    """
    checks = [
        *_check_run(config),
        *_check_data(config.data),
        *_check_sampling(config.sampling),
        *_check_objective(config.objective),
        *_check_packing(config.packing, config.longest_triplet),
        *_check_train(config.train),
        *_check_evaluation(config.evaluation),
    ]
    for check in checks:
        if not check.holds:
            raise ValueError(f"{where}: {check.key} {check.problem}.")


def _check_run(c: RunConfig) -> list[Check]:
    one_round, anew = c.rounds == 1, c.data.responses == "sampled"
    return [
        Check(one_round or c.objective.loss != "sft", "rounds", "must be 1 where objective.loss is sft"),
        Check(one_round or anew, "rounds", "must be 1 where data.responses is rejected: no round would answer anew"),
        Check(bool(c.policy.path), "policy.path", "names no model"),
        Check(c.rounds >= 1, "rounds", "must be at least 1"),
        Check(c.policy.head_chunk >= 1, "policy.head_chunk", "must be at least 1"),
    ]


def _check_data(c: DataConfig) -> list[Check]:
    usable, counts = all(s.path and s.weight > 0 for s in c.sources), (c.max_prompts, c.holdout_prompts)
    return [
        Check(len(c.sources) >= 1, "data.sources", "names no data"),
        Check(usable, "data.sources", "needs a path and a weight above 0 each"),
        Check(c.max_prompt_length >= 1, "data.max_prompt_length", "must be at least 1"),
        Check(c.max_length > c.max_prompt_length, "data.max_length", "must exceed data.max_prompt_length"),
        Check(min(counts) >= 0, "data.max_prompts", "and holdout_prompts cannot be negative"),
    ]


def _check_sampling(c: SamplingConfig) -> list[Check]:
    sizes, least, dtypes = (c.slots, c.prefill_tokens), c.min_new_tokens, ("", "float32", "bfloat16")
    return [
        Check(c.max_new_tokens >= 1, "sampling.max_new_tokens", "must be at least 1"),
        Check(c.temperature >= 0, "sampling.temperature", "cannot be negative"),
        Check(0 < c.top_p <= 1, "sampling.top_p", "must be above 0 and at most 1"),
        Check(c.top_k >= 0, "sampling.top_k", "cannot be negative"),
        Check(min(sizes) >= 1, "sampling.slots", "and prefill_tokens must be at least 1"),
        Check(0 <= least <= c.max_new_tokens, "sampling.min_new_tokens", "must be from 0 to sampling.max_new_tokens"),
        Check(c.tensor >= 1, "sampling.tensor", "must be at least 1"),
        Check(all(c.stop_strings), "sampling.stop_strings", "cannot have an empty text"),
        Check(c.cache_dtype in dtypes, "sampling.cache_dtype", "must be float32, bfloat16 or empty"),
    ]


def _check_objective(c: ObjectiveConfig) -> list[Check]:
    return [
        Check(c.n_max >= 1, "objective.n_max", "must be at least 1"),
        Check(c.opponent_rounds >= 0, "objective.opponent_rounds", "cannot be negative"),
        Check(len(c.lam) >= 1, "objective.lam", "needs at least one value"),
        Check(min(c.lam, default=1) > 0, "objective.lam", "must be above 0"),
        Check(c.tolerance >= 0 or c.tolerance == -1, "objective.tolerance", "must be -1 or above"),
    ]


def _check_packing(c: PackingConfig, longest: int) -> list[Check]:
    needed = "must hold data.max_length + sampling.max_new_tokens tokens; of rejected responses, 2 data.max_length"
    return [
        Check(c.alignment >= 0, "packing.alignment", "cannot be negative"),
        Check(c.rows_per_batch >= 0, "packing.rows_per_batch", "cannot be negative"),
        Check(c.scoring_batches >= 1, "packing.scoring_batches", "must be at least 1"),
        Check(c.max_responses_per_row >= 2, "packing.max_responses_per_row", "must be at least 2"),
        Check(c.row_length >= longest, "packing.row_length", needed),
    ]


def _check_train(c: TrainConfig) -> list[Check]:
    return [
        Check(len(c.learning_rate) >= 1, "train.learning_rate", "needs at least one value"),
        Check(0 <= c.warmup_ratio < 1, "train.warmup_ratio", "must be at least 0 and below 1"),
        Check(c.epochs >= 1, "train.epochs", "must be at least 1"),
        Check(c.batch_triplets >= 1, "train.batch_triplets", "must be at least 1"),
        Check(c.max_grad_norm > 0, "train.max_grad_norm", "must be above 0"),
        Check(c.max_skipped_in_a_row >= 1, "train.max_skipped_in_a_row", "must be at least 1"),
        Check(c.save_every_steps >= 1, "train.save_every_steps", "must be at least 1"),
        Check(c.save_every_minutes > 0, "train.save_every_minutes", "must be above 0"),
    ]


def _check_evaluation(c: EvaluationConfig) -> list[Check]:
    checks = [Check(not c.each_round or bool(c.tasks), "evaluation.each_round", "needs evaluation.tasks")]
    names = [task.name for task in c.tasks]
    for task in c.tasks:
        key = f"evaluation.tasks, '{task.name}'"
        named = bool(re.fullmatch(r"[\w.-]+", task.name) and task.path) and names.count(task.name) == 1
        large_enough = task.max_new_tokens >= 1 and task.limit >= 0
        compiles = _compiles(task.answer) and _compiles(task.response)
        checks += [
            Check(named, "evaluation.tasks", "need a name of their own, of letters, digits, _ . and -, and a path"),
            Check(large_enough, key, "has a max_new_tokens or limit that is too small"),
            Check(compiles, key, "has no regular expression in answer or response"),
        ]
    return checks


def _compiles(pattern: str) -> bool:
    try:
        return re.compile(pattern) is not None
    except re.error:
        return False


def _coerce(hint: Any, value: Any, where: str, key: str) -> Any:
    """Convert `value` to the type of its field; a single value counts as a list of one."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return parse(typing.cast(type, hint), value, where, key + ".")
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_coerce(arguments[0], item, where, f"{key}[{i}]") for i, item in enumerate(items))
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where}: {key} is {value!r}; it must be one of {', '.join(map(str, arguments))}.")
        return value
    if hint is float and isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 5e-7 as a string
        except ValueError:
            pass
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{where}: {key} is {value!r}; a value of type {hint.__name__} was expected.")
    return value


def _merge(fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`fields`, with missing keys taken from `defaults`, section by section."""
    both = {key: (fields[key], defaults[key]) for key in fields if key in defaults}
    sections = {key: _merge(*pair) for key, pair in both.items() if all(isinstance(one, Mapping) for one in pair)}
    return {**defaults, **fields, **sections}


def _set(fields: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        fields = fields.setdefault(parent, {})
        if not isinstance(fields, dict):
            raise ValueError(f"The override '{key}' goes through '{parent}', which is not a section.")
    fields[last] = value


def flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested sections by their full keys, such as `train.epochs`."""
    values: dict[str, Any] = {}
    for key, value in fields.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return values


def plain(value: Any) -> Any:
    """Replace tuples by lists, at any depth."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    return value
