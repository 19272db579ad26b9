"""A session: the run directory, model, data and compiled programs that all rounds of a run share."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import optax
import yaml
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from tpaw_jax import models
from tpaw_jax.config import RunConfig
from tpaw_jax.config.config_file import flat, parse, to_dict
from tpaw_jax.data import dataset, packing, prefix_trees, templates
from tpaw_jax.evaluation import exact_match
from tpaw_jax.generation import engine, slots
from tpaw_jax.generation.policy import SPEED_ONLY_KEYS, Policy, first_adapters, open_policy, resolve_adapters
from tpaw_jax.models import adapters
from tpaw_jax.observe.profiling import Profiler, Stopwatch
from tpaw_jax.observe.trackers import Tracker, open_trackers
from tpaw_jax.runtime import processes, sharding, tpu
from tpaw_jax.runtime.preemption import PreemptionNotice
from tpaw_jax.selfplay import plan
from tpaw_jax.selfplay.round_store import round_directory
from tpaw_jax.storage import bucket, files, journal, recovery, ring
from tpaw_jax.storage.journal import Journal
from tpaw_jax.training import batch_shapes, fitting_step, scoring, train_step
from tpaw_jax.types import Prompts

Say = Callable[[str], None]
"""Prints a text of one or more lines."""

KEYS_THAT_MAY_CHANGE = SPEED_ONLY_KEYS | {
    "data.processes",
    "directory",
    "mesh.compiler_options",
    "mesh.context",
    "mesh.expert",
    "policy.attention_chunks",
    "report_to",
    "rounds",
    "sample_texts",
    "tensorboard",
    "train.save_every_steps",
    "train.save_every_minutes",
    "train.max_skipped_in_a_row",
    "train.validate_each_epoch",
    "evaluation.each_round",
    "evaluation.tasks",
}
"""Configuration keys that may differ in a resumed run: they change results by rounding at most.

With `policy.lora.merge_each_round`, `rounds` may not, since the adapters have columns for each round.
"""


@dataclasses.dataclass(frozen=True)
class Session:
    """What all rounds share: configuration, data, compiled programs, storage."""

    config: RunConfig
    directory: Path
    mesh: Mesh
    model: models.ModelConfig
    template: templates.Template
    prompts: Prompts
    held_out: packing.Rows
    sampler: slots.Sampler
    stop_fn: engine.StopFn | None
    evaluator: exact_match.Evaluator | None  # None: rounds are not evaluated
    scorer: scoring.Scorer
    optimizer: optax.GradientTransformation
    step: train_step.TrainStep
    journal: Journal
    ring: ring.Ring
    first: int  # the round at which the run begins or resumes
    like: PyTree[jax.ShapeDtypeStruct]  # shapes, dtypes and shardings of what is trained of a policy
    frozen: tuple[PyTree[Array], ...]  # what is not: the base of adapters, or nothing
    profiler: Profiler
    notice: PreemptionNotice
    trackers: tuple[Tracker, ...]
    say: Say
    verbose: bool  # print every metric of a round
    startup: float = 0.0  # seconds that it took to open the session

    def trained(self, policy: PyTree[Array]) -> PyTree[Array]:
        """The part of a policy that is trained and saved: its adapters, or all of it."""
        return adapters.parts(policy, self.frozen)[0]

    def restore(self, round_number: int) -> PyTree[Array]:
        """The policy of a round, whose trained part is read from the ring, see `ring.restore_policy`."""
        return self.whole(ring.restore_policy(self.ring, round_number, self.like))

    def whole(self, trained: PyTree[Array]) -> PyTree[Array]:
        """The policy with a trained part."""
        return adapters.join(trained, *self.frozen) if self.frozen else trained


class Round(NamedTuple):
    """A round, as its stages see it."""

    session: Session
    number: int
    players: list[int]  # newest first
    watch: Stopwatch

    @property
    def directory(self) -> Path:
        """Where the round's files are."""
        return round_directory(self.session.directory, self.number)


