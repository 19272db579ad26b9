"""Read a configuration from YAML files and command-line overrides, check it, and turn it back into plain values."""

import dataclasses
import difflib
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from tpaw_jax.config.schema import EvaluationConfig, RunConfig

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
        parse(RunConfig, in_file, str(path))  # so that an error names this file
        fields = _merge(in_file, fields)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"The override '{override}' is not of the form key=value.")
        try:
            _set(fields, key, yaml.safe_load(text) if text else "")
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
    fields = {key: value for key, value in fields.items() if not _is_removed(prefix + str(key), value, where)}
    unknown = [key for key in fields if key not in hints]
    if unknown:
        close = difflib.get_close_matches(str(unknown[0]), hints, n=1)
        hint = f" Did you mean '{prefix}{close[0]}'?" if close else f" Known keys: {', '.join(hints)}."
        raise ValueError(f"{where}: unknown key '{prefix}{unknown[0]}'.{hint}")
    return cls(**{key: _coerce(hints[key], value, where, prefix + key) for key, value in fields.items()})


def with_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """The configuration with other values of some keys, such as `{"train.epochs": 1}`.

    Raises:
        ValueError: a key is unknown, or a value does not fit; names the key.
    """
    fields = to_dict(config)
    for key, value in values.items():
        _set(fields, key, value)
    changed = parse(RunConfig, fields, "the configuration")
    validate(changed, "the configuration")
    return changed


