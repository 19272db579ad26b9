"""The train step of a configuration, with the first rematerialization policy that fits the devices."""

from collections.abc import Callable
from typing import Any

import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

from tpaw_jax.config import RunConfig
from tpaw_jax.data import packing
from tpaw_jax.models import adapters
from tpaw_jax.models.transformer import Transformer
from tpaw_jax.runtime import processes, tpu
from tpaw_jax.training import batch_shapes, memory, train_step
from tpaw_jax.training.logprobs import LogProbFn, make_log_prob_fn, make_routed_log_prob_fn
from tpaw_jax.training.train_step import TrainStep


def make_fitting_step(
    config: RunConfig,
    model: Transformer,
    params: PyTree[Any],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    say: Callable[[str], None],
) -> tuple[LogProbFn, TrainStep]:
    """The log-prob function and the train step. Rematerialization is as configured; `auto` is the first that fits.

    If the model has adapters, they alone are trained, and the step takes the rest of `params` as its last argument.

    Raises:
        ValueError: no policy fits the devices' memory.
    """

    def with_remat(remat: str) -> tuple[LogProbFn, Any]:
        return configured_step(config, model.clone(remat=remat), optimizer, mesh)

    if config.policy.remat != "auto":
        return with_remat(config.policy.remat)
    trained, frozen = adapters.parts(params, model.lora)
    state = train_step.abstract_state(trained, optimizer, mesh)
    inputs = packing.empty_step(config.packing, config.objective.n_max, batch_shapes.most_micro_batches(config))
    limits = processes.all_gather(limit=np.array([memory.available_bytes()]))
    limit = min(int(one["limit"][0]) for one in limits)  # all processes must run the same program
    compile_with = lambda remat: with_remat(remat)[1].lower(state, *inputs, train_step.NO_SCALARS, *frozen).compile()
    fit = memory.choose_remat(compile_with, limit)
    say(
        f"Rematerialization `{fit.remat}`: a step needs {fit.needed / 2**30:.2f} of {limit / 2**30:.2f} GiB per device."
    )
    return with_remat(fit.remat)[0], fit.compiled


def configured_step(
    config: RunConfig, model: Transformer, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[LogProbFn, TrainStep]:
    """Build the log-prob function and the train step of a run; a plan compiles the same program."""
    parallel = model.parallel._replace(sum_over_data=batch_shapes.most_micro_batches(config) == 1)
    model, chunk = model.clone(parallel=parallel), config.policy.head_chunk
    log_prob_fn, trained = make_log_prob_fn(model, chunk), make_routed_log_prob_fn(model, chunk)
    has_experts = model.config.num_experts > 0
    options = tpu.options_of(mesh, config.mesh.compiler_options, has_experts)
    return log_prob_fn, train_step.make_train_step(
        trained if has_experts else log_prob_fn,
        optimizer,
        config.objective,
        mesh,
        config.train.reduce_dtype,
        options,
        summed_over_data=parallel.summed_over_data(),
        context=parallel.context,
        router=train_step.RouterLosses(config.train.router_balance, config.train.router_z) if has_experts else None,
        lora=model.lora,
    )
