"""Experts on several devices: each token goes to the devices of its experts, and their outputs come back.

The number of tokens that a device sends to another depends on the router. Buffers have a fixed size, so tokens are
exchanged in as many rounds as the fullest pair of devices needs, usually a few more than `ROUNDS`. None is dropped.

Letters are those of `models.experts`; n are the devices of the `expert` axis, C the assignments that each of them sends
to each other in a round, and S = n C the places of a buffer.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from tpaw_jax.models import experts
from tpaw_jax.models.experts import ExpertWeights, Routes
from tpaw_jax.runtime import sharding

ROUNDS = 4
"""Rounds of an exchange between devices whose experts are equally loaded. More rounds send less padding."""

SCOPE = "expert_rounds"
"""Name of the loops over rounds in compiled programs."""

Activation = Callable[[Array], Array]


class Assignments(NamedTuple):
    """The assignments of a device's tokens to experts, sorted by expert, and so by the device that holds it."""

    expert: Int[Array, "A"]  # sorted; E for padding, behind all others
    order: Int[Array, "A"]  # of the tokens' assignments
    rank: Int[Array, "M X"]  # the place of each assignment in that order
    owner: Int[Array, "M X"]  # the device of each assignment; n for padding
    starts: Int[Array, "n+1"]  # the first rank of each device
    rounds: Int[Array, ""]  # the same on all devices


def capacity(assignments: int, devices: int) -> int:
    """The number of assignments that a device sends to another in a round."""
    return -(-assignments // (devices * ROUNDS))


def mixed_outputs(
    h_MD: Float[Array, "M D"], routes: Routes, held: ExpertWeights, activation: Activation
) -> Float[Array, "M D"]:
    """Compute the weighted sum of the outputs of each token's experts, of which each device holds its share."""
    return _in_rounds(activation, h_MD, routes.weights, held, _sorted(routes.experts, len(held.gate)))


def _sorted(experts_MX: Array, held: int) -> Assignments:
    assigned_A = experts_MX.reshape(-1)
    order_A = jnp.argsort(assigned_A, stable=True)
    rank_A = jnp.zeros_like(order_A).at[order_A].set(jnp.arange(len(order_A)), unique_indices=True)
    expert_A, devices = assigned_A[order_A], lax.axis_size("expert")
    starts = jnp.searchsorted(expert_A, jnp.arange(devices + 1) * held).astype(jnp.int32)
    most = jnp.max(-(-jnp.diff(starts) // capacity(len(order_A), devices)))
    rounds = lax.pmax(most, sharding.MESH_AXES_OF["batch"])  # devices that share no experts run the same loop, too
    return Assignments(
        expert_A, order_A, rank_A.reshape(experts_MX.shape), experts_MX // held, starts, rounds.astype(jnp.int32)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_rounds(
    activation: Activation, h_MD: Array, weights_MX: Array, held: ExpertWeights, assignments: Assignments
) -> Array:
    add = lambda r, total: total + _round(activation, assignments, r, (h_MD, weights_MX, held))
    with jax.named_scope(SCOPE):
        total = lax.fori_loop(0, assignments.rounds, add, jnp.zeros(h_MD.shape, jnp.float32))
    return total.astype(h_MD.dtype)


def _in_rounds_forward(activation, *arguments):
    return _in_rounds(activation, *arguments), arguments


def _in_rounds_backward(activation, saved, d_MD):
    h_MD, weights_MX, held, assignments = saved
    d_MD, frozen = d_MD.astype(jnp.float32), held.adapters is not None
    inputs = h_MD, weights_MX, held.adapters if frozen else held
    whole = lambda trained: held._replace(adapters=trained) if frozen else trained

    def add(r, total):
        of_inputs = lambda h, weights, trained: _round(activation, assignments, r, (h, weights, whole(trained)))
        gradients = jax.vjp(of_inputs, *inputs)[1](d_MD)
        return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, gradients)

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), inputs)
    with jax.named_scope(SCOPE):
        gradients = lax.fori_loop(0, assignments.rounds, add, zeros)
    d_h, d_weights, d_trained = jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), gradients, inputs)
    d_held = jax.tree.map(jnp.zeros_like, held)._replace(adapters=d_trained) if frozen else d_trained
    return d_h, d_weights, d_held, jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), assignments)


_in_rounds.defvjp(_in_rounds_forward, _in_rounds_backward)


def _round(activation: Activation, a: Assignments, r: Any, inputs: tuple[Array, Array, ExpertWeights]) -> Array:
    """The part of the outputs that is exchanged in round r."""
    h_MD, weights_MX, held = inputs
    devices, count = lax.axis_size("expert"), len(held.gate)
    size = capacity(len(a.order), devices)
    swap = lambda x: lax.all_to_all(x, "expert", split_axis=0, concat_axis=0, tiled=True)

    index_nC = a.starts[:-1, None] + r * size + jnp.arange(size)
    sends_nC = index_nC < a.starts[1:, None]
    index_nC = jnp.minimum(index_nC, len(a.order) - 1)
    source_S = jnp.where(sends_nC, a.order[index_nC], -1).reshape(-1)
    expert_S = jnp.where(sends_nC, a.expert[index_nC] % count, count).reshape(-1)
    behind_MX = a.rank - a.starts[jnp.minimum(a.owner, devices - 1)] - r * size
    sent_MX = (a.owner < devices) & (behind_MX >= 0) & (behind_MX < size)
    place_MX = jnp.where(sent_MX, a.owner * size + behind_MX, -1)

    h_SD = swap(experts.send(h_MD, place_MX, source_S))
    out_SD = experts.compute(h_SD, swap(expert_S)[:, None], held, activation)[:, 0]
    return experts.mix(experts.receive(swap(out_SD), place_MX, source_S).astype(jnp.float32), weights_MX)
