"""A run's directory, model, data and compiled programs, opened once for all rounds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import yaml
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from tpaw_jax import models
from tpaw_jax.config import RunConfig
from tpaw_jax.config.config_file import flat, parse, to_dict
from tpaw_jax.data import dataset, packing
from tpaw_jax.evaluation import exact_match
from tpaw_jax.generation import engine, slots
from tpaw_jax.generation.policy import SPEED_ONLY_KEYS, Policy, open_policy
from tpaw_jax.observe import monitoring
from tpaw_jax.runtime import processes, sharding, tpu
from tpaw_jax.runtime.preemption import PreemptionNotice
from tpaw_jax.selfplay import recovery
from tpaw_jax.storage import files, journal, ring
from tpaw_jax.storage.journal import Journal
from tpaw_jax.training import batch_shapes, memory, scoring, train_step
from tpaw_jax.training.logprobs import LogProbFn, make_log_prob_fn
from tpaw_jax.types import TARGET, Prompts

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Session:
    """What stays the same over all rounds: data, compiled programs, places."""

    config: RunConfig
    directory: Path
    mesh: Mesh
    model: models.ModelConfig
    template: dataset.Template
    prompts: Prompts
    held_out: packing.Rows
    sampler: slots.Sampler
    stop_fn: engine.StopFn | None
    evaluator: exact_match.Evaluator | None  # of every round
    scorer: scoring.Scorer
    optimizer: optax.GradientTransformation
    step: train_step.TrainStep
    journal: Journal
    ring: ring.Ring
    first: int  # the round to play first
    like: PyTree[jax.ShapeDtypeStruct]
    profiler: monitoring.Profiler
    notice: PreemptionNotice
    say: Say


def open_session(
    config: RunConfig, say: Say, profiled: range, notice: PreemptionNotice
) -> tuple[Session, PyTree[Array]]:
    """Open or create the run directory, load model and data, build the programs; also the policy to go on from.

    What of the run is damaged is set aside; `Session.first` is the round from which it is made again, or goes on.

    Raises:
        ValueError: the configuration cannot be used, or not with what the directory holds; of several processes, one
            differs from the others or sees another directory.
    """
    directory = Path(config.directory)
    say = say if processes.is_main() else lambda text: None
    processes.check_same({"the configuration": json.dumps(to_dict(config)), **processes.facts_of_this_host()})
    processes.check_shared_directory(directory)
    mesh, opened = sharding.make_mesh(config.mesh), journal.open_journal(directory)
    config = _settled(config, opened.config, mesh)
    _check_unchanged(opened, config)
    recovery.quarantine_corruption(opened, say)
    packing.check_rows(config.packing, sharding.row_shards(mesh), batch_shapes.needed_alignment(config))
    player = open_policy(config, mesh)
    template, policy = player.template, player.params
    prompts, held_out, report = dataset.load(config.data, template, config.seed)
    say(_data_lines(report, prompts, held_out))

    _warn_of_long_sequences(config, player, prompts, say)
    optimizer = train_step.make_optimizer(config.train)
    log_prob_fn, step = _programs(config, player, optimizer, mesh, say)
    session = Session(
        config=config,
        directory=directory,
        mesh=mesh,
        model=player.model.config,
        template=template,
        prompts=prompts,
        held_out=packing.pack(_target_trees(held_out), config.packing),
        sampler=player.sampler,
        stop_fn=player.stop_fn,
        evaluator=exact_match.make_evaluator(config, player, config.evaluation.tasks)
        if config.evaluation.each_round
        else None,
        scorer=scoring.make_scorer(log_prob_fn, mesh, tpu.options_of(mesh)),
        optimizer=optimizer,
        step=step,
        journal=opened,
        first=0,
        ring=ring.open_ring(opened, config.objective.n_max),
        like=sharding.abstract(policy),
        profiler=monitoring.Profiler(directory / "profile", profiled),
        notice=notice,
        say=say,
    )
    processes.check_same({"the fingerprint of the data": report.fingerprint})
    _check_same_data(opened, report.fingerprint)
    _keep_configuration(opened, config, report.fingerprint)
    ring.remove_unfinished(session.ring)
    first = max(session.ring.policies, default=0)  # a supervised run needs nothing but the policy it goes on from
    if config.objective.loss == "team":
        first = recovery.first_round(session.ring, config.objective, say)
    session = dataclasses.replace(session, first=first)
    return session, _first_policy(session, policy)


def _programs(
    config: RunConfig, player: Policy, optimizer: optax.GradientTransformation, mesh: Mesh, say: Say
) -> tuple[LogProbFn, train_step.TrainStep]:
    """The log-prob function and the train step, rematerialised as stated or, for `auto`, with the first that fits."""

    def with_remat(remat: str) -> tuple[LogProbFn, Any]:
        log_prob_fn = make_log_prob_fn(player.model.clone(remat=remat), config.policy.head_chunk)
        return log_prob_fn, train_step.make_train_step(
            log_prob_fn, optimizer, config.objective, mesh, config.train.reduce_dtype, tpu.options_of(mesh)
        )

    if config.policy.remat != "auto":
        return with_remat(config.policy.remat)
    state = train_step.abstract_state(player.params, optimizer, mesh)
    inputs = packing.empty_step(config.packing, config.objective.n_max, batch_shapes.most_micro_batches(config))
    limits = processes.all_gather(limit=np.array([memory.available_bytes()]))
    limit = min(int(one["limit"][0]) for one in limits)  # all processes take the same program
    compile_with = lambda remat: with_remat(remat)[1].lower(state, *inputs, train_step.NO_SCALARS).compile()
    fit = memory.choose_remat(compile_with, limit)
    say(f"Rematerialisation: {fit.remat}; a step needs {fit.needed / 2**30:.2f} of {limit / 2**30:.2f} GiB a device.")
    return with_remat(fit.remat)[0], fit.compiled


def _settled(config: RunConfig, stored: dict[str, Any], mesh: Mesh) -> RunConfig:
    """The configuration with packing's rows_per_batch and alignment settled: as the run began, else for the devices.

    They decide which triplets share a step, so a run that goes on with other devices keeps them.
    """
    return dataclasses.replace(config, packing=batch_shapes.settled_packing(config, mesh, stored.get("packing", {})))


def _warn_of_long_sequences(config: RunConfig, player: Policy, prompts: Prompts, say: Say) -> None:
    longest = max(map(len, prompts.prompt_tokens)) + config.sampling.max_new_tokens
    longest = max(
        longest, *(len(x) + len(y) for x, y in zip(prompts.prompt_tokens, prompts.target_tokens, strict=True))
    )
    context = player.model.config.max_position_embeddings
    if longest > context:
        say(f"Warning: sequences of up to {longest} tokens exceed the {context} positions the model was made for.")


def _check_unchanged(opened: Journal, config: RunConfig) -> None:
    """Check that a run goes on with the configuration it began with.

    Raises:
        ValueError: keys that change the meaning of the run differ; lists them.
    """
    if not opened.config:
        return
    before = parse(RunConfig, opened.config, str(opened.directory / "journal.json"))  # with defaults of newer keys
    old, new = flat(to_dict(before)), flat(to_dict(config))
    free = {"directory", "rounds", "sample_texts", "tensorboard", "train.save_every_steps"}
    free |= {"evaluation.each_round", "evaluation.tasks", "train.save_every_minutes", "train.max_skipped_in_a_row"}
    free |= {"train.validate_each_epoch"}
    free |= SPEED_ONLY_KEYS
    changed = [key for key in sorted(old | new) if old.get(key) != new.get(key) and key not in free]
    if changed:
        differences = "; ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in changed)
        raise ValueError(
            f"{opened.directory}: the run began with another configuration ({differences}). "
            "Go on with the old values, or choose another directory."
        )


def _check_same_data(opened: Journal, fingerprint: str) -> None:
    """Check that a run goes on with the tokens it began with.

    Raises:
        ValueError: records, template or tokenizer have changed.
    """
    if opened.data not in ("", fingerprint):
        raise ValueError(
            f"{opened.directory}: the run began with other prompts and targets; the data files, the chat template or "
            "the tokenizer have changed since. Put them back, or choose another directory."
        )


def _keep_configuration(opened: Journal, config: RunConfig, fingerprint: str) -> None:
    """Store what the run is bound to, once it could be opened: a configuration that cannot be used binds nobody."""
    opened.config, opened.data = to_dict(config), fingerprint
    journal.save(opened)
    files.write_bytes(opened.directory / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False).encode())
    files.write_json(opened.directory / "versions.json", processes.facts_of_this_host())


def _first_policy(session: Session, theta_0: PyTree[Array]) -> PyTree[Array]:
    """The policy of the first round to play; theta_0 is pushed as the first player where the ring lacks it.

    The other policies are read too, so that damage is known before any work.
    """
    first = session.first
    for other in set(session.ring.policies) - {first}:
        ring.restore_policy(session.ring, other, session.like)
    if first in session.ring.policies:
        session.say(f"The run goes on with theta_{first}.")
        return ring.restore_policy(session.ring, first, session.like)
    ring.push(session.ring, theta_0, first)
    ring.finish_saves(session.ring)
    return theta_0


def _target_trees(prompts: Prompts) -> list[packing.Tree]:
    return [packing.tree_of_responses(prompts, i, {TARGET: y}) for i, y in enumerate(prompts.target_tokens)]


def _data_lines(report: dataset.DataReport, prompts: Prompts, held_out: Prompts) -> str:
    lines = [
        f"Data: {len(prompts)} prompts to play on, {len(held_out)} held out, of {report.records} records; "
        f"{report.prompts_cut} prompts and {report.targets_cut} targets cut to length; {len(report.skipped)} skipped."
    ]
    return "\n".join(lines + [f"  skipped: {sentence}" for sentence in report.skipped])
