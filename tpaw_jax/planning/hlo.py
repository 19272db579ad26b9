"""Count the bytes that a compiled program (HLO text) moves: through a device's memory, and between devices.

XLA's own analysis counts the body of a loop once; here it counts once per iteration. The parser reads shapes,
computations and collectives as the TPU compilers of libtpu 0.0.42, 0.0.50 and 0.0.52 print them.
"""

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

BETWEEN_SLICES = "between slices"
"""The kind of an exchange between slices over the data center's network: a sum, sent and received by the host."""

_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}
_NO_TRAFFIC = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "iota", "async-update", "recv", "call-start", "call-update"),
}
_VIEWS = ("bitcast", "reshape", "get-tuple-element", "opt-barrier")
_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
"""Opcodes that update their first operand in place, and the index of the operand that holds the new values."""
_END = re.compile(r'\s*\}(, execution_thread="[^"]*")?\s*')
"""The line that ends a computation; a kernel's attributes may end a line with }} and more text."""


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def called(self) -> str:
        """The computation that a fusion or an asynchronous operation runs; empty for other instructions."""
        match = re.search(r"calls=%?([\w.\-]+)", self.attributes)
        return match.group(1) if match else ""


class Computation(NamedTuple):
    """Instructions by name, in program order, and the one that is the result."""

    instructions: dict[str, Instruction]
    root: Instruction

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters in the order in which they are passed."""
        parameters = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return [i.name for i in sorted(parameters, key=lambda i: int(i.operands[0]))]


class Collective(NamedTuple):
    """A collective operation and how often it runs."""

    kind: str  # one of KINDS, or BETWEEN_SLICES
    size: int  # bytes on one device: of the gathered result, or of the data that is reduced or exchanged
    group: tuple[int, ...]  # the devices of its first group; empty: all devices
    times: int
    asynchronous: bool  # overlaps with computation

    @property
    def bytes(self) -> int:
        """Bytes of all runs together."""
        return self.size * self.times

    def sent(self, devices: int) -> float:
        """Bytes that each device of a group of n `devices` sends in all runs.

        V (n - 1) / n for data of V bytes, twice that for sums, and V for a permutation.
        """
        if self.kind == "collective-permute":
            return self.bytes
        return self.bytes * (2 if self.kind in ("all-reduce", BETWEEN_SLICES) else 1) * (devices - 1) / devices


class Program(NamedTuple):
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str
    unknown_trips: Sequence[int]  # trip counts of loops whose condition has no constant, from the outermost inwards
    named_trips: Mapping[str, int]  # trip counts of other such loops, by their `jax.named_scope`

    def collectives(self) -> list[Collective]:
        """All collectives. The parts of one that is split over a chain of fusions count once."""
        collectives: dict[tuple[str, str], Collective] = {}
        overlapped = self._overlapped()
        for name, times in self._runs():
            for inside, part in self._with_fused(name):
                kind = _kind(part)
                if kind is None:
                    continue
                # `async_collective_name` is no sign of overlap: XLA puts it on what it made synchronous again
                # (convert_async_collectives_to_sync.cc), because there was nothing to compute meanwhile.
                chain = re.search(r'chain_id="([^"]+)"', part.attributes)
                overlaps = bool(chain or part.opcode.endswith("-start") or overlapped & {name, part.name})
                inner = _inner_collective(part, self.computations)
                body = self.computations[inside].instructions
                input_size = sum(_size(body[o].shape, any_memory=True) for o in part.operands if o in body)
                output_size = _size(part.shape, any_memory=True)
                if part.opcode.endswith("-start") or part.opcode == "send":  # the result includes the operands
                    output_size -= input_size
                padded_size = _size(inner.shape, any_memory=True) if inner is not part else 0
                size = max(input_size, output_size, padded_size)
                new = Collective(kind, size, _group(inner.attributes), times, overlaps)
                if len(new.group) == 1:
                    continue
                key = (kind, chain.group(1) if chain else f"{name}/{part.name}")
                old = collectives.get(key, new)  # another part, perhaps in a loop that the collective runs beside
                collectives[key] = new._replace(times=min(old.times, new.times), size=max(old.size, new.size))
        return list(collectives.values())

    def traffic(self) -> int:
        """Bytes that one run reads and writes in a device's main memory; on-chip memory is not counted."""
        both_ways = ("all-reduce", "all-to-all", "collective-permute", BETWEEN_SLICES)
        total = sum(c.bytes * (2 if c.kind in both_ways else 1) for c in self.collectives())
        for name, times in self._runs():
            body = self.computations[name].instructions
            total += times * sum(self._moved(instruction, body) for instruction in body.values())
        return total

    def _runs(self) -> Iterator[tuple[str, int]]:
        """The computations outside of fusions, and how often each runs."""

        def runs_of(name: str, times: int, unknown: Sequence[int]) -> Iterator[tuple[str, int]]:
            yield name, times
            for i in self.computations[name].instructions.values():
                if i.opcode == "while":
                    condition, body = _called_by_name(i.attributes)
                    if trips := self._trips(condition, i.attributes):
                        yield from runs_of(body, times * trips, unknown)
                    else:
                        yield from runs_of(body, times * (unknown[0] if unknown else 1), unknown[1:])
                elif i.opcode in ("call", "call-start", "conditional"):
                    for called in _called_by_name(i.attributes):
                        yield from runs_of(called, times, unknown)

        yield from runs_of(self.entry, 1, self.unknown_trips)

    def _overlapped(self) -> set[str]:
        """What this core computes beside: computations of another core (SparseCore), and sends to other slices.

        A call starts where it gets its operands, at `call-update` if there is one; an exchange between slices lasts
        until `recv-done`. What counts as computation is a loop, a kernel, a matmul, or beside a call, which is faster,
        what moves as many bytes as it returns.
        """
        overlapped = set()
        for computation in self.computations.values():
            body = computation.instructions
            running: dict[str, tuple[str, float]] = {}  # what runs, and the bytes of a call
            for i in body.values():
                if i.opcode == "call-start":
                    called = _called_by_name(i.attributes)[0]
                    running[i.name] = called, _size(self.computations[called].root.shape, any_memory=True)
                elif i.opcode == "call-update":
                    running[i.name] = running.pop(i.operands[0])
                    overlapped.discard(running[i.name][0])
                elif _kind(i) == BETWEEN_SLICES:
                    running[_rendezvous(i)] = i.name, math.inf
                elif i.opcode == "call-done":
                    running.pop(i.operands[0], None)
                elif i.opcode == "recv-done":
                    running.pop(_rendezvous(body[i.operands[0]]), None)
                else:
                    overlapped |= {name for name, size in running.values() if self._covers(i, body, size)}
        return overlapped

    def _covers(self, i: Instruction, body: dict[str, Instruction], size: float) -> bool:
        parts = [part for _, part in self._with_fused(i.called)] if i.called in self.computations else [i]
        computes = lambda part: part.opcode in ("while", "convolution", "dot") or "tpu_custom_call" in part.attributes
        return any(map(computes, parts)) or self._moved(i, body) >= size

    def _trips(self, condition: str, attributes: str) -> int:
        """Trip count of a loop: the largest integer constant in its condition, else that of its name, else 0."""
        named = next((trips for name, trips in self.named_trips.items() if f"/{name}/while" in attributes), 0)
        is_integer = lambda i: i.opcode == "constant" and re.match(r"[su]\d+\[\]", i.shape)
        return max((int(i.operands[0]) for _, i in self._with_fused(condition) if is_integer(i)), default=named)

    def _with_fused(self, name: str) -> Iterator[tuple[str, Instruction]]:
        """The instructions of a computation and of the fusions in it, except inside a fused reduce-scatter."""
        for i in self.computations[name].instructions.values():
            yield name, i
            if i.called in self.computations and not _is_reduce_scatter(i):
                yield from self._with_fused(i.called)

    def _moved(self, i: Instruction, body: dict[str, Instruction]) -> int:
        """Bytes that an instruction reads and writes in main memory."""
        if i.opcode in _NO_TRAFFIC or i.opcode.endswith("-done") or _kind(i):
            return 0
        shape = lambda name: body[name].shape if name in body else ""
        if i.opcode in ("copy-start", "slice-start"):
            parts = _parts(i.shape)[:2]  # (destination, source)
            in_main_memory = [part for part in parts if "S(" not in part]
            return len(in_main_memory) * min(_size(part, any_memory=True) for part in parts)
        if i.opcode in _SLICES:
            return 2 * _size(i.shape)
        if i.opcode in _UPDATES:
            return 2 * _size(shape(i.operands[_UPDATES[i.opcode]]))
        if i.called not in self.computations:
            return _size(i.shape) + sum(_size(shape(o)) for o in i.operands)
        fused = self.computations[i.called]
        read = sum(
            min(_size(shape(o)), self._read(fused, p)) for o, p in zip(i.operands, fused.parameters, strict=False)
        )
        return read + self._written(fused, i.shape)

    def _read(self, fused: Computation, name: str) -> int:
        """Bytes of a parameter that a fusion reads: only the slice if it slices, none if it updates in place."""
        total = 0
        for user in fused.instructions.values():
            if name not in user.operands:
                continue
            if user.opcode == "tuple":  # returned unchanged
                continue
            if user.opcode in _VIEWS or self._retiles(user):
                total += self._read(fused, user.name)
            elif user.opcode in _SLICES:
                total += _size(user.shape, any_memory=True)
            elif user.opcode in _UPDATES and user.operands[0] == name:
                continue
            elif user.called in self.computations:
                inner = self.computations[user.called]
                passed = [p for o, p in zip(user.operands, inner.parameters, strict=False) if o == name]
                total += sum(self._read(inner, p) for p in passed)
                if _source(inner, inner.root).name in passed:  # the inner fusion only returns a view of it
                    total += self._read(fused, user.name)
            elif _is_exchange(user):  # counted with its collective
                continue
            else:
                total += _size(fused.instructions[name].shape, any_memory=True)
        return total

    def _retiles(self, i: Instruction) -> bool:
        """Whether a fusion inside of another only changes the tiles of a buffer, in place, as tpu7x does."""
        copies = i.called in self.computations and self.computations[i.called].root.opcode == "copy"
        return copies and "output_to_operand_aliasing={{}: (0, {})}" in i.attributes

    def _written(self, fused: Computation, shape: str) -> int:
        """Bytes that a fusion writes: only the new values if it updates in place."""
        root = fused.root
        results = [fused.instructions[o] for o in root.operands] if root.opcode == "tuple" else [root]
        total = 0
        for result, part in zip(results, _parts(shape), strict=False):
            source = _source(fused, result)
            if "S(" in part or _is_exchange(source) or source.opcode == "parameter":
                continue
            if source.opcode in _UPDATES:
                update = source.operands[_UPDATES[source.opcode]]
                total += _size(fused.instructions[update].shape, any_memory=True)
            else:
                total += _size(part)
        return total