def open_session(
    config: RunConfig, say: Say, profiled: range, notice: PreemptionNotice, verbose: bool = False
) -> tuple[Session, dict[int, PyTree[Array]]]:
    """Open or create the run directory, load model and data, and build the programs.

    Returns the session, and {its first round: the policy of that round}. Corrupted files are quarantined first, and
    `Session.first` is the round that regenerates them.

    Raises:
        ValueError: the configuration cannot be used, or not with what the directory holds; or a process of the pod
            differs from the others.
    """
    start, (config, mesh, opened) = time.perf_counter(), _open_run(config, say)
    policy = open_policy(_without_adapter_files(config) if opened.names("policy") else config, mesh)
    prompts, held_out, report = dataset.load(config.data, policy.template, config.seed, opened.directory)
    say(_data_lines(report, prompts, held_out))
    _warn_of_long_sequences(config, policy, prompts, say)
    optimizer = train_step.make_optimizer(config.train)
    log_prob_fn, step = fitting_step.make_fitting_step(config, policy.model, policy.params, optimizer, mesh, say)
    kept, options = ring.open_ring(opened, config.objective.n_max), tpu.options_of(mesh, config.mesh.compiler_options)
    trained, frozen = adapters.parts(policy.params, policy.model.lora)
    _bind(opened, config, report.fingerprint, frozen)  # last, so that an unusable configuration is not stored
    ring.remove_unfinished(kept)
    session = Session(
        config=config,
        directory=opened.directory,
        mesh=mesh,
        model=policy.model.config,
        template=policy.template,
        prompts=prompts,
        held_out=packing.pack(prefix_trees.trees_of_targets(held_out), config.packing),
        sampler=policy.sampler,
        stop_fn=policy.stop_fn,
        evaluator=_evaluator(config, policy),
        scorer=scoring.make_scorer(log_prob_fn, mesh, options, config.mesh.context),
        optimizer=optimizer,
        step=step,
        journal=opened,
        ring=kept,
        first=_first_round(kept, config, say),
        like=sharding.abstract(trained),
        frozen=frozen,
        profiler=Profiler(opened.directory / "profile", profiled),
        notice=notice,
        trackers=open_trackers(config.trackers, opened.directory, flat(to_dict(config)), say),
        say=say,
        verbose=verbose,
    )
    first = {session.first: _first_policy(session, policy.params)}
    return dataclasses.replace(session, startup=time.perf_counter() - start), first


def _open_run(config: RunConfig, say: Say) -> tuple[RunConfig, Mesh, Journal]:
    """Check the pod, the directory and the configuration, and quarantine corrupted files.

    Returns the configuration with packing and adapters resolved, the mesh and the journal.
    """
    directory = bucket.open_path(config.directory)
    processes.check_same({"the configuration": json.dumps(to_dict(config)), **processes.facts_of_this_host()})
    processes.check_shared_directory(directory)
    mesh, opened = sharding.make_mesh(config.mesh), journal.open_journal(directory)
    # rows_per_batch decides which triplets share a step: a resumed run keeps the value it began with
    packed = batch_shapes.resolve_packing(config, mesh, opened.config.get("packing"))
    begun = parse(RunConfig, opened.config, str(directory)).policy.lora if opened.config else None
    policy = dataclasses.replace(config.policy, lora=resolve_adapters(config.policy.lora, begun))
    config = dataclasses.replace(config, packing=packed, policy=policy)
    _check_unchanged(opened, config)
    tpu.check_options(mesh, config.mesh.compiler_options)
    recovery.quarantine_corruption(opened, say)
    return config, mesh, opened


def _warn_of_long_sequences(config: RunConfig, policy: Policy, prompts: Prompts, say: Say) -> None:
    of_prompts, of_targets = prompts.prompt_tokens.lengths, prompts.target_tokens.lengths
    longest = max(int(of_prompts.max()) + config.sampling.max_new_tokens, int((of_prompts + of_targets).max()))
    context = policy.model.config.max_position_embeddings
    if longest > context:
        say(f"Warning: sequences may reach {longest} tokens, but the model was trained for {context} positions.")


