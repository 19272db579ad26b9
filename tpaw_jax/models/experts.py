"""Mixture of experts: each token is computed by the few experts that a router chooses for it. No token is dropped.

Tokens are sorted by expert, so each matrix product is one ragged matmul over all experts (MegaBlocks, arXiv
2211.15841). Tokens of padding are computed by no expert.

In this file E are experts, X the experts of a token, A = M X the assignments of tokens to experts, and S the places of
a buffer of assigned tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from tpaw_jax.models.model_config import ModelConfig


class Routes(NamedTuple):
    """The experts that a router chooses."""

    experts: Int[Array, "M X"]  # E for tokens of padding
    weights: Float[Array, "M X"]  # float32


class ExpertAdapters(NamedTuple):
    """Low-rank adapters of a layer's experts. `gate` and `up` share A. B is already multiplied by the scale."""

    gate_up_a: Float[Array, "E D r"]
    gate_b: Float[Array, "E r F"]
    up_b: Float[Array, "E r F"]
    down_a: Float[Array, "E F r"]
    down_b: Float[Array, "E r D"]


class ExpertWeights(NamedTuple):
    """The matrices of a layer's experts, or of those that a device holds."""

    gate: Float[Array, "E D F"]
    up: Float[Array, "E D F"]
    down: Float[Array, "E F D"]
    adapters: ExpertAdapters | None = None


class RouterStatistics(NamedTuple):
    """How evenly the router of a layer loads its experts with the tokens of each row.

    Those of a model are means over its layers with experts. Per row, f_e is the share of assignments that go to expert
    e, and P_e the mean probability that the router gives it.
    """

    balance: Float[Array, "B"]  # E sum_e f_e P_e: the load-balance loss (arXiv 2101.03961, equation 4); 1 if even
    z: Float[Array, "B"]  # mean squared log-sum-exp of the router's logits: the z-loss (arXiv 2202.08906, equation 5)
    busiest: Float[Array, "B"]  # E max_e f_e: load of the busiest expert; 1 if even


def route(
    h_MD: Float[Array, "M D"], router_DE: Float[Array, "D E"], live: Bool[Array, "M"] | None, config: ModelConfig
) -> tuple[Routes, Float[Array, "M E"]]:
    """Choose the most probable experts of each token, in float32. Return the router's logits too.

    `live` is False for tokens of padding.
    """
    as_float32 = lambda x: x.astype(jnp.float32)
    logits_ME = jnp.dot(as_float32(h_MD), as_float32(router_DE), precision=lax.Precision.HIGHEST)
    weights, experts = lax.top_k(jax.nn.softmax(logits_ME), config.experts_per_token)
    if config.normalized_experts:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    if live is not None:
        experts = jnp.where(live[:, None], experts, config.num_experts)
    return Routes(experts, weights), logits_ME


def scaled_routes(routes: Routes, scale: Float[Array, "E"]) -> Routes:
    """Multiply the weights of each expert by its own number."""
    of_experts = scale.astype(jnp.float32)[jnp.minimum(routes.experts, len(scale) - 1)]
    return routes._replace(weights=routes.weights * of_experts)


def router_statistics(
    routes: Routes, logits_ME: Array, live: Bool[Array, "M"], rows: int, total: Callable[[Array], Array] = lambda x: x
) -> RouterStatistics:
    """Compute the statistics of one layer. `total` sums over the devices that share rows."""
    experts = logits_ME.shape[1]
    by_row = lambda x: total(jnp.sum(x.reshape(rows, -1, *x.shape[1:]), axis=1))
    weight_M = live.astype(jnp.float32)
    tokens_B1 = jnp.maximum(by_row(weight_M), 1.0)[:, None]
    chosen_ME = jnp.sum(jax.nn.one_hot(routes.experts, experts, dtype=jnp.float32), axis=1)
    share_BE = by_row(chosen_ME) / (tokens_B1 * routes.experts.shape[1])
    probability_BE = by_row(jax.nn.softmax(logits_ME) * weight_M[:, None]) / tokens_B1
    squares_M = jax.nn.logsumexp(logits_ME, axis=-1) ** 2 * weight_M
    return RouterStatistics(
        experts * jnp.sum(share_BE * probability_BE, axis=1),
        by_row(squares_M) / tokens_B1[:, 0],
        experts * jnp.max(share_BE, axis=1),
    )


