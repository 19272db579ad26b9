"""The layers of a sharded model, with gradients reduce-scattered while the backward pass computes.

The TPU compiler runs a collective beside the computation that is near it in the program. It moves none from one
iteration of a loop to another, and it puts a collective that nothing waits for behind the loop. So this backward pass

- reduces the gradients of a layer's attention, the last that it computes, in the iteration of the layer before it;
- computes the last layer outside of the loop, and reduces the gradient of the output embedding there.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from tpaw_jax.models.parallel.collectives import ATTENTION


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def scan_layers(
    gather: Callable[[PyTree[Array]], PyTree[Array]],
    apply: Callable[..., PyTree[Array]],
    layers: tuple[PyTree[Array], Any],
    x: PyTree[Array],
    inputs: tuple[Any, ...],
    head: Float[Array, "v d"],
) -> tuple[PyTree[Array], Float[Array, "v d"]]:
    """Apply all layers in turn: x = apply(gather(a layer's shards), x, kind, *inputs). Return x and `head`.

    Args:
        gather: a layer's shards of its parameters -> the parameters that `apply` takes; its gradient reduces.
        apply: a layer; what it keeps for the backward pass is up to its `jax.checkpoint`.
        layers: the shards of all layers' parameters, stacked on a leading axis, and the kinds of the layers or None.
        x: the input of the first layer: hidden states [M, D], and what layers add to besides.
        inputs: what all layers take besides; without gradient.
        head: the shard of the output embedding; pass the one that is returned to the output head, so that its
            gradient is reduced beside the last layer's backward pass.
    """
    layer = lambda x, own: (apply(gather(own[0]), x, own[1], *inputs), None)
    return lax.scan(layer, x, layers)[0], head


def _forward(gather, apply, layers, x, inputs, head):
    def layer(x, own):
        shards, kind = own
        out, vjp = jax.vjp(apply, gather(shards), x, kind, *inputs)
        vjp.args_res = None  # the backward pass has the arguments: `x` is saved, and parameters are gathered again
        return out, (x, vjp)

    out, saved = lax.scan(layer, x, layers)
    return (out, head), (layers, inputs, saved)


def _backward(gather, apply, residuals, gradients):
    (params, kinds), inputs, saved = residuals
    dx, d_head = gradients
    last = len(jax.tree.leaves(params)[0]) - 1

    def gradients_of(i, dx):
        x, vjp = _at(saved, i)
        vjp.args_res = [gather(_at(params, i)), x, _at(kinds, i), *inputs]
        return vjp(dx)[:2]

    def reduced(i, full, d_params):
        """Write the gradients `full` of layer i, reduced over devices, to the stacked `d_params`."""
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(gather, _at(params, i)))
        (d_shards,) = jax.vjp(gather, _at(params, i))[1]({**zeros, **full})
        put = lambda stacked, one: lax.dynamic_update_index_in_dim(stacked, one, i, 0)
        return {name: jax.tree.map(put, d, d_shards[name]) if name in full else d for name, d in d_params.items()}

    def layer(n, carry):
        dx, pending, d_params = carry
        i = last - n
        d_params = reduced(i + 1, pending, d_params)
        full, dx = gradients_of(i, dx)
        now, pending = _split(full)
        return dx, pending, reduced(i, now, d_params)

    full, dx = gradients_of(last, dx)
    now, pending = _split(full)
    d_params = reduced(last, now, jax.tree.map(jnp.zeros_like, params))
    dx, d_head = lax.optimization_barrier((dx, d_head))  # the loop waits for the head's gradient
    dx, pending, d_params = lax.fori_loop(1, last + 1, layer, (dx, pending, d_params))
    return (reduced(0, pending, d_params), None), dx, None, d_head


def _at(stacked: PyTree[Array], i: Any) -> PyTree[Array]:
    return jax.tree.map(lambda array: lax.dynamic_index_in_dim(array, i, keepdims=False), stacked)


def _split(full: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A layer's gradients that are reduced at once, and those that wait for the next iteration."""
    late = {name: full[name] for name in ATTENTION}
    return {name: d for name, d in full.items() if name not in late}, late


scan_layers.defvjp(_forward, _backward)
