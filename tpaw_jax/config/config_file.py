"""Configurations from strict YAML and command-line overrides, checked key by key, and back to plain values."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from tpaw_jax.config.schema import RunConfig

SFT: dict[str, Any] = {
    "directory": "runs/sft",
    "rounds": 1,
    "objective": {"loss": "sft"},
    "data": {"max_length": 2048, "max_prompt_length": 1024},
    "train": {"optimizer": "adamw", "learning_rate": 2e-5, "schedule": "cosine", "epochs": 1, "batch_triplets": 128},
}
"""What `tpaw sft` has for defaults where they differ: the recipe of zephyr-7b-sft-full."""


def load(
    paths: str | Path | Sequence[str | Path], overrides: Sequence[str] = (), defaults: Mapping[str, Any] | None = None
) -> RunConfig:
    """The configuration of a YAML file, or of several, each over those before it, all over `defaults`.

    Overrides `key.subkey=value` are applied last.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not YAML, an unknown key, a value of the wrong type or out of range; names the file and the key.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    fields = dict(defaults or {})
    for path in map(Path, paths):
        read = _read(path)
        parse(RunConfig, read, str(path))
        fields = _over(read, fields)
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
    """A dataclass from a mapping; unknown keys and wrong types are errors that name the key."""
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
    """The configuration as plain YAML-able values; `parse` reads it back."""
    return plain(dataclasses.asdict(config))


