"""The train step: log-probs of packed trees, team loss, one optimizer update; compiled once for all rounds.

Learning rate, lam, tolerance and the number of micro-batches are data, so rounds that differ in them share one compiled
program. A step whose loss or gradient is not finite updates nothing but its counters.
"""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PyTree

from tpaw_jax.config import ObjectiveConfig, TrainConfig
from tpaw_jax.models import adapters
from tpaw_jax.models.adapters import Lora
from tpaw_jax.models.experts import RouterStatistics
from tpaw_jax.models.parallel import context as contexts
from tpaw_jax.objective import TeamLoss, team_loss
from tpaw_jax.runtime import sharding, tpu
from tpaw_jax.training import gradients
from tpaw_jax.training.logprobs import LogProbFn, RoutedLogProbFn, sum_by_response
from tpaw_jax.types import AnyArray, TeamScores, TrainState, TreeBatch


class StepScalars(NamedTuple):
    """Scalars that change between steps or rounds without recompilation."""

    learning_rate: AnyArray
    lam: AnyArray  # reward scale
    tolerance: AnyArray  # largest reward for which alpha is eta (A8)
    dry_run: AnyArray  # compute metrics, update nothing
    round_number: AnyArray = np.int32(0)  # matters where each round trains its own adapters


NO_SCALARS = StepScalars(np.float32(0), np.float32(0), np.float32(0), np.bool_(False))

Metrics = dict[str, Array]
MicroLoss = Callable[[PyTree[Array], TreeBatch, TeamScores, Array, StepScalars], tuple[Array, Metrics]]
"""(params, batch, scores, total, scalars) -> (loss, sums) of one micro-batch.

The losses of a step's micro-batches are added, so each divides its sum by `total`, the step's number of triplets (or
tokens). `sums` has `triplets`, `max` (the step takes the maximum over micro-batches) and sums over triplets, of which
the step returns the means.
"""

TrainStep = Callable[..., tuple[TrainState, Metrics]]
"""(state, batch, scores, micro_batches, scalars[, base]) -> (state, metrics), see `make_step`."""


class RouterLosses(NamedTuple):
    """The weights of the losses of `models.experts.RouterStatistics`."""

    balance: float
    z: float


def _triplets_of_rows(batch: TreeBatch) -> Array:
    """Number of triplets in each row, [..., B]."""
    return jnp.sum(batch.triplet_weight, axis=-1)


def _tokens_of_rows(batch: TreeBatch) -> Array:
    """Number of predicted tokens in each row, [..., B]."""
    return jnp.sum(batch.response_ids < batch.triplet_weight.shape[-1], axis=-1).astype(jnp.float32)


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Build the optimizer at learning rate 1, with gradient clipping; the train step multiplies updates by the rate.

    This is equivalent, because the updates of all supported optimizers are linear in the learning rate.
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


def init_state(params: PyTree[Array], optimizer: optax.GradientTransformation, mesh: Mesh | None = None) -> TrainState:
    """Build the state of a new round: `params` with a fresh optimizer state (A6), float32 and sharded alike.

    If the parameters are not float32, the optimizer updates a float32 master copy, because updates of 5e-7 would be
    rounded away in bfloat16. Without a mesh, the state is on the first local device.
    """
    mesh = sharding.single_device_mesh() if mesh is None else mesh
    shardings = state_shardings(params, optimizer, mesh)
    init = jax.jit(
        lambda p: (_float32(p) if _needs_master(p) else None, optimizer.init(_float32(p))),
        out_shardings=(shardings.master, shardings.opt_state),
    )
    # Three separate buffers, because the step donates its state.
    zeros = (sharding.place(np.zeros((), np.int32), sharding.replicated(mesh)) for _ in range(3))
    master, opt_state = init(params)
    return TrainState(next(zeros), params, master, opt_state, next(zeros), next(zeros))


