"""The layers of a sharded model, with gradients reduce-scattered while the backward pass computes.

The TPU compiler runs a collective beside the computation that is near it in the program. It moves none from one
iteration of a loop to another, and it puts a collective that nothing waits for behind the loop. So this backward pass

- reduces the gradients of a layer's attention, the last that it computes, beside the layer before it;
- computes the last repeat of a cycle outside of the loop, and reduces the gradient of the output embedding there.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from tpaw_jax.models import adapters
from tpaw_jax.models.layer_stacks import Cycle, Member
from tpaw_jax.models.parallel.collectives import ATTENTION

Stacks = dict[str, PyTree[Array]]


class Stack(NamedTuple):
    """How the layers of a stack are computed."""

    name: str
    gather: Callable[[PyTree[Array]], PyTree[Array]]  # a layer's shards -> its parameters; its gradient reduces
    apply: Callable[..., tuple[PyTree[Array], PyTree[Array]]]  # see `scan_layers`


class Others(NamedTuple):
    """What belongs to the layers of a stack besides the parameters that are trained, on a leading axis."""

    frozen: PyTree[Array]
    kinds: Array | None


class Order(NamedTuple):
    """The stacks of layers, and the order in which they take turns."""

    stacks: tuple[Stack, ...]
    cycles: tuple[Cycle, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan_layers(
    order: Order,
    layers: tuple[Stacks, dict[str, Others]],
    x: PyTree[Array],
    shared: PyTree[Array],
    inputs: dict[str, Any],
    head: Float[Array, "v d"] | None,
) -> tuple[PyTree[Array], Float[Array, "v d"] | None]:
    """Apply all layers in turn: x, kept = apply(gather(a layer's shards), x, (shared, kept), kind, inputs).

    Args:
        order: how the layers of each stack are computed, and in which order; what `apply` keeps for the backward pass
            is up to its `jax.checkpoint`.
        layers: the shards of the trained parameters of each stack, on a leading axis, and what else belongs to it.
        x: the input of the first layer: hidden states [M, D], and what layers add to besides.
        shared: what all layers take besides.
        inputs: the same for the layers of each stack, without gradient.
        head: the shard of the output embedding; pass the one that is returned to the output head, so that its
            gradient is reduced beside the last layer's backward pass. None if it is frozen.

    Returns:
        The output of the last layer, and `head`.
    """
    return _forward(order, layers, x, shared, inputs, head)[0]


def _forward(order, layers, x, shared, inputs, head):
    run = _Run(order.stacks, layers, inputs)
    kept, saved = {}, []
    for cycle in order.cycles:

        def repeat(x, p, cycle=cycle, kept=kept):
            saved, stored = [], {}
            for member in cycle.members:
                apply, arguments = run.layer(member, p)
                out, vjp = jax.vjp(apply, *arguments(x, (shared, kept.get(member.reads))))
                vjp.args_res = None  # the backward pass has the arguments: `x` is saved, and parameters gathered again
                saved.append((x, vjp))
                x, stored[member.stack] = out
            return x, (saved, {m.stack: stored[m.stack] for m in cycle.members if m.stores})

        x, (of_cycle, stored) = lax.scan(repeat, x, jnp.arange(cycle.repeats))
        kept = kept | _at(stored, 0)
        saved.append(of_cycle)
    return (x, head), (layers, shared, kept, inputs, saved)


def _backward(order, residuals, gradients):
    layers, shared, kept, inputs, saved = residuals
    run, (dx, d_head) = _Run(order.stacks, layers, inputs), gradients
    zeros = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)
    state = _Gradients(dx, jax.tree.map(jnp.zeros_like, layers[0]), zeros(shared), zeros(kept))
    pending = None  # a layer, the repeat that it is in, and gradients to be reduced
    for number, (cycle, of_cycle) in reversed(list(enumerate(zip(order.cycles, saved, strict=True)))):
        last, first = cycle.repeats - 1, cycle.members[0]

        def repeat(p, state, pending, cycle=cycle, of_cycle=of_cycle):
            for member, own in reversed(list(zip(cycle.members, of_cycle, strict=True))):
                state = state if pending is None else run.reduced(*pending, state)
                x, vjp = _at(own, p)
                if cycle.repeats == 1:  # there is no loop: do not merge this with the forward pass
                    x, dx = lax.optimization_barrier((x, state.dx))
                    state = state._replace(dx=dx)
                _, arguments = run.layer(member, p)
                vjp.args_res = list(arguments(x, (shared, kept.get(member.reads))))
                full, dx, d_shared, *_ = vjp((state.dx, state.of_kept(member, kept)))
                full = adapters.split(full)[0] if run.layers[1][member.stack].frozen else full
                now, late = _split(full)
                state = run.reduced(member, p, now, state.add(dx, *d_shared, member))
                pending = member, p, late
            return state, pending

        state, pending = repeat(last, state, pending)
        if number == len(order.cycles) - 1:
            dx, d_head = lax.optimization_barrier((state.dx, d_head))  # the loop waits for the head's gradient
            state = state._replace(dx=dx)

        def before(n, carry, repeat=repeat, first=first, last=last):
            state, late = carry
            state, (_, _, late) = repeat(last - n, state, (first, last - n + 1, late))
            return state, late

        if last:
            state, late = lax.fori_loop(1, last + 1, before, (state, pending[2]))
            pending = first, 0, late
    state = run.reduced(*pending, state)
    return (state.d_stacks, None), state.dx, _as(state.d_shared, shared), None, d_head


class _Run(NamedTuple):
    functions: tuple[Stack, ...]
    layers: tuple[Stacks, dict[str, Others]]
    inputs: dict[str, Any]

    def layer(self, member: Member, repeat: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The function of a layer, and its arguments from x and what it takes besides."""
        trained, others = self.layers
        stack, i, name = self._stack(member), member.offset(repeat), member.stack
        own = _at(others[name], i)
        params = stack.gather(adapters.join(_at(trained[name], i), own.frozen))

        def apply(*arguments):
            x, kept = stack.apply(*arguments)
            return x, kept if member.stores else None

        return apply, lambda x, shared: (params, x, shared, own.kinds, self.inputs[name])

    def reduced(self, member: Member, repeat: Any, full: PyTree[Array], state: "_Gradients") -> "_Gradients":
        """`state` with the gradients `full` of a layer, reduced over devices."""
        i, name = member.offset(repeat), member.stack
        shards, frozen = _at(self.layers[0][name], i), _at(self.layers[1][name].frozen, i)
        gather = lambda shards: self._stack(member).gather(adapters.join(shards, frozen))
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(gather, shards))
        (d_shards,) = jax.vjp(gather, shards)[1](adapters.join(zeros, full))
        put = lambda stacked, one: lax.dynamic_update_index_in_dim(stacked, one, i, 0)
        d_stack = state.d_stacks[name]
        d_stack = {key: jax.tree.map(put, d, d_shards[key]) if key in full else d for key, d in d_stack.items()}
        return state._replace(d_stacks={**state.d_stacks, name: d_stack})

    def _stack(self, member: Member) -> Stack:
        return next(stack for stack in self.functions if stack.name == member.stack)


class _Gradients(NamedTuple):
    dx: PyTree[Array]
    d_stacks: Stacks
    d_shared: PyTree[Array]  # a sum over layers, float32
    d_kept: dict[str, PyTree[Array]]  # of what each stack keeps for layers that read it, float32 too

    def of_kept(self, member: Member, kept: dict[str, PyTree[Array]]) -> PyTree[Array]:
        """The gradient of what a layer keeps, in its dtype."""
        return _as(self.d_kept[member.stack], kept[member.stack]) if member.stores else None

    def add(self, dx: PyTree[Array], d_shared: PyTree[Array], d_read: PyTree[Array], member: Member) -> "_Gradients":
        plus = lambda tree, other: jax.tree.map(jnp.add, tree, other)
        read = {} if member.reads is None else {member.reads: plus(self.d_kept[member.reads], d_read)}
        return self._replace(dx=dx, d_shared=plus(self.d_shared, d_shared), d_kept={**self.d_kept, **read})


def _as(tree: PyTree[Array], like: PyTree[Array]) -> PyTree[Array]:
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def _at(stacked: PyTree[Array], i: Any) -> PyTree[Array]:
    return jax.tree.map(lambda array: lax.dynamic_index_in_dim(array, i, keepdims=False), stacked)


def _split(full: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A layer's gradients that are reduced at once, and those that wait for the next layer."""
    late = {name: full[name] for name in ATTENTION if name in full}
    return {name: d for name, d in full.items() if name not in late}, late


scan_layers.defvjp(_forward, _backward)
