"""The team step: log-probs of packed trees -> team loss -> one optimizer update, compiled once for all rounds.

Learning rate, lam and tolerance are data, and so is the number of micro-batches: rounds that differ in them share one
compiled program. A step whose loss or gradient is not finite changes nothing but its counters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PyTree

from tpaw_jax.config import ObjectiveConfig, TrainConfig, of_round
from tpaw_jax.objective import TeamLoss, team_loss
from tpaw_jax.runtime import sharding
from tpaw_jax.training.logprobs import LogProbFn, sum_by_response
from tpaw_jax.types import AnyArray, TeamScores, TrainState, TreeBatch


class StepScalars(NamedTuple):
    """What changes from step to step or round to round without a new program."""

    learning_rate: AnyArray
    lam: AnyArray
    tolerance: AnyArray
    dry_run: AnyArray  # compute everything, change nothing


NO_SCALARS = StepScalars(np.float32(0), np.float32(0), np.float32(0), np.bool_(False))

Metrics = dict[str, Array]
MicroLoss = Callable[[PyTree[Array], TreeBatch, TeamScores, Array, StepScalars], tuple[Array, Metrics]]
"""(params, batch, scores, how much the step's loss is a mean of, scalars) -> a micro-batch's part of the loss, and sums
for metrics: `triplets`; `max`, of which the largest counts; any others, of which the means over triplets are returned.
"""

TrainStep = Callable[[TrainState, TreeBatch, TeamScores, AnyArray, StepScalars], tuple[TrainState, Metrics]]


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """The named optax optimizer at learning rate 1, gradients clipped: the step scales its updates by the rate.

    That is the optimizer itself, since the updates of all of them are linear in the learning rate.
    """
    c = config
    named = {
        "rmsprop": lambda: optax.rmsprop(1.0, decay=c.rms_decay, eps=c.epsilon, eps_in_sqrt=False),
        "adamw": lambda: optax.adamw(1.0, b1=c.b1, b2=c.b2, eps=c.epsilon, weight_decay=c.weight_decay),
        "adafactor": lambda: optax.adafactor(1.0),
        "lion": lambda: optax.lion(1.0, b1=c.b1, b2=c.b2, weight_decay=c.weight_decay),
        "sgd": lambda: optax.sgd(1.0, momentum=c.b1 or None),
    }
    return optax.chain(optax.clip_by_global_norm(c.max_grad_norm), named[c.optimizer]())


def learning_rates(config: TrainConfig, round_number: int, steps: int) -> np.ndarray:
    """The rate of every step of a round, [steps] float32.

    transformers' schedules, entered one step later so that no step has rate 0: the warm-up rises to the peak over
    ceil(warmup_ratio steps) steps, then linear or half-cosine decay towards 0, or none.
    """
    peak, warmup = of_round(config.learning_rate, round_number), math.ceil(config.warmup_ratio * steps)
    step = np.arange(steps)
    done = (step - warmup) / max(1, steps - warmup)
    after = {"linear": 1 - done, "cosine": 0.5 * (1 + np.cos(np.pi * done)), "constant": np.ones(steps)}
    return (peak * np.where(step < warmup, (step + 1) / max(1, warmup), after[config.schedule])).astype(np.float32)


def init_state(params: PyTree[Array], optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A fresh optimizer around `params` (A6), its state float32 and sharded as they are.

    Parameters that are not float32 get a float32 master copy, which the optimizer updates: an update of 5e-7 would
    vanish in bfloat16's eight bits.
    """
    shardings = state_shardings(params, optimizer, mesh)
    init = jax.jit(
        lambda p: (_float32(p) if _needs_master(p) else None, optimizer.init(_float32(p))),
        out_shardings=(shardings.master, shardings.opt_state),
    )
    # Three buffers, not one used thrice: the step donates its state.
    zeros = (sharding.place(np.zeros((), np.int32), sharding.replicated(mesh)) for _ in range(3))
    master, opt_state = init(params)
    return TrainState(next(zeros), params, master, opt_state, next(zeros), next(zeros))


def abstract_state(params: PyTree[Any], optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The shapes, dtypes and shardings of `init_state`, from those of the parameters."""
    master = jax.eval_shape(_float32, params) if _needs_master(params) else None
    opt_state = jax.eval_shape(lambda p: optimizer.init(_float32(p)), params)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(count, params, master, opt_state, count, count)
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return jax.tree.map(place, state, state_shardings(params, optimizer, mesh))


def state_shardings(params: PyTree[Array], optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The sharding of every leaf of the training state: optimizer moments lie where their parameters lie."""
    everywhere: Any = sharding.replicated(mesh)
    of_params = sharding.param_shardings(params, mesh)
    shapes = jax.eval_shape(lambda p: optimizer.init(_float32(p)), params)
    place = lambda leaf, like, param: like if leaf.shape == param.shape else everywhere
    of_optimizer = optax.tree_map_params(
        optimizer, place, shapes, of_params, params, transform_non_params=lambda _: everywhere
    )
    master = of_params if _needs_master(params) else None
    return TrainState(everywhere, of_params, master, of_optimizer, everywhere, everywhere)


def make_train_step(
    log_prob_fn: LogProbFn,
    optimizer: optax.GradientTransformation,
    objective: ObjectiveConfig,
    mesh: Mesh,
    reduce_dtype: str = "float32",
    compiler_options: Mapping[str, str] | None = None,
) -> TrainStep:
    """The compiled step of the objective's loss.

    The team loss is its mean over all triplets of the step (A4); metrics are means over triplets, rewards in nats times
    lam. For `sft` it is the mean negative log-prob of all target tokens of the step, nats a token, as transformers'
    Trainer takes it; a target counts as a triplet then, and metrics are means over targets.
    """

    def team(params, batch, scores, total, scalars):
        log_probs_BR = log_prob_fn(params, batch)
        out, chosen, rejected = _triplets(log_probs_BR, batch, scores, objective, scalars)
        weight = batch.triplet_weight.reshape(-1)
        loss = jnp.sum(weight * out.per_triplet) / total
        return loss, _metric_sums(out, weight, chosen, rejected, _lengths(batch), scalars.tolerance)

    def supervised(params, batch, scores, total, scalars):
        log_probs_BR = log_prob_fn(params, batch)
        lengths_BR = sum_by_response(jnp.ones(batch.labels.shape), batch)
        sums = {
            "triplets": jnp.sum(batch.triplet_weight),
            "logps/chosen": jnp.sum(log_probs_BR),
            "lengths/chosen": jnp.sum(lengths_BR),
            "max": jnp.zeros(()),
        }
        return -jnp.sum(log_probs_BR) / total, jax.lax.stop_gradient(sums)

    if objective.loss == "sft":
        return make_step(supervised, optimizer, mesh, reduce_dtype, compiler_options, _tokens)
    return make_step(team, optimizer, mesh, reduce_dtype, compiler_options)


def make_step(
    micro_loss: MicroLoss,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    reduce_dtype: str = "float32",
    compiler_options: Mapping[str, str] | None = None,
    counted: Callable[[TreeBatch], Array] = lambda batch: jnp.sum(batch.triplet_weight),
) -> TrainStep:
    """The compiled step(state, batch, scores, micro_batches, scalars) -> (state, metrics). The state is donated.

    `batch` and `scores` carry a leading axis A of micro-batches, of which the first `micro_batches` are computed; their
    losses and gradients are summed, so how rows are cut into micro-batches changes nothing. Each device computes them
    on its own rows and its parts of the parameters (see `models.parallel`); gradients travel in `reduce_dtype`.
    `compiler_options` are XLA's; `counted` is what the loss of the step is a mean over.
    """

    def step(state, batch, scores, micro_batches, scalars):
        total = jnp.maximum(counted(batch), 1.0)
        specs = jax.tree.map(lambda placed: placed.spec, sharding.param_shardings(state.params, mesh))
        places = jax.tree.map(lambda placed: placed.spec, input_shardings(mesh))

        def of_device(params, batch, scores, micro_batches, scalars, total):
            loss, sums, gradients = _accumulated(micro_loss, params, batch, scores, micro_batches, scalars, total)
            in_all = lambda x: jax.lax.psum(x, sharding.MESH_AXES_OF["batch"])
            largest = jax.lax.pmax(sums["max"], sharding.MESH_AXES_OF["batch"])
            reduced = jax.tree.map(lambda g, spec: _sum_over_rows(g, spec, reduce_dtype), gradients, specs)
            return in_all(loss), {**in_all(sums), "max": largest}, reduced

        loss, sums, gradients = jax.shard_map(
            of_device,
            mesh=mesh,
            in_specs=(specs, *places, P()),
            out_specs=(P(), P(), specs),
            check_vma=False,  # the sums above and those in `models.parallel` are all there are
        )(state.params, batch, scores, micro_batches, scalars, total)

        placed = state_shardings(state.params, optimizer, mesh)
        state, update_metrics = _update(state, optimizer, loss, gradients, scalars)
        state = jax.lax.with_sharding_constraint(state, placed)
        means = _means(sums, jnp.maximum(sums["triplets"], 1.0))
        return state, {"loss": loss, **means, **update_metrics}

    in_shardings = (None, *input_shardings(mesh))  # the state comes as it is placed
    options = dict(compiler_options) if compiler_options else None
    return jax.jit(step, donate_argnums=0, in_shardings=in_shardings, compiler_options=options)


def _accumulated(micro_loss, params, batch, scores, micro_batches, scalars, total):
    """Loss, sums and gradients of a device's rows in the first `micro_batches`."""
    of_one = lambda i: jax.tree.map(lambda x: x[i], (batch, scores))
    gradient = jax.value_and_grad(micro_loss, has_aux=True)
    if len(batch.tokens) == 1:  # without a loop no sums are kept, and nothing of its body can be computed twice
        (loss, sums), gradients = gradient(params, *of_one(0), total, scalars)
        return loss, sums, jax.tree.map(lambda g: g.astype(jnp.float32), gradients)

    def accumulate(i, carry):
        loss, sums, gradients = carry
        (part, part_sums), part_gradients = gradient(params, *of_one(i), total, scalars)
        add = lambda a, b: a + b.astype(jnp.float32)
        largest = jnp.maximum(sums["max"], part_sums["max"])
        sums = {**jax.tree.map(jnp.add, sums, part_sums), "max": largest}
        return loss + part, sums, jax.tree.map(add, gradients, part_gradients)

    sums = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype),
        jax.eval_shape(lambda: gradient(params, *of_one(0), total, scalars)[0][1]),
    )
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    return jax.lax.fori_loop(0, micro_batches, accumulate, (jnp.zeros(()), sums, zeros))