def abstract_state(params: PyTree[Any], optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Return the shapes, dtypes and shardings of `init_state`, from arrays or shapes of the parameters."""
    master = jax.eval_shape(_float32, params) if _needs_master(params) else None
    opt_state = jax.eval_shape(lambda p: optimizer.init(_float32(p)), params)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(count, params, master, opt_state, count, count)
    with_sharding = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return jax.tree.map(with_sharding, state, state_shardings(params, optimizer, mesh))


def state_shardings(params: PyTree[Array], optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Return the sharding of every leaf of the train state. Optimizer moments are sharded like their parameters."""
    replicated: Any = sharding.replicated(mesh)
    params_shardings = sharding.param_shardings(params, mesh)
    shapes = jax.eval_shape(lambda p: optimizer.init(_float32(p)), params)
    like_param = lambda leaf, of_param, param: of_param if leaf.shape == param.shape else replicated
    opt_shardings = optax.tree_map_params(
        optimizer, like_param, shapes, params_shardings, params, transform_non_params=lambda _: replicated
    )
    master = params_shardings if _needs_master(params) else None
    return TrainState(replicated, params_shardings, master, opt_shardings, replicated, replicated)


def make_train_step(
    log_prob_fn: LogProbFn | RoutedLogProbFn,
    optimizer: optax.GradientTransformation,
    objective: ObjectiveConfig,
    mesh: Mesh | None = None,
    reduce_dtype: str = "float32",
    compiler_options: Mapping[str, str] | None = None,
    *,
    summed_over_data: Collection[str] = (),
    context: int = 1,
    router: RouterLosses | None = None,
    lora: Lora | None = None,
) -> TrainStep:
    """Build the compiled train step of the objective; see `make_step` for the other arguments and the result.

    The team loss is the mean over all triplets of the step (A4). Metrics are means over triplets; rewards are in nats
    times lam. For `sft`, the loss is the mean negative log-prob of all target tokens of the step, in nats per token, as
    in transformers' Trainer. Each target then counts as a triplet, and metrics are means over targets.

    With `router`, `log_prob_fn` is that of `make_routed_log_prob_fn`. The losses of a mixture of experts are computed
    for each row, which makes them independent of batch size and devices, and averaged with the weights that rows have
    in the objective's loss.
    """
    evaluate = log_prob_fn if router else lambda params, batch: (log_prob_fn(params, batch), None)

    def team(params, batch, scores, total, scalars):
        log_probs_BR, statistics = evaluate(params, batch)
        out, chosen, rejected = _triplets(log_probs_BR, batch, scores, objective, scalars)
        weight = batch.triplet_weight.reshape(-1)
        sums = _metric_sums(out, weight, chosen, rejected, _lengths(batch), scalars.tolerance)
        extra, router_sums = _router_loss(router, statistics, batch, _triplets_of_rows(batch))
        return (jnp.sum(weight * out.per_triplet) + extra) / total, sums | router_sums

    def supervised(params, batch, scores, total, scalars):
        log_probs_BR, statistics = evaluate(params, batch)
        lengths_BR = sum_by_response(jnp.ones(batch.labels.shape), batch)
        extra, router_sums = _router_loss(router, statistics, batch, _tokens_of_rows(batch))
        sums = {
            "triplets": jnp.sum(batch.triplet_weight),
            "logps/chosen": jnp.sum(log_probs_BR),
            "lengths/chosen": jnp.sum(lengths_BR),
            "max": jnp.zeros(()),
        }
        return (extra - jnp.sum(log_probs_BR)) / total, jax.lax.stop_gradient(sums | router_sums)

    loss, rows = (supervised, _tokens_of_rows) if objective.loss == "sft" else (team, _triplets_of_rows)
    counted = lambda batch: jnp.sum(rows(batch))
    options: dict[str, Any] = {"counted": counted, "summed_over_data": summed_over_data, "context": context}
    return make_step(loss, optimizer, mesh, reduce_dtype, compiler_options, lora=lora, **options)


def _router_loss(
    router: RouterLosses | None, statistics: RouterStatistics | None, batch: TreeBatch, weight_B: Array
) -> tuple[Array | float, Metrics]:
    """The sum of the router losses of the rows by their weight, and the sums of what is reported, over triplets."""
    if router is None or statistics is None:
        return 0.0, {}
    loss = jnp.sum(weight_B * (router.balance * statistics.balance + router.z * statistics.z))
    triplets_B = _triplets_of_rows(batch)
    sums = {f"router/{name}": jnp.sum(triplets_B * values_B) for name, values_B in statistics._asdict().items()}
    return loss, jax.lax.stop_gradient(sums)


def make_step(
    micro_loss: MicroLoss,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
    reduce_dtype: str = "float32",
    compiler_options: Mapping[str, str] | None = None,
    *,
    counted: Callable[[TreeBatch], Array] = lambda batch: jnp.sum(batch.triplet_weight),
    summed_over_data: Collection[str] = (),
    context: int = 1,
    lora: Lora | None = None,
) -> TrainStep:
    """Build the compiled step(state, batch, scores, micro_batches, scalars) -> (state, metrics). It donates the state.

    `batch` and `scores` have a leading axis A of micro-batches, of which the first `micro_batches` are computed. Their
    losses and gradients are summed, so the result does not depend on how rows are cut into micro-batches. Each device
    computes its own rows with its own parameter shards (see `models.parallel`).

    Args:
        micro_loss: the loss of one micro-batch.
        optimizer: an optimizer at learning rate 1, as from `make_optimizer`.
        mesh: the devices; by default, the first local device.
        reduce_dtype: dtype in which gradients are reduced over devices.
        compiler_options: XLA options.
        counted: batch -> the number that the loss is a mean over.
        summed_over_data: parameters whose gradients the loss's backward pass has summed over `data` already.
        context: devices that share rows, see `models.parallel.context`.
        lora: the state has these adapters alone; the step takes the base, which is not donated, as sixth argument.
    """
    mesh = sharding.single_device_mesh() if mesh is None else mesh

    def step(state, batch, scores, micro_batches, scalars, *frozen):
        slices = tpu.slice_count(list(mesh.devices.flat))
        total = jnp.maximum(counted(batch), 1.0)
        param_specs, *frozen_specs = (_specs(params, mesh) for params in (state.params, *frozen))
        input_specs = jax.tree.map(lambda s: s.spec, input_shardings(mesh))
        batch, scores = contexts.spread(batch, context, mesh), contexts.spread_scores(scores, context, mesh)
        loss, sums, summed = jax.shard_map(
            _loss_and_gradients(micro_loss, param_specs, reduce_dtype, summed_over_data, slices),
            mesh=mesh,
            in_specs=(param_specs, *input_specs, P(), *frozen_specs),
            out_specs=(P(), P(), param_specs),
            check_vma=False,  # `gradients` and `models.parallel` do all reductions themselves
        )(state.params, batch, scores, micro_batches, scalars, total, *frozen)
        state, update_metrics = _update(state, optimizer, loss, summed, scalars, lora)
        state = jax.lax.with_sharding_constraint(state, state_shardings(state.params, optimizer, mesh))
        return state, {"loss": loss, **_means(sums, jnp.maximum(sums["triplets"], 1.0)), **update_metrics}

    in_shardings = (None, *input_shardings(mesh, context), *[None] * (lora is not None))  # None: keep its own
    return jax.jit(step, donate_argnums=0, in_shardings=in_shardings, compiler_options=dict(compiler_options or {}))


def _specs(params: PyTree[Any], mesh: Mesh) -> PyTree[P]:
    return jax.tree.map(lambda placed: placed.spec, sharding.param_shardings(params, mesh))


def _loss_and_gradients(micro_loss, param_specs, reduce_dtype, summed_over_data, slices):
    """The part of the step that each device computes: loss, metric sums and gradients, reduced over all devices."""

    def per_device(params, batch, scores, micro_batches, scalars, total, *frozen):
        loss_of = lambda params, *inputs: micro_loss(adapters.join(params, *frozen) if frozen else params, *inputs)
        gradient = jax.value_and_grad(loss_of, has_aux=True)
        gradient_of = lambda i: gradient(params, *jax.tree.map(lambda x: x[i], (batch, scores)), total, scalars)
        (loss, sums), own = gradients.accumulate(gradient_of, micro_batches, len(batch.tokens))
        psum = lambda x: jax.lax.psum(x, sharding.MESH_AXES_OF["batch"])
        largest = jax.lax.pmax(sums["max"], sharding.MESH_AXES_OF["batch"])
        summed = gradients.sum_over_devices(own, param_specs, reduce_dtype, summed_over_data, slices)
        return psum(loss), {**psum(sums), "max": largest}, summed

    return per_device


def input_shardings(mesh: Mesh, context: int = 1) -> tuple[Any, ...]:
    """Return the shardings of the step's batch, scores, number of micro-batches and scalars.

    Batch and scores are split by row, or replicated if `context` devices share rows.
    """
    replicated: Any = sharding.replicated(mesh)
    if context > 1:
        return (replicated,) * 4
    log_probs: Any = sharding.rows(mesh, leading=2)
    return sharding.rows(mesh, leading=1), TeamScores(log_probs, replicated), replicated, replicated


def by_triplet(values: Float[Array, "*J B R"], batch: TreeBatch) -> tuple[Float[Array, "*J N"], Float[Array, "*J N"]]:
    """Values of responses, such as log-probs, as values of the targets and of the generated responses of all triplets.

    N = B R; padding triplets have `batch.triplet_weight` 0.
    """

    def pick(index: Array) -> Array:
        index = jnp.broadcast_to(index, (*values.shape[:-2], *index.shape))
        return jnp.take_along_axis(values, index, axis=-1).reshape(*values.shape[:-2], -1)

    return pick(batch.triplet_target), pick(batch.triplet_generated)


def _triplets(
    log_probs: Float[Array, "B R"],
    batch: TreeBatch,
    scores: TeamScores,
    objective: ObjectiveConfig,
    scalars: StepScalars,
) -> tuple[TeamLoss, Float[Array, "N"], Float[Array, "N"]]:
    """Team loss of the batch's triplets, and the policy's log-probs of y and y_gen."""
    chosen, rejected = by_triplet(log_probs, batch)
    out = team_loss(
        chosen,
        rejected,
        *by_triplet(scores.log_probs, batch),
        lam=scalars.lam,
        eta=objective.eta,
        gamma=objective.gamma,
        player_mask=scores.player_mask,
        tolerance=scalars.tolerance,
    )
    return out, chosen, rejected


def _lengths(batch: TreeBatch) -> tuple[Array, Array]:
    """Numbers of tokens of each triplet's target and generated response, each flattened to [B R]."""
    return by_triplet(sum_by_response(jnp.ones(batch.labels.shape), batch), batch)


def _metric_sums(
    out: TeamLoss, weight: Array, chosen: Array, rejected: Array, lengths: tuple[Array, Array], tolerance: Array
) -> Metrics:
    """Sums over triplets. `max` is the largest |P_j| of the newest player, which is 0 at the start of a round."""
    margin = out.reward_target - out.reward_generated
    over_team = lambda values: jnp.sum(weight * jnp.sum(out.beta * values, axis=0))
    per_player = lambda values: jnp.sum(weight * values, axis=1)
    entropy = -jnp.sum(jnp.where(out.beta > 0, out.beta * jnp.log(jnp.maximum(out.beta, 1e-30)), 0), axis=0)
    newest = jnp.maximum(jnp.abs(out.reward_target[0]), jnp.abs(out.reward_generated[0]))
    sums = {
        "triplets": jnp.sum(weight),
        "rewards/chosen": over_team(out.reward_target),
        "rewards/rejected": over_team(out.reward_generated),
        "rewards/margins": over_team(margin),
        "rewards/accuracies": jnp.sum(weight * (jnp.sum(out.beta * margin, axis=0) > 0)),
        "logps/chosen": jnp.sum(weight * chosen),
        "logps/rejected": jnp.sum(weight * rejected),
        "lengths/chosen": jnp.sum(weight * lengths[0]),
        "lengths/rejected": jnp.sum(weight * lengths[1]),
        "beta_entropy": jnp.sum(weight * entropy),
        "player/reward_target": per_player(out.reward_target),
        "player/reward_generated": per_player(out.reward_generated),
        "player/margin": per_player(margin),
        "player/alpha_is_eta": per_player(out.reward_target <= tolerance),
        "player/beta": per_player(out.beta),
        "max": jnp.max(jnp.where(weight > 0, newest, 0)),
    }
    return jax.tree.map(lambda value: jax.lax.stop_gradient(value.astype(jnp.float32)), sums)


def _means(sums: Metrics, counted: Array) -> Metrics:
    means = {name: value / counted for name, value in sums.items() if name not in ("triplets", "max")}
    return {"triplets": sums["triplets"], "newest_max_abs_reward": sums["max"], **means}


def _is_trained(path: tuple[Any, ...]) -> bool:
    """Whether a parameter is trained. Others have no gradient, and weight decay must not move them either."""
    return "output_scale" not in sharding.path_name(path)


def _update(
    state: TrainState,
    optimizer: optax.GradientTransformation,
    loss: Array,
    gradients: PyTree,
    scalars: StepScalars,
    lora: Lora | None,
) -> tuple[TrainState, Metrics]:
    """Apply one optimizer step, unless it is a dry run or the loss or gradient is not finite."""
    trained = functools.partial(adapters.of_round, round_number=scalars.round_number, lora=lora)
    gradients = trained(gradients)
    norm = optax.global_norm(gradients)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    apply = finite & ~scalars.dry_run
    master = state.params if state.master is None else state.master
    updates, opt_state = optimizer.update(gradients, state.opt_state, master)
    moved = lambda path, p, u: p + scalars.learning_rate * u if _is_trained(path) else p
    master = jax.tree_util.tree_map_with_path(moved, master, trained(updates))
    params = jax.tree.map(lambda p, old: p.astype(old.dtype), master, state.params)
    select = lambda new, old: jax.tree.map(lambda a, b: jnp.where(apply, a, b), new, old)
    counts = jnp.where(scalars.dry_run, 0, 1)
    skipped = jnp.where(finite, 0, 1) * counts
    new = TrainState(
        step=state.step + counts,
        params=select(params, state.params),
        master=None if state.master is None else select(master, state.master),
        opt_state=select(opt_state, state.opt_state),
        skipped=state.skipped + skipped,
        skipped_in_a_row=jnp.where(scalars.dry_run | ~finite, state.skipped_in_a_row + skipped, 0),
    )
    counters = {"skipped": new.skipped, "skipped_in_a_row": new.skipped_in_a_row}
    return new, {"grad_norm": norm, "learning_rate": scalars.learning_rate, **counters}


def _needs_master(params: PyTree[Any]) -> bool:
    return any(p.dtype != jnp.float32 for p in jax.tree.leaves(params))


def _float32(params: PyTree[Array]) -> PyTree[Array]:
    return jax.tree.map(lambda p: p.astype(jnp.float32), params)
