"""The run's configuration as frozen dataclasses. Each option has a doc line, and a source for its default if any."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal


def option(default: Any, doc: str, source: str = "") -> Any:
    """A dataclass field with its doc line and the source of its default."""
    return dataclasses.field(default=default, metadata={"doc": doc, "source": source})


def mapping(doc: str) -> Any:
    """A dataclass field of names and values, empty by default."""
    return dataclasses.field(default_factory=dict, metadata={"doc": doc, "source": ""})


def section(cls: type) -> Any:
    """A nested section of the configuration."""
    return dataclasses.field(default_factory=cls)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters, which are trained while the model itself is frozen."""

    rank: int = option(0, "rank of the adapters, such as PEFT's 8; 0: none, all parameters are trained")
    alpha: float = option(8.0, "the adapters' output is multiplied by alpha / rank", "PEFT: lora_alpha")
    targets: tuple[
        Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "all-linear", "experts"],
        ...,
    ] = option(
        ("q_proj", "v_proj"),
        "projections with adapters; all-linear: all of these; experts: all matrices of a mixture's experts",
        "PEFT, for Llama",
    )
    init: Literal["kaiming", "gaussian"] = option(
        "kaiming", "distribution of A before training; B is 0", "PEFT: init_lora_weights"
    )
    rslora: bool = option(False, "multiply by alpha / sqrt(rank) instead (rank-stabilized)", "PEFT: use_rslora")
    dora: bool = option(False, "also train the norm of each output's weights (arXiv 2402.09353)", "PEFT: use_dora")
    dtype: Literal["float32", "bfloat16"] = option("float32", "dtype of the adapters", "PEFT: autocast_adapter_dtype")
    base_dtype: Literal["", "int8"] = option(
        "",
        "dtype of the frozen projections; empty: policy.param_dtype; int8: rounded to 8 bits, with a factor for each "
        "output",
    )
    merge_each_round: bool = option(
        False,
        "each round trains new adapters on top of all earlier ones, as if these were merged into the model; an adapter "
        "then has rank * rounds columns",
    )
    path: str = option(
        "", "a PEFT directory with the adapters to begin with; rank, alpha, rslora, dora and targets are its own"
    )

    @property
    def used(self) -> bool:
        """Whether there are adapters."""
        return bool(self.rank or self.path)


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """The model to train: theta_0, its dtypes and memory use."""

    path: str = option("", "theta_0: a Hugging Face directory, a hub id or a .gguf file")
    tokenizer: str = option("", "path or hub id of the tokenizer, if it is not with the model")
    param_dtype: Literal["float32", "bfloat16"] = option(
        "float32",
        "dtype of the parameters; with bfloat16, the optimizer updates a float32 master copy, and checkpoints in the "
        "ring take half the bytes",
    )
    compute_dtype: Literal["float32", "bfloat16"] = option("bfloat16", "dtype of the layers' computations", "SPIN")
    remat: Literal["auto", "none", "dots", "head", "offload", "layer"] = option(
        "layer",
        "what the backward pass recomputes. none: nothing; dots: all but matmuls and attention; head: as dots, and the "
        "logits; offload: as head, with saved activations in host memory; layer: each whole layer; auto: the first of "
        "these whose training step fits the device",
    )
    head_chunk: int = option(256, "predictions per row whose logits are computed at a time")
    attention_chunks: int = option(4, "on TPU and GPU, chunks of 64 keys in a matmul of attention; see `tpaw tune`")
    lora: LoraConfig = section(LoraConfig)


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One data source."""

    path: str = option(
        "",
        "a .jsonl, .json, .csv, .tsv or .parquet file, a pattern or a directory of files, a saved dataset, or a hub id",
    )
    split: str = option("train", "the split of a hub dataset or of a saved dataset dict")
    weight: float = option(1.0, "fraction of the records to use; above 1 repeats records", "zephyr's dataset_mixer")
    subset: str = option("", "the configuration of a hub dataset that has several, such as `main` of GSM8K")
    fields: dict[str, str] = mapping(
        "the source's names of the fields to read, such as `{prompt: question, completion: response}`; empty: its "
        "fields have one of the known names"
    )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Prompts and target responses."""

    sources: tuple[SourceConfig, ...] = option((), "data sources; several are mixed by weight")
    chat_template: str = option(
        "auto", "auto: the tokenizer's template; none: plain text; otherwise a Jinja template or the path of one"
    )
    train_on: Literal["last", "all"] = option(
        "last", "assistant turns that are targets: the last of each conversation, or all of them", "SPIN"
    )
    thinking: Literal["auto", "on", "off"] = option(
        "auto",
        "how templates with reasoning render. on: the target begins with the block of reasoning; off: the prompt ends "
        "with an empty one; auto: on for conversations whose answer has reasoning, else off",
    )
    template_arguments: dict[str, Any] = mapping("variables for the chat template")
    system_prompt: str = option("", "system turn added before every prompt")
    max_prompt_length: int = option(512, "maximum tokens per prompt; longer prompts are truncated at the start", "SPIN")
    max_length: int = option(
        1024, "maximum tokens of prompt and target together; longer targets are truncated at the end", "SPIN"
    )
    max_prompts: int = option(
        0, "number of conversations to use, chosen at random with the seed; 0: all", "TPAW: a 50k subset"
    )
    holdout_prompts: int = option(
        0, "number of conversations held out of training; the log-prob of their targets is reported each round"
    )
    responses: Literal["sampled", "rejected"] = option(
        "sampled",
        "responses that targets are compared with: sampled from the policy, or the records' rejected ones (DPO)",
    )
    skip_bad_records: bool = option(False, "skip malformed records and list them, instead of stopping at the first")
    processes: int = option(0, "processes of each host that tokenize; 0: one per core, fewer for little data")


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the policy samples its responses."""

    max_new_tokens: int = option(256, "maximum tokens per response", "SPIN")
    temperature: float = option(1.0, "sampling temperature; 0: greedy", "SPIN")
    top_p: float = option(1.0, "nucleus sampling threshold; 1: all tokens", "SPIN")
    top_k: int = option(0, "number of most likely tokens to sample from; 0: all", "transformers' sampling")
    slots: int = option(
        32, "sequences that each process decodes at once; a finished one is replaced by the next prompt"
    )
    prefill_tokens: int = option(
        512, "tokens per row of packed prompts in prefill, at least the longest prompt; each device computes one row"
    )
    min_new_tokens: int = option(
        0, "minimum tokens per response; no stop token is sampled before", "transformers' generation"
    )
    stop_strings: tuple[str, ...] = option((), "strings that end a response", "transformers' generation")
    tensor: int = option(
        1, "devices that share one copy of the model during sampling; above 1, all processes sample together"
    )
    cache_dtype: Literal["", "float32", "bfloat16"] = option(
        "", "dtype of cached keys and values; empty: policy.compute_dtype"
    )


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """The team loss."""

    loss: Literal["team", "sft"] = option(
        "team", "team: the team loss on triplets; sft: the mean negative log-prob of the targets (`tpaw sft`)"
    )
    n_max: int = option(3, "maximum number of main players: the newest checkpoints", "TPAW: N_max")
    opponent_rounds: int = option(
        0, "number of newest rounds whose responses are trained on; 0: the same as n_max", "TPAW; SPIN: 2"
    )
    lam: tuple[float, ...] = option(
        (0.1,), "scale of the rewards, per round; the last value repeats", "SPIN's beta (A1)"
    )
    eta: float = option(
        6.0, "weight of the target's reward when it is at most the tolerance (drift correction); 1: off", "TPAW"
    )
    gamma: float = option(
        0.5, "attention to the player that separates target and response worst; 0: uniform weights", "TPAW"
    )
    tolerance: float = option(
        -1.0,
        "largest target reward that eta applies to; -1: twice the scoring noise at the start of the round (A8)",
    )

    def players(self, t: int) -> list[int]:
        """The rounds whose policies are the main players of round `t`, newest first; fewer in the first rounds."""
        return list(range(t, max(-1, t - self.n_max), -1))

    def opponents(self, t: int) -> list[int]:
        """The rounds whose responses make up D_O in round `t`, newest first; fewer in the first rounds."""
        return list(range(t, max(-1, t - (self.opponent_rounds or self.n_max)), -1))


@dataclasses.dataclass(frozen=True)
class PackingConfig:
    """The fixed shape of packed rows."""

    row_length: int = option(
        8192,
        "tokens per row; long rows waste less padding, and attention stays within each tree; 0: with mesh.preset auto "
        "on TPU, the length that takes steps of train.batch_triplets fastest, else 8192",
    )
    rows_per_batch: int = option(0, "rows per batch, over all devices; 0: one for each device that rows are split over")
    max_responses_per_row: int = option(64, "maximum responses per row")
    scoring_batches: int = option(
        1, "batches scored at once; more fit than in training, because scoring keeps no activations"
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Training within a round. The optimizer state is new each round (A6)."""

    optimizer: Literal["rmsprop", "adamw", "adafactor", "lion", "sgd"] = option("rmsprop", "an optax optimizer", "SPIN")
    learning_rate: tuple[float, ...] = option(
        (5e-7, 5e-7, 1e-7, 1e-7), "peak learning rate, per round; the last value repeats", "SPIN"
    )
    schedule: Literal["linear", "cosine", "constant"] = option("linear", "learning rate after the warm-up", "SPIN")
    warmup_ratio: float = option(0.1, "fraction of a round's steps used for warm-up", "SPIN")
    epochs: int = option(2, "epochs per round", "SPIN's paper")
    validate_each_epoch: bool = option(
        False, "log the log-prob of held-out targets after every epoch, not only the last"
    )
    batch_triplets: int | Literal["auto"] = option(
        64,
        "triplets per optimizer step, as nearly as whole rows allow; auto: as many as one batch of rows has, with the "
        "learning rate scaled to them",
        "SPIN",
    )
    max_grad_norm: float = option(
        1.0, "maximum global norm of the gradient, by clipping", "transformers' Trainer, which SPIN uses"
    )
    weight_decay: float = option(0.0, "weight decay of adamw and lion", "SPIN")
    b1: float = option(0.9, "first-moment decay of adamw and lion; momentum of sgd", "optax")
    b2: float = option(0.999, "second-moment decay of adamw and lion", "optax")
    rms_decay: float = option(0.99, "decay of rmsprop's mean square", "torch.optim.RMSprop, which SPIN uses")
    epsilon: float = option(1e-8, "epsilon of adamw and rmsprop", "torch.optim")
    reduce_dtype: Literal["float32", "bfloat16"] = option(
        "float32", "dtype in which gradients are reduced between devices"
    )
    router_balance: float = option(
        0.0,
        "weight of the load-balance loss of a mixture of experts (arXiv 2101.03961, equation 4, divided by the experts "
        "per token); 0 as in transformers, whose router_aux_loss_coef is for models with output_router_logits",
    )
    router_z: float = option(0.0, "weight of the router z-loss of a mixture of experts (arXiv 2202.08906, equation 5)")
    max_skipped_in_a_row: int = option(
        10, "consecutive steps with a non-finite loss or gradient after which the run stops"
    )
    save_every_steps: int = option(50, "maximum steps between saves of the training state")
    save_every_minutes: float = option(10.0, "maximum minutes between saves, estimated from the round's first steps")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The device mesh. One size may be -1: all remaining devices."""

    preset: str = option(
        "",
        "name of a mesh in `sharding.PRESETS`, such as v5e-256; or auto: on TPU, the mesh that takes steps of "
        "train.batch_triplets fastest, else all devices as fsdp; replaces the sizes",
    )
    data: int = option(1, "replicas of the model, each with its share of the rows")
    fsdp: int = option(-1, "shards of parameters and optimizer state, each with its share of the rows")
    expert: int = option(
        1, "groups of experts; each also has its share of the rows, and tokens go to the devices of their experts"
    )
    tensor: int = option(1, "shards of every matrix product (tensor parallelism)")
    context: int = option(
        1, "neighbours on fsdp that share their rows, each with a part of the tokens (context parallelism)"
    )
    compiler_options: tuple[str, ...] = option(
        (), "XLA options of the step and of scoring, each name=value; name= drops one of `tpu.COMPILER_OPTIONS`"
    )


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """One task with exact answers."""

    name: str = option("", "name in tables and for `tpaw eval --tasks`")
    path: str = option("", "the problems: a path as in data.sources; the target contains the answer")
    subset: str = option("", "the configuration of a hub dataset that has several")
    split: str = option("test", "the split of a hub dataset or of a saved dataset dict")
    answer: str = option(
        r"####\s*(.+)", "regular expression whose last match in a target is its answer; empty: the whole target"
    )
    response: str = option(
        r"-?\d[\d,]*(?:\.\d+)?",
        "regular expression whose last match in a response is its answer; empty: the whole response",
        "lm-eval's flexible-extract",
    )
    max_new_tokens: int = option(256, "maximum tokens per response")
    limit: int = option(0, "number of problems to use, from the first; 0: all")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Tasks that the policy answers greedily, scored by exact match."""

    tasks: tuple[TaskConfig, ...] = option((), "tasks to evaluate on")
    each_round: bool = option(False, "evaluate theta_0 and the policy of every round during the run")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A run of `tpaw play` or `tpaw sft`."""

    directory: str = option("runs/tpaw", "directory of everything the run writes, also gs://bucket/run")
    rounds: int = option(4, "number of rounds", "TPAW reports 4")
    seed: int = option(42, "seed of every random stream", "SPIN")
    sample_texts: int = option(3, "responses printed and stored each round")
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = option(
        (), "trackers that also get the metrics", "transformers"
    )
    tensorboard: bool = option(False, "the same as report_to: [tensorboard]")
    policy: PolicyConfig = section(PolicyConfig)
    data: DataConfig = section(DataConfig)
    sampling: SamplingConfig = section(SamplingConfig)
    objective: ObjectiveConfig = section(ObjectiveConfig)
    packing: PackingConfig = section(PackingConfig)
    train: TrainConfig = section(TrainConfig)
    mesh: MeshConfig = section(MeshConfig)
    evaluation: EvaluationConfig = section(EvaluationConfig)

    @property
    def trackers(self) -> frozenset[str]:
        """The names of the trackers that get the metrics."""
        return frozenset(self.report_to) | ({"tensorboard"} if self.tensorboard else set())

    @property
    def longest_response(self) -> int:
        """Maximum tokens of a sampled or rejected response."""
        return self.data.max_length if self.data.responses == "rejected" else self.sampling.max_new_tokens

    @property
    def longest_sequence(self) -> int:
        """Maximum tokens of a prompt and a target or response."""
        return max(self.data.max_length, self.data.max_prompt_length + self.sampling.max_new_tokens)

    @property
    def longest_triplet(self) -> int:
        """Maximum tokens of a prompt, its target and one other response together."""
        return self.data.max_length + self.longest_response

    @property
    def longest_tree(self) -> int:
        """Maximum tokens that one row must hold: a triplet, or a prompt with its target in SFT."""
        return self.data.max_length if self.objective.loss == "sft" else self.longest_triplet


def of_round(values: Sequence[float], round_number: int) -> float:
    """The value of a per-round option in a round; the last value repeats."""
    return values[min(round_number, len(values) - 1)]