def parse(text: str, unknown_trips: Sequence[int] = (), named_trips: Mapping[str, int] | None = None) -> Program:
    """Parse the text of `compiled.as_text()`.

    Args:
        text: the HLO text.
        unknown_trips: trip counts of the loops whose trip count depends on data, from the outermost inwards; 1 beyond.
        named_trips: trip counts of other such loops, by the name of the `jax.named_scope` that they are in.

    Raises:
        ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, name = "", ""
    lines: dict[str, Instruction] = {}
    root: Instruction | None = None
    for line in text.splitlines():
        if line and not line[0].isspace() and line.rstrip().endswith("{") and "->" in line:
            head = re.match(r"(ENTRY )?%?([\w.\-]+)", line)
            assert head is not None
            name, lines, root = head.group(2), {}, None
            entry = name if head.group(1) else entry
        elif name and line[:1].isspace() and " = " in line:
            instruction = _instruction(line)
            lines[instruction.name] = instruction
            root = instruction if line.lstrip().startswith("ROOT ") else root
        elif name and _END.fullmatch(line):
            computations[name] = Computation(lines, root or list(lines.values())[-1])
            name = ""
    if not entry:
        raise ValueError("The text is not a compiled program: it has no ENTRY computation.")
    return Program(computations, entry, unknown_trips, named_trips or {})


def _instruction(line: str) -> Instruction:
    name, rest = line.strip().removeprefix("ROOT ").split(" = ", 1)
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside = re.sub(r"/\*.*?\*/", "", rest[opening + 1 : closing])
    operands = tuple(re.findall(r"%([\w.\-]+)", inside)) or tuple(filter(None, [inside.strip()]))
    opcode = rest[:opening].replace("custom-call-", "call-")  # a call of the SparseCore, in libtpu 0.0.52
    return Instruction(name.lstrip("%"), shape, opcode, operands, rest[closing + 1 :])


def _source(computation: Computation, result: Instruction) -> Instruction:
    """The instruction that `result` is a view of, or `result` itself."""
    while result.opcode in _VIEWS and result.operands[0] in computation.instructions:
        result = computation.instructions[result.operands[0]]
    return result


def _called_by_name(attributes: str) -> list[str]:
    """The computation of a call, the branches of a conditional, or the condition and the body of a loop."""
    if branches := re.search(r"branch_computations=\{([^}]*)\}", attributes):
        return re.findall(r"%?([\w.\-]+)", branches.group(1))
    names = "to_apply|called_computations|true_computation|false_computation|condition|body"
    return re.findall(rf"(?:{names})=\{{?%?([\w.\-]+)", attributes)


def _closing(text: str, opening: int) -> int:
    """Index of the parenthesis that closes the one at `opening`."""
    depth = 0
    for i in range(opening, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"Unbalanced parenthesis in the HLO text: {text[:80]}")


@functools.lru_cache(maxsize=65536)
def _parts(shape: str) -> tuple[str, ...]:
    """The arrays of a shape, each with its layout."""
    return tuple(re.findall(r"\w+\[[^\]]*\](?:\{[^}]*\})?", shape))


@functools.lru_cache(maxsize=65536)
def _size(shape: str, any_memory: bool = False) -> int:
    """Bytes of the arrays of a shape that are in the device's main memory, or with `any_memory` of all of them."""
    total = 0
    for part in _parts(shape):
        if "S(" in part and not any_memory:  # S(n) is another memory space
            continue
        dtype, sizes = re.match(r"(\w+)\[([^\]]*)\]", part).groups()  # type: ignore[union-attr]
        digits = re.search(r"\d+", dtype)
        bits = _BITS.get(dtype) or (int(digits.group()) if digits else 0)
        total += math.prod(int(re.sub(r"\D", "", n)) for n in sizes.split(",") if n) * bits // 8
    return total


