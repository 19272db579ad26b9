"""The run's configuration: frozen dataclasses, strict YAML, command-line overrides. Every knob names its source."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml


def knob(default: Any, doc: str, source: str = "") -> Any:
    """A dataclass field with its one line of documentation and where its default comes from."""
    return dataclasses.field(default=default, metadata={"doc": doc, "source": source})


def section(cls: type) -> Any:
    """A nested section of the configuration."""
    return dataclasses.field(default_factory=cls)


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """The model that plays: theta_0, its number formats and memory."""

    path: str = knob("", "theta_0: a Hugging Face directory, a hub id or a .gguf file")
    tokenizer: str = knob("", "where the tokenizer is, if not beside the model")
    param_dtype: Literal["float32", "bfloat16"] = knob(
        "float32",
        "what parameters are stored and computed from; with bfloat16 the optimizer updates a float32 master copy, and "
        "the ring holds half the bytes",
    )
    compute_dtype: Literal["float32", "bfloat16"] = knob("bfloat16", "what layers compute in", "SPIN")
    remat: Literal["auto", "none", "dots", "head", "offload", "layer"] = knob(
        "layer",
        "what the backward pass recomputes: nothing; all but matmuls and attention (dots); also the logits (head), and "
        "the rest in the host's memory (offload); all of a layer; auto: the first of these whose step fits the device",
    )
    head_chunk: int = knob(256, "predictions of each row whose logits are computed at a time")


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One data source of a mix."""

    path: str = knob("", "a .jsonl, .json or .parquet file, a datasets directory, or a hub id")
    split: str = knob("train", "the split of a hub dataset or of a saved dataset dict")
    weight: float = knob(1.0, "share of the source's records taken; above 1 repeats them", "zephyr's dataset_mixer")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Prompts and target responses."""

    sources: tuple[SourceConfig, ...] = knob((), "what to read; several are mixed by weight")
    chat_template: str = knob("auto", "auto: the tokenizer's own; none: plain text; else a Jinja file or text")
    system_prompt: str = knob("", "put before every prompt as the system turn")
    max_prompt_length: int = knob(512, "tokens; longer prompts lose their beginning", "SPIN")
    max_length: int = knob(1024, "tokens of prompt and target together; longer targets lose their end", "SPIN")
    max_prompts: int = knob(0, "use so many prompts, chosen by the seed; 0 uses all", "TPAW: a 50k subset")
    holdout_prompts: int = knob(0, "prompts kept out of training; their target log-prob is reported each round")
    responses: Literal["sampled", "rejected"] = knob(
        "sampled", "what targets are told apart from: the policy's own answers, or the records' rejected ones (DPO)"
    )
    skip_bad_records: bool = knob(False, "count and list malformed records instead of stopping at the first")


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the policy answers the prompts."""

    max_new_tokens: int = knob(256, "tokens a response may have", "SPIN")
    temperature: float = knob(1.0, "0 is greedy", "SPIN")
    top_p: float = knob(1.0, "nucleus; 1 keeps all", "SPIN")
    top_k: int = knob(0, "tokens to choose among; 0 keeps all", "transformers' sampling")
    slots: int = knob(32, "sequences that a process decodes at once")
    prefill_tokens: int = knob(512, "tokens of prompts computed at once, packed, on each device")
    min_new_tokens: int = knob(0, "tokens before which no stop token is sampled", "transformers' generation")
    stop_strings: tuple[str, ...] = knob((), "texts that end a response", "transformers' generation")
    tensor: int = knob(
        1, "devices that share one copy of the model while it samples; above 1, all processes sample together"
    )
    cache_dtype: str = knob(
        "", "of cached keys and values: float32 or bfloat16; empty: policy.compute_dtype, on CPU float32"
    )


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """The team loss."""

    loss: Literal["team", "sft"] = knob(
        "team", "the team loss on triplets; or sft: the mean negative log-prob of the targets alone (`tpaw sft`)"
    )
    n_max: int = knob(3, "newest players that count", "TPAW: N_max")
    opponent_rounds: int = knob(0, "newest rounds whose responses count; 0: as many as players", "TPAW; SPIN: 2")
    lam: tuple[float, ...] = knob((0.1,), "reward scale of each round, the last one repeating", "SPIN's beta (A1)")
    eta: float = knob(6.0, "target response weight where the target drifts", "TPAW")
    gamma: float = knob(0.5, "attention to the player that separates worst", "TPAW")
    tolerance: float = knob(
        -1.0, "largest reward that counts as drifting; -1: the noise measured at the round's start (A8)"
    )

    def opponents(self, t: int) -> list[int]:
        """The rounds whose responses make D_O in round `t`, newest first: fewer in the first rounds."""
        return list(range(t, max(-1, t - (self.opponent_rounds or self.n_max)), -1))