def _check_unchanged(opened: Journal, config: RunConfig) -> None:
    """Check that a run resumes with the configuration it began with.

    Raises:
        ValueError: keys that change the meaning of the run differ; lists them.
    """
    if not opened.config:
        return
    before = parse(RunConfig, opened.config, str(opened.directory / "journal.json"))  # with defaults of newer keys
    old, new = flat(to_dict(before)), flat(to_dict(config))
    may_change = KEYS_THAT_MAY_CHANGE - ({"rounds"} if config.policy.lora.merge_each_round else set())
    if before.mesh.preset == config.mesh.preset == "auto":
        may_change |= {"mesh.data", "mesh.fsdp", "mesh.tensor"}  # chosen for the devices
    changed = [key for key in sorted(old | new) if old.get(key) != new.get(key) and key not in may_change]
    if changed:
        differences = "; ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in changed)
        raise ValueError(
            f"{opened.directory}: the run began with another configuration ({differences}). "
            "Restore the old values, or choose another directory."
        )


def _evaluator(config: RunConfig, policy: Policy) -> exact_match.Evaluator | None:
    tasks = config.evaluation.tasks if config.evaluation.each_round else ()
    return exact_match.make_evaluator(config, policy, tasks) if tasks else None


def _without_adapter_files(config: RunConfig) -> RunConfig:
    """The configuration for a run whose ring has adapters: those that it began with are not needed any more."""
    lora = dataclasses.replace(config.policy.lora, path="")
    return dataclasses.replace(config, policy=dataclasses.replace(config.policy, lora=lora))


def _bind(opened: Journal, config: RunConfig, fingerprint: str, frozen: tuple[PyTree[Array], ...]) -> None:
    """Check that a resumed run has the tokens and the base of adapters it began with; store those of a new one.

    Raises:
        ValueError: records, template or tokenizer have changed, or the model at `policy.path`.
    """
    processes.check_same({"the fingerprint of the data": fingerprint})
    if opened.data_fingerprint not in ("", fingerprint):
        raise ValueError(
            f"{opened.directory}: the run began with other prompts and targets. The data files, the chat template or "
            "the tokenizer have changed since. Restore them, or choose another directory."
        )
    base = check_base(opened, frozen)
    opened.config, opened.data_fingerprint, opened.base = to_dict(config), fingerprint, base
    journal.save(opened)
    files.write_bytes(opened.directory / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False).encode())
    files.write_json(opened.directory / "versions.json", processes.facts_of_this_host())


def check_base(opened: Journal, frozen: tuple[PyTree[Array], ...]) -> str:
    """The fingerprint of the base of a run's adapters; empty without any.

    Raises:
        ValueError: it is another one than the run's.
    """
    base = ring.fingerprint(frozen) if frozen else ""
    if opened.base not in ("", base):
        raise ValueError(
            f"{opened.directory}: the adapters of this run belong to other parameters than those now at policy.path. "
            "Restore that model, or choose another directory."
        )
    return base


def _first_round(kept: ring.Ring, config: RunConfig, say: Say) -> int:
    """The round at which the run begins. A supervised run needs nothing but its newest policy."""
    if config.objective.loss == "team":
        return plan.first_round(kept, config.objective, say)
    return max(kept.policies, default=0)


def _first_policy(session: Session, theta_0: PyTree[Array]) -> PyTree[Array]:
    """The policy of the first round. A new run pushes theta_0 to the ring.

    The other policies are read too, so that corruption is found before any work.
    """
    first = session.first
    for other in set(session.ring.policies) - {first}:
        session.restore(other)
    if first in session.ring.policies:
        session.say(f"The run resumes with theta_{first}.")
        return session.restore(first)
    if session.config.policy.lora.path:  # without them, if the ring had policies when the session opened
        theta_0 = session.whole(first_adapters(session.config, session.model, session.mesh, theta_0))
    ring.push(session.ring, session.trained(theta_0), first)
    ring.finish_saves(session.ring)
    return theta_0


def _data_lines(report: dataset.DataReport, prompts: Prompts, held_out: Prompts) -> str:
    lines = [
        f"Data: {len(prompts)} prompts for training and {len(held_out)} held out, from {report.records} records. "
        f"{report.prompts_cut} prompts and {report.targets_cut} targets were truncated; {len(report.skipped)} records "
        "were skipped."
    ]
    if report.starts_cut:
        lines.append(f"  {report.starts_cut} of the truncated prompts lost their system turn or BOS token.")
    if report.turns_behind:
        lines.append(f"  {report.turns_behind} conversations have turns behind the last answer, which are left out.")
    return "\n".join(lines + [f"  skipped: {sentence}" for sentence in report.skipped])
