"""The run's configuration: frozen dataclasses. Every knob names its source. `config_file` reads them from YAML."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal


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
    subset: str = knob("", "the configuration of a hub dataset that has several, as `main` of GSM8K")


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
    cache_dtype: str = knob("", "of cached keys and values: float32 or bfloat16; empty: policy.compute_dtype")


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
class TaskConfig:
    """One task with exact answers."""

    name: str = knob("", "what it is called in tables and by `tpaw eval --tasks`")
    path: str = knob("", "its problems, as in data.sources; the target text has the answer")
    subset: str = knob("", "the configuration of a hub dataset that has several")
    split: str = knob("test", "the split of a hub dataset or of a saved dataset dict")
    answer: str = knob(
        r"####\s*(.+)", "what of a target is its answer: the last match of a regular expression; empty: all of it"
    )
    response: str = knob(
        r"-?\d[\d,]*(?:\.\d+)?", "what of a response is its answer, the last match", "lm-eval's flexible-extract"
    )
    max_new_tokens: int = knob(256, "tokens a response may have")
    limit: int = knob(0, "use so many problems, the first; 0 uses all")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Tasks that the policy answers greedily, and is scored on by exact match."""

    tasks: tuple[TaskConfig, ...] = knob((), "what to evaluate on")
    each_round: bool = knob(False, "evaluate theta_0 and the policy of every round while the run plays")


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
    evaluation: EvaluationConfig = section(EvaluationConfig)

    @property
    def longest_response(self) -> int:
        """Tokens that what targets are told apart from may have."""
        return self.data.max_length if self.data.responses == "rejected" else self.sampling.max_new_tokens

    @property
    def longest_triplet(self) -> int:
        """Tokens that a prompt, its target and one other response may have together."""
        return self.data.max_length + self.longest_response


def of_round(values: Sequence[float], round_number: int) -> float:
    """The value of a per-round list in a round; the last one repeats."""
    return values[min(round_number, len(values) - 1)]
