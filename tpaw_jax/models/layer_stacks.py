"""Where the parameters of each layer are, and how layers repeat.

Layers whose parameters have the same shapes are stacked on a leading axis. Most models have one stack, "layers". The
layers of several stacks take turns, for example five of one and one of another. So a model is a sequence of cycles,
each a few layers that repeat, and a scan runs a cycle.
"""

import functools
from collections import Counter
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, PyTree

from tpaw_jax.models.model_config import LAYERS, ModelConfig


class Place(NamedTuple):
    """Where a layer's parameters are."""

    stack: str
    offset: int  # in the stack


class Member(NamedTuple):
    """A layer of a cycle."""

    stack: str
    first: int  # its index in the stack the first time
    stride: int  # how much further it is each time
    place: int  # among the cycle's layers of the stack
    stores: bool = False  # later layers read its keys and values
    reads: str | None = None  # the stack of the layer whose keys and values it takes

    def offset(self, repeat: Any) -> Any:
        """Its index in the stack in a repeat of the cycle, a number or a tracer."""
        return self.first + repeat * self.stride

    def of_turn(self, turn: dict[str, PyTree[Array]]) -> PyTree[Array]:
        """What belongs to the layer, out of an item of `Cycle.turns`."""
        return jax.tree.map(lambda x: x[self.place], turn[self.stack])


class Cycle(NamedTuple):
    """Layers that repeat."""

    members: tuple[Member, ...]
    repeats: int

    def turns(self, stacked: dict[str, PyTree[Array]]) -> dict[str, PyTree[Array]]:
        """What belongs to the layers of each stack, [repeats, the cycle's layers of the stack, ...].

        Nothing is copied if the cycle has all layers of a stack.
        """

        def of(member: Member) -> PyTree[Array]:
            start, end = member.first, member.first + self.repeats * member.stride

            def part(x: Array) -> Array:
                own = x if (start, end) == (0, len(x)) else x[start:end]
                return own.reshape(self.repeats, member.stride, *x.shape[1:])

            return jax.tree.map(part, stacked[member.stack])

        return {member.stack: of(member) for member in self.members if member.place == 0}


@functools.cache
def stacks_of(config: ModelConfig) -> dict[str, ModelConfig]:
    """The architecture of each stack of layers."""
    names = dict.fromkeys(config.stack_of(i) for i in range(config.num_layers))
    return {name: config.of_stack(name) for name in names}


@functools.cache
def places_of(config: ModelConfig) -> tuple[Place, ...]:
    """The place of each layer."""
    counts: dict[str, int] = {}
    places = []
    for i in range(config.num_layers):
        stack = config.stack_of(i)
        places.append(Place(stack, counts.get(stack, 0)))
        counts[stack] = places[-1].offset + 1
    return tuple(places)


@functools.cache
def source_of_layers(config: ModelConfig) -> tuple[int, ...]:
    """The layer that computes the keys and values of each layer: itself, or the last one before of its kind."""
    stacks = [place.stack for place in places_of(config)]
    last = {stack: i for i, stack in enumerate(stacks)}
    own = lambda stack: stack.removeprefix("kv_shared_")
    return tuple(i if stack == own(stack) else last[own(stack)] for i, stack in enumerate(stacks))


@functools.cache
def cycles_of(config: ModelConfig) -> tuple[Cycle, ...]:
    """The layers as a sequence of cycles. Those whose keys and values others read are in a cycle that does not repeat.

    Each cycle is the one that covers the most layers from where the one before it ends; of several, the shortest.
    """
    places, sources = places_of(config), source_of_layers(config)
    stored = {source for i, source in enumerate(sources) if source != i}
    keys = [place.stack + f" {i}" * (i in stored) for i, place in enumerate(places)]
    cycles, start = [], 0
    while start < len(keys):
        repeats = {n: _repeats(keys, start, n) for n in range(1, (len(keys) - start) // 2 + 1)}
        repeats = {n: times for n, times in repeats.items() if times > 1}
        length = max(repeats, key=lambda n: (n * repeats[n], -n), default=1)
        own = range(start, start + length)
        stacks = Counter(places[i].stack for i in own)
        begins = {stack: min(places[i].offset for i in own if places[i].stack == stack) for stack in stacks}
        members = [
            Member(
                stack,
                offset,
                stride=stacks[stack],
                place=offset - begins[stack],
                stores=i in stored,
                reads=None if sources[i] == i else places[sources[i]].stack,
            )
            for i, (stack, offset) in zip(own, places[start : start + length], strict=True)
        ]
        cycles.append(Cycle(tuple(members), repeats.get(length, 1)))
        start += length * cycles[-1].repeats
    return tuple(cycles)


def _repeats(keys: list[str], start: int, length: int) -> int:
    """How often the layers from `start` on repeat in turns of `length`."""
    turn, repeats = keys[start : start + length], 0
    while keys[start + repeats * length : start + (repeats + 1) * length] == turn:
        repeats += 1
    return repeats


def has_one_stack(config: ModelConfig) -> bool:
    """Whether all layers have parameters of the same shapes."""
    return stacks_of(config).keys() == {LAYERS}


def layers_with_experts(config: ModelConfig) -> int:
    """The number of layers that have experts."""
    return sum(own.num_layers for own in stacks_of(config).values() if own.num_experts)