def _is_reduce_scatter(i: Instruction) -> bool:
    """Whether a fusion is the TPU's reduce-scatter, which is printed as an all-reduce and a slice."""
    return i.opcode == "fusion" and i.called.startswith("all-reduce-scatter")


def _kind(i: Instruction) -> str | None:
    if _is_reduce_scatter(i):
        return "reduce-scatter"
    if i.opcode == "send" and "xla_megascale_runtime" in i.attributes:
        return BETWEEN_SLICES
    return next((kind for kind in KINDS if i.opcode in (kind, f"{kind}-start")), None)


def _rendezvous(i: Instruction) -> str:
    """What a send to another slice and its recv have in common."""
    found = re.findall(r'_rendezvous="([^"]*)"', i.attributes)
    return found[0] if found else i.name


def _inner_collective(i: Instruction, computations: dict[str, Computation]) -> Instruction:
    parts = computations[i.called].instructions.values() if _is_reduce_scatter(i) else ()
    return next((part for part in parts if part.opcode == "all-reduce"), i)


def _is_exchange(i: Instruction) -> bool:
    return i.opcode.removesuffix("-start").removesuffix("-done") in KINDS or i.opcode == "custom-call"


def _group(attributes: str) -> tuple[int, ...]:
    """The devices of the first group of a collective."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return tuple(map(int, match.group(1).split(",")))
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        groups, sizes, order = (list(map(int, part.split(","))) if part else None for part in match.groups())
        devices = np.arange(math.prod(sizes or [])).reshape(sizes or [])
        return tuple(devices.transpose(order).reshape(groups)[0].tolist())
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}", attributes):
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match.group(1))}
        split = re.findall(r"'([^']+)'", match.group(2))
        devices = np.arange(math.prod(axes.values())).reshape(list(axes.values()))
        order = [list(axes).index(name) for name in split]
        rest = [i for i in range(len(axes)) if i not in order]
        return tuple(devices.transpose(rest + order).reshape(-1, math.prod(axes[n] for n in split))[0].tolist())
    if match := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
        return tuple(map(int, match.groups()))
    return ()