def validate(config: RunConfig, where: str) -> None:
    """Raise a ValueError that names the first key whose value cannot work."""
    data, sampling, packing, train = config.data, config.sampling, config.packing, config.train
    supervised = config.objective.loss == "sft"
    checks = [
        (config.rounds == 1 or not supervised, "rounds", "must be 1 where objective.loss is sft"),
        (
            config.rounds == 1 or data.responses == "sampled",
            "rounds",
            "must be 1 where data.responses is rejected: no round would answer anew",
        ),
        (bool(config.policy.path), "policy.path", "names no model"),
        (config.rounds >= 1, "rounds", "must be at least 1"),
        (config.policy.head_chunk >= 1, "policy.head_chunk", "must be at least 1"),
        (len(data.sources) >= 1, "data.sources", "names no data"),
        (all(s.path and s.weight > 0 for s in data.sources), "data.sources", "needs a path and a weight above 0 each"),
        (data.max_prompt_length >= 1, "data.max_prompt_length", "must be at least 1"),
        (data.max_length > data.max_prompt_length, "data.max_length", "must exceed data.max_prompt_length"),
        (
            data.max_prompts >= 0 and data.holdout_prompts >= 0,
            "data.max_prompts",
            "and holdout_prompts cannot be negative",
        ),
        (sampling.max_new_tokens >= 1, "sampling.max_new_tokens", "must be at least 1"),
        (sampling.temperature >= 0, "sampling.temperature", "cannot be negative"),
        (0 < sampling.top_p <= 1, "sampling.top_p", "must be above 0 and at most 1"),
        (sampling.top_k >= 0, "sampling.top_k", "cannot be negative"),
        (
            sampling.slots >= 1 and sampling.prefill_tokens >= 1,
            "sampling.slots",
            "and prefill_tokens must be at least 1",
        ),
        (
            0 <= sampling.min_new_tokens <= sampling.max_new_tokens,
            "sampling.min_new_tokens",
            "must be from 0 to sampling.max_new_tokens",
        ),
        (sampling.tensor >= 1, "sampling.tensor", "must be at least 1"),
        (all(sampling.stop_strings), "sampling.stop_strings", "cannot have an empty text"),
        (
            sampling.cache_dtype in ("", "float32", "bfloat16"),
            "sampling.cache_dtype",
            "must be float32, bfloat16 or empty",
        ),
        (config.objective.n_max >= 1, "objective.n_max", "must be at least 1"),
        (config.objective.opponent_rounds >= 0, "objective.opponent_rounds", "cannot be negative"),
        (len(config.objective.lam) >= 1, "objective.lam", "needs at least one value"),
        (min(config.objective.lam, default=1) > 0, "objective.lam", "must be above 0"),
        (
            config.objective.tolerance >= 0 or config.objective.tolerance == -1,
            "objective.tolerance",
            "must be -1 or above",
        ),
        (packing.alignment >= 0, "packing.alignment", "cannot be negative"),
        (packing.rows_per_batch >= 0, "packing.rows_per_batch", "cannot be negative"),
        (packing.scoring_batches >= 1, "packing.scoring_batches", "must be at least 1"),
        (packing.max_responses_per_row >= 2, "packing.max_responses_per_row", "must be at least 2"),
        (
            packing.row_length >= config.longest_triplet,
            "packing.row_length",
            "must hold data.max_length + sampling.max_new_tokens tokens; of rejected responses, 2 data.max_length",
        ),
        (len(train.learning_rate) >= 1, "train.learning_rate", "needs at least one value"),
        (0 <= train.warmup_ratio < 1, "train.warmup_ratio", "must be at least 0 and below 1"),
        (train.epochs >= 1, "train.epochs", "must be at least 1"),
        (train.batch_triplets >= 1, "train.batch_triplets", "must be at least 1"),
        (train.max_grad_norm > 0, "train.max_grad_norm", "must be above 0"),
        (train.max_skipped_in_a_row >= 1, "train.max_skipped_in_a_row", "must be at least 1"),
        (train.save_every_steps >= 1, "train.save_every_steps", "must be at least 1"),
        (train.save_every_minutes > 0, "train.save_every_minutes", "must be above 0"),
    ]
    checks += [
        (
            not config.evaluation.each_round or bool(config.evaluation.tasks),
            "evaluation.each_round",
            "needs evaluation.tasks",
        )
    ]
    for task in config.evaluation.tasks:
        where_of = f"evaluation.tasks, '{task.name}'"
        named = (
            bool(re.fullmatch(r"[\w.-]+", task.name) and task.path)
            and [t.name for t in config.evaluation.tasks].count(task.name) == 1
        )
        checks += [
            (named, "evaluation.tasks", "need a name of their own, of letters, digits, _ . and -, and a path"),
            (task.max_new_tokens >= 1 and task.limit >= 0, where_of, "has a max_new_tokens or limit that is too small"),
            (
                _compiles(task.answer) and _compiles(task.response),
                where_of,
                "has no regular expression in answer or response",
            ),
        ]
    for holds, key, problem in checks:
        if not holds:
            raise ValueError(f"{where}: {key} {problem}.")


def _compiles(pattern: str) -> bool:
    try:
        return re.compile(pattern) is not None
    except re.error:
        return False


def _coerce(hint: Any, value: Any, where: str, key: str) -> Any:
    """`value` as the type a field declares; a lone value stands for a list of one."""
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
            return float(value)  # YAML 1.1 reads 5e-7 as text
        except ValueError:
            pass
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{where}: {key} is {value!r}; a value of type {hint.__name__} was expected.")
    return value


def _over(fields: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """`fields` with what they leave out taken from `others`, section by section."""
    both = {key: (fields[key], others[key]) for key in fields if key in others}
    sections = {key: _over(*two) for key, two in both.items() if all(isinstance(one, Mapping) for one in two)}
    return {**others, **fields, **sections}


def _set(fields: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        fields = fields.setdefault(parent, {})
        if not isinstance(fields, dict):
            raise ValueError(f"The override '{key}' goes through '{parent}', which is not a section.")
    fields[last] = value


def flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested sections by their whole keys, as `train.epochs`."""
    found: dict[str, Any] = {}
    for key, value in fields.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def plain(value: Any) -> Any:
    """Dictionaries and lists in place of mappings and tuples."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    return value