def _sum_over_rows(gradient: Array, spec: P, reduce_dtype: str) -> Array:
    """A gradient summed over the devices that have other rows and the same part of the parameter."""
    split = {a for axes in spec if axes for a in (axes if isinstance(axes, tuple) else (axes,))}
    axes = [a for a in sharding.MESH_AXES_OF["batch"] if a not in split]  # over fsdp the gather has summed it
    return jax.lax.psum(gradient.astype(reduce_dtype), axes).astype(jnp.float32) if axes else gradient


def input_shardings(mesh: Mesh) -> tuple[Any, ...]:
    """Where the step wants its batch, scores, number of micro-batches and scalars: rows split over the devices."""
    everywhere: Any = sharding.replicated(mesh)
    by_player_and_row: Any = sharding.rows(mesh, leading=2)
    return sharding.rows(mesh, leading=1), TeamScores(by_player_and_row, everywhere), everywhere, everywhere


def _triplets(
    log_probs: Float[Array, "B R"],
    batch: TreeBatch,
    scores: TeamScores,
    objective: ObjectiveConfig,
    scalars: StepScalars,
) -> tuple[TeamLoss, Float[Array, "BR"], Float[Array, "BR"]]:
    """The team loss over the triplets of a batch, flattened to [B R], and the policy's two log-probs of each."""
    pick = lambda values, index: jnp.take_along_axis(values, index, axis=-1)
    flat = lambda values: values.reshape(*values.shape[:-2], -1)
    players = scores.log_probs.shape[0]
    target, generated = (
        jnp.broadcast_to(index, (players, *index.shape)) for index in (batch.triplet_target, batch.triplet_generated)
    )
    chosen = flat(pick(log_probs, batch.triplet_target))
    rejected = flat(pick(log_probs, batch.triplet_generated))
    out = team_loss(
        chosen,
        rejected,
        flat(pick(scores.log_probs, target)),
        flat(pick(scores.log_probs, generated)),
        lam=scalars.lam,
        eta=objective.eta,
        gamma=objective.gamma,
        player_mask=scores.player_mask,
        tolerance=scalars.tolerance,
    )
    return out, chosen, rejected