def mix(outputs: Float[Array, "M X D"], weights: Float[Array, "M X"]) -> Float[Array, "M D"]:
    """Sum the outputs of a token's experts by their weights, in float32; return it in the dtype of the outputs."""
    return jnp.einsum("mxd,mx->md", outputs.astype(jnp.float32), weights).astype(outputs.dtype)


def mixed_outputs(
    h_MD: Float[Array, "M D"], routes: Routes, weights: ExpertWeights, activation: Callable[[Array], Array]
) -> Float[Array, "M D"]:
    """Compute the weighted sum of the outputs of each token's experts."""
    return mix(compute(h_MD, routes.experts, weights, activation), routes.weights)


def compute(
    h_MD: Float[Array, "M D"],
    experts: Int[Array, "M X"],
    weights: ExpertWeights,
    activation: Callable[[Array], Array],
) -> Float[Array, "M X D"]:
    """Compute each token with each of its experts: down(activation(gate(h)) up(h)); zeros for the experts E."""
    assigned_A, count = experts.reshape(-1), len(weights.gate)
    order_A = jnp.argsort(assigned_A, stable=True)
    ends_E = jnp.searchsorted(assigned_A[order_A], jnp.arange(count), side="right").astype(jnp.int32)
    sizes_E = jnp.diff(ends_E, prepend=0)
    source_S = jnp.where(jnp.arange(len(order_A)) < ends_E[-1], order_A, -1)
    place_A = jnp.zeros_like(order_A).at[order_A].set(jnp.arange(len(order_A)), unique_indices=True)
    place_MX = jnp.where(experts < count, place_A.reshape(experts.shape), -1)
    product = lambda x, matrices: lax.ragged_dot(x, matrices, sizes_E, preferred_element_type=x.dtype)
    # Ragged matmuls leave the places behind the last expert undefined; nothing reads them.
    h_SD, own = send(h_MD, place_MX, source_S), weights.adapters
    gate_SF, up_SF = product(h_SD, weights.gate), product(h_SD, weights.up)
    if own is not None:
        low_Sr = product(h_SD, own.gate_up_a)
        gate_SF, up_SF = gate_SF + product(low_Sr, own.gate_b), up_SF + product(low_Sr, own.up_b)
    hidden_SF = activation(gate_SF) * up_SF
    out_SD = product(hidden_SF, weights.down)
    if own is not None:
        out_SD += product(product(hidden_SF, own.down_a), own.down_b)
    return receive(out_SD, place_MX, source_S)


@jax.custom_vjp
def send(x_MD: Float[Array, "M D"], place: Int[Array, "M X"], source: Int[Array, "S"]) -> Float[Array, "S D"]:
    """Write the token of each assignment to its place in a buffer; zeros where there is none.

    The gradient is a gather as well, because places and sources are each other's inverse.

    Args:
        x_MD: the tokens.
        place: the place of each assignment; -1 for those that are not in the buffer.
        source: the assignment, in order of tokens, of each place; -1 where there is none.
    """
    return _take(x_MD, jnp.where(source < 0, -1, source // place.shape[1]))


def _send_forward(x_MD, place, source):
    return send(x_MD, place, source), (place, source)


def _send_backward(saved, d_SD):
    place, source = saved
    d_MD = jnp.sum(_take(d_SD, place).astype(jnp.float32), axis=1).astype(d_SD.dtype)
    return d_MD, *_no_gradient(place, source)


send.defvjp(_send_forward, _send_backward)


@jax.custom_vjp
def receive(x_SD: Float[Array, "S D"], place: Int[Array, "M X"], source: Int[Array, "S"]) -> Float[Array, "M X D"]:
    """Read the value of each assignment from its place in a buffer, see `send`; zeros for those that are not in it."""
    return _take(x_SD, place)


def _receive_forward(x_SD, place, source):
    return receive(x_SD, place, source), (place, source)


def _receive_backward(saved, d_MXD):
    place, source = saved
    return _take(d_MXD.reshape(-1, d_MXD.shape[-1]), source), *_no_gradient(place, source)


receive.defvjp(_receive_forward, _receive_backward)


def _take(x: Array, index: Array) -> Array:
    """x[index]; zeros where the index is negative."""
    return jnp.where(index[..., None] < 0, 0, x[jnp.maximum(index, 0)])


def _no_gradient(*integers: Array) -> list[np.ndarray]:
    return [np.zeros(x.shape, jax.dtypes.float0) for x in integers]