def _is_removed(key: str, value: Any, where: str) -> bool:
    """Whether a key of an older version can be ignored.

    Raises:
        ValueError: the older version did something that this one cannot do.
    """
    if key != "packing.alignment":
        return False
    if value not in (0, 1):
        raise ValueError(
            f"{where}: packing.alignment is {value}, but rows no longer have padding between responses. Remove "
            "the key, or finish a run that began with it with the version that began it."
        )
    return True


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as dictionaries and lists that YAML can hold; `parse` reads it back."""
    return plain(dataclasses.asdict(config))


AT_LEAST = {
    "rounds": 1,
    "policy.head_chunk": 1,
    "policy.lora.rank": 0,
    "policy.attention_chunks": 1,
    "data.max_prompt_length": 1,
    "data.max_prompts": 0,
    "data.holdout_prompts": 0,
    "sampling.max_new_tokens": 1,
    "sampling.temperature": 0,
    "sampling.top_k": 0,
    "sampling.slots": 1,
    "sampling.prefill_tokens": 1,
    "sampling.min_new_tokens": 0,
    "sampling.tensor": 1,
    "mesh.context": 1,
    "mesh.expert": 1,
    "objective.n_max": 1,
    "objective.opponent_rounds": 0,
    "packing.rows_per_batch": 0,
    "packing.scoring_batches": 1,
    "packing.max_responses_per_row": 2,
    "train.epochs": 1,
    "train.batch_triplets": 1,
    "train.max_skipped_in_a_row": 1,
    "train.save_every_steps": 1,
}
"""The least value of each integer option, and of the temperature."""


def validate(config: RunConfig, where: str) -> None:
    """Check the values of a configuration; `where` names its files in the error.

    Raises:
        ValueError: a value is out of range or does not fit another one; names the first such key.
    """
    values = flat(to_dict(config))
    too_small = (
        (values[key] == "auto" or values[key] >= least, key, f"must be at least {least}")
        for key, least in AT_LEAST.items()
    )
    checks = [*too_small, *_check_values(config), *_check_adapters(config), *_check_tasks(config.evaluation)]
    for holds, key, problem in checks:
        if not holds:
            raise ValueError(f"{where}: {key} {problem}.")


Check = tuple[bool, str, str]
"""(whether it holds, key, problem): if the check does not hold, the error is `{key} {problem}`."""


def _check_values(c: RunConfig) -> list[Check]:
    data, sampling, objective, train = c.data, c.sampling, c.objective, c.train
    one_round, sampled = c.rounds == 1, data.responses == "sampled"
    measured, response = objective.tolerance == -1, "" if objective.loss == "sft" else " and one response"
    return [
        (one_round or objective.loss != "sft", "rounds", "must be 1 where objective.loss is sft"),
        (one_round or sampled, "rounds", "must be 1 where data.responses is rejected: the responses never change"),
        (data.train_on == "last" or sampled, "data.train_on", "must be last where data.responses is rejected"),
        (bool(c.policy.path), "policy.path", "is not set"),
        (len(data.sources) >= 1, "data.sources", "is empty"),
        (all(s.path for s in data.sources), "data.sources", "has an entry without a path"),
        (all(s.weight > 0 for s in data.sources), "data.sources", "has an entry whose weight is not above 0"),
        (data.max_length > data.max_prompt_length, "data.max_length", "must exceed data.max_prompt_length"),
        (0 < sampling.top_p <= 1, "sampling.top_p", "must be above 0 and at most 1"),
        (
            sampling.min_new_tokens <= sampling.max_new_tokens,
            "sampling.min_new_tokens",
            "must be at most sampling.max_new_tokens",
        ),
        (all(sampling.stop_strings), "sampling.stop_strings", "contains an empty string"),
        (len(objective.lam) >= 1, "objective.lam", "needs at least one value"),
        (min(objective.lam, default=1) > 0, "objective.lam", "must be above 0"),
        (objective.tolerance >= 0 or measured, "objective.tolerance", "must be at least 0, or -1 to measure it"),
        (
            c.packing.row_length == 0 or c.packing.row_length >= c.longest_tree,
            "packing.row_length",
            f"must be at least {c.longest_tree}, the maximum tokens of a prompt with its target{response}",
        ),
        (
            all(re.match(r"\w+=", text) for text in c.mesh.compiler_options),
            "mesh.compiler_options",
            "has an entry that is not name=value",
        ),
        (len(train.learning_rate) >= 1, "train.learning_rate", "needs at least one value"),
        (0 <= train.warmup_ratio < 1, "train.warmup_ratio", "must be at least 0 and below 1"),
        (train.max_grad_norm > 0, "train.max_grad_norm", "must be above 0"),
        (train.save_every_minutes > 0, "train.save_every_minutes", "must be above 0"),
    ]


def _check_adapters(c: RunConfig) -> list[Check]:
    lora = c.policy.lora
    return [
        (lora.alpha > 0, "policy.lora.alpha", "must be above 0"),
        (bool(lora.targets), "policy.lora.targets", "is empty"),
        (not (lora.dora and "experts" in lora.targets), "policy.lora.targets", "must not contain experts with dora"),
        (lora.used or not lora.base_dtype, "policy.lora.base_dtype", "needs policy.lora.rank or policy.lora.path"),
        (
            lora.used or not (lora.dora or lora.rslora or lora.merge_each_round),
            "policy.lora.rank",
            "must be set for dora, rslora or merge_each_round",
        ),
        (
            not (lora.merge_each_round and c.train.optimizer == "adafactor"),
            "train.optimizer",
            "must not be adafactor with policy.lora.merge_each_round: its steps depend on the adapters of other rounds",
        ),
        (
            not (lora.dora and lora.merge_each_round),
            "policy.lora.merge_each_round",
            "must be false with dora, whose adapters cannot be added up",
        ),
    ]


def _check_tasks(c: EvaluationConfig) -> list[Check]:
    checks: list[Check] = [(bool(c.tasks) or not c.each_round, "evaluation.each_round", "needs evaluation.tasks")]
    names = [task.name for task in c.tasks]
    for task in c.tasks:
        key = f"evaluation.tasks, '{task.name}':"
        checks += [
            (names.count(task.name) == 1, key, "another task has this name"),
            (bool(re.fullmatch(r"[\w.-]+", task.name)), key, "a name consists of letters, digits, _ . and -"),
            (bool(task.path), key, "the path is not set"),
            (task.max_new_tokens >= 1, key, "max_new_tokens must be at least 1"),
            (task.limit >= 0, key, "limit must be at least 0"),
            (_compiles(task.answer), key, "answer is not a valid regular expression"),
            (_compiles(task.response), key, "response is not a valid regular expression"),
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
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return parse(typing.cast(type, hint), value, where, key + ".")
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_coerce(arguments[0], item, where, f"{key}[{i}]") for i, item in enumerate(items))
    if origin is dict:
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise ValueError(f"{where}: {key} is {value!r}; a mapping of names to values was expected.")
        return {name: _coerce(arguments[1], item, where, f"{key}.{name}") for name, item in value.items()}
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where}: {key} is {value!r}; it must be one of {', '.join(map(str, arguments))}.")
        return value
    if origin is typing.Union:  # of a type and a literal
        plain_hint, literal = arguments
        return value if value in typing.get_args(literal) else _coerce(plain_hint, value, where, key)
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