@dataclasses.dataclass(frozen=True)
class PackingConfig:
    """The fixed shape of the rows."""

    row_length: int = knob(8192, "tokens of a row: long rows waste few, and attention costs what the trees in it cost")
    rows_per_batch: int = knob(
        0, "rows computed at once, over all devices; 0: one for each device that rows are split over"
    )
    max_responses_per_row: int = knob(64, "responses of a row")
    alignment: int = knob(
        0,
        "places that prompts and responses take a multiple of; 0: what the device's attention needs, 1 on CPU and GPU",
    )
    scoring_batches: int = knob(1, "batches scored at once: a forward pass keeps no activations, so more of them fit")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Training within a round. The optimizer starts fresh each round (A6)."""

    optimizer: Literal["rmsprop", "adamw", "adafactor", "lion", "sgd"] = knob("rmsprop", "an optax optimizer", "SPIN")
    learning_rate: tuple[float, ...] = knob(
        (5e-7, 5e-7, 1e-7, 1e-7), "peak rate of each round, the last one repeating", "SPIN"
    )
    schedule: Literal["linear", "cosine", "constant"] = knob("linear", "what follows the warm-up", "SPIN")
    warmup_ratio: float = knob(0.1, "share of a round's steps that warm up", "SPIN")
    epochs: int = knob(2, "visits of every triplet", "SPIN's paper")
    validate_each_epoch: bool = knob(False, "log the held-out targets' log-prob after every epoch, not only the last")
    batch_triplets: int = knob(64, "triplets of a step, met as closely as full batches of rows allow", "SPIN")
    max_grad_norm: float = knob(
        1.0, "global norm that gradients are clipped to", "transformers' Trainer, which SPIN uses"
    )
    weight_decay: float = knob(0.0, "of adamw and lion", "SPIN")
    b1: float = knob(0.9, "first decay of adamw and lion, momentum of sgd", "optax")
    b2: float = knob(0.999, "second decay of adamw and lion", "optax")
    rms_decay: float = knob(0.99, "decay of rmsprop", "torch.optim.RMSprop, which SPIN uses")
    epsilon: float = knob(1e-8, "of adamw and rmsprop", "torch.optim")
    reduce_dtype: Literal["float32", "bfloat16"] = knob("float32", "in which gradients travel between devices")
    max_skipped_in_a_row: int = knob(10, "steps with a non-finite loss or gradient that stop the run")
    save_every_steps: int = knob(50, "most steps between saves of the training state")
    save_every_minutes: float = knob(10.0, "most minutes between them, by the speed of the round's first steps")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged. One size may be -1: all devices that remain."""

    preset: str = knob(
        "",
        "a known arrangement (`sharding.PRESETS`, as v5e-256), or auto: that of the TPU slice; sizes are not read then",
    )
    data: int = knob(1, "copies of the model, each with its share of the rows")
    fsdp: int = knob(-1, "shards of parameters and optimizer state, each with its share of the rows")
    tensor: int = knob(1, "shards of every matrix product")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A whole run of `tpaw play`."""

    directory: str = knob("runs/tpaw", "where everything the run makes is kept")
    rounds: int = knob(4, "rounds of self-play", "TPAW reports 4")
    seed: int = knob(42, "the one seed of every random stream", "SPIN")
    sample_texts: int = knob(3, "responses shown and logged each round")
    tensorboard: bool = knob(False, "write TensorBoard events beside metrics.jsonl")
    policy: PolicyConfig = section(PolicyConfig)
    data: DataConfig = section(DataConfig)
    sampling: SamplingConfig = section(SamplingConfig)
    objective: ObjectiveConfig = section(ObjectiveConfig)
    packing: PackingConfig = section(PackingConfig)
    train: TrainConfig = section(TrainConfig)
    mesh: MeshConfig = section(MeshConfig)


def of_round(values: Sequence[float], round_number: int) -> float:
    """The value of a per-round list in a round; the last one repeats."""
    return values[min(round_number, len(values) - 1)]


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
            packing.row_length >= data.max_length + sampling.max_new_tokens,
            "packing.row_length",
            "must hold data.max_length + sampling.max_new_tokens tokens",
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
    for holds, key, problem in checks:
        if not holds:
            raise ValueError(f"{where}: {key} {problem}.")


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


def plain(value: Any) -> Any:
    """Dictionaries and lists in place of mappings and tuples."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    return value