def _tokens(batch: TreeBatch) -> Array:
    """Predicted tokens of a batch."""
    return jnp.sum(batch.responses < batch.triplet_weight.shape[-1]).astype(jnp.float32)


def _lengths(batch: TreeBatch) -> tuple[Array, Array]:
    """Tokens of the target and of the generated response of each triplet, flattened to [B R]."""
    lengths_BR = sum_by_response(jnp.ones(batch.labels.shape), batch)
    pick = lambda index: jnp.take_along_axis(lengths_BR, index, axis=-1).reshape(-1)
    return pick(batch.triplet_target), pick(batch.triplet_generated)


def _metric_sums(
    out: TeamLoss, weight: Array, chosen: Array, rejected: Array, lengths: tuple[Array, Array], tolerance: Array
) -> Metrics:
    """Sums over triplets; `max` is the largest |P| of the newest player, which is 0 at a round's start."""
    margin = out.reward_target - out.reward_generated
    team = lambda values: jnp.sum(weight * jnp.sum(out.beta * values, axis=0))
    each = lambda values: jnp.sum(weight * values, axis=1)
    entropy = -jnp.sum(jnp.where(out.beta > 0, out.beta * jnp.log(jnp.maximum(out.beta, 1e-30)), 0), axis=0)
    newest = jnp.maximum(jnp.abs(out.reward_target[0]), jnp.abs(out.reward_generated[0]))
    sums = {
        "triplets": jnp.sum(weight),
        "rewards/chosen": team(out.reward_target),
        "rewards/rejected": team(out.reward_generated),
        "rewards/margins": team(margin),
        "rewards/accuracies": jnp.sum(weight * (jnp.sum(out.beta * margin, axis=0) > 0)),
        "logps/chosen": jnp.sum(weight * chosen),
        "logps/rejected": jnp.sum(weight * rejected),
        "lengths/chosen": jnp.sum(weight * lengths[0]),
        "lengths/rejected": jnp.sum(weight * lengths[1]),
        "beta_entropy": jnp.sum(weight * entropy),
        "player/reward_target": each(out.reward_target),
        "player/reward_generated": each(out.reward_generated),
        "player/margin": each(margin),
        "player/alpha_is_eta": each(out.reward_target <= tolerance),
        "player/beta": each(out.beta),
        "max": jnp.max(jnp.where(weight > 0, newest, 0)),
    }
    return jax.tree.map(lambda value: jax.lax.stop_gradient(value.astype(jnp.float32)), sums)


def _means(sums: Metrics, counted: Array) -> Metrics:
    means = {name: value / counted for name, value in sums.items() if name not in ("triplets", "max")}
    return {"triplets": sums["triplets"], "newest_max_abs_reward": sums["max"], **means}


def _update(
    state: TrainState, optimizer: optax.GradientTransformation, loss: Array, gradients: PyTree, scalars: StepScalars
) -> tuple[TrainState, Metrics]:
    """One optimizer step, or none where it is a dry run or the numbers are not finite."""
    norm = optax.global_norm(gradients)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    applied = finite & ~scalars.dry_run
    full = state.params if state.master is None else state.master
    updates, opt_state = optimizer.update(gradients, state.opt_state, full)
    full = jax.tree.map(lambda p, u: p + scalars.learning_rate * u, full, updates)
    params = jax.tree.map(lambda p, old: p.astype(old.dtype), full, state.params)
    keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(applied, a, b), new, old)
    counts = jnp.where(scalars.dry_run, 0, 1)
    skipped = jnp.where(finite, 0, 1) * counts
    new = TrainState(
        step=state.step + counts,
        params=keep(params, state.params),
        master=None if state.master is None else keep(full, state.master),
        opt_state=keep(opt_state, state.opt_state),
        skipped=state.skipped + skipped,
        skipped_in_a_row=jnp.where(scalars.dry_run | ~finite, state.skipped_in_a_row + skipped, 0),
    )
    metrics = {
        "grad_norm": norm,
        "learning_rate": scalars.learning_rate,
        "skipped": new.skipped,
        "skipped_in_a_row": new.skipped_in_a_row,
    }
    return new, metrics


def _needs_master(params: PyTree[Any]) -> bool:
    return any(p.dtype != jnp.float32 for p in jax.tree.leaves(params))


def _float32(params: PyTree[Array]) -> PyTree[Array]:
    return jax.tree.map(lambda p: p.astype(jnp.float32), params)
