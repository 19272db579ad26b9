"""A compiled program's text (HLO) -> the bytes that it moves: through a device's memory, and between devices.

XLA's own analysis counts the body of a loop once; here loops count as often as they run. Shapes, computations and
collectives are read as the TPU compiler of libtpu 0.0.42 writes them.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

BETWEEN_SLICES = "between slices"
"""The kind of what slices exchange over the data center's network: a sum, sent and received by the host."""

_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}
_NOTHING_MOVES = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "iota", "async-update", "recv"),
}
_VIEWS = ("bitcast", "reshape", "get-tuple-element", "opt-barrier")
_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
"""What writes into its first operand where it lies, and which operand it writes."""


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def called(self) -> str:
        """The computation that a fusion or an asynchronous operation runs; empty where there is none."""
        match = re.search(r"calls=%?([\w.\-]+)", self.attributes)
        return match.group(1) if match else ""


class Computation(NamedTuple):
    """Instructions by name, in their order, and which of them is the result."""

    instructions: dict[str, Instruction]
    root: Instruction

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters in the order in which they are passed."""
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return [i.name for i in sorted(found, key=lambda i: int(i.operands[0]))]


class Collective(NamedTuple):
    """What devices exchange, as often as it runs."""

    kind: str  # one of KINDS, or BETWEEN_SLICES
    size: int  # bytes of what is gathered, or of what is reduced or exchanged, on one device
    group: tuple[int, ...]  # the devices that exchange it, of the first group of them; empty: all there are
    times: int
    asynchronous: bool  # runs beside computation

    @property
    def bytes(self) -> int:
        """Bytes of all its runs."""
        return self.size * self.times

    def sent(self, devices: int) -> float:
        """Bytes that a device of a group of `devices` sends in all runs: V (n - 1) / n of V, twice that of a sum."""
        if self.kind == "collective-permute":
            return self.bytes
        return self.bytes * (2 if self.kind in ("all-reduce", BETWEEN_SLICES) else 1) * (devices - 1) / devices


class Program(NamedTuple):
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str
    unknown_trips: Sequence[int]  # of loops whose condition compares with no constant, from the outermost on

    def collectives(self) -> list[Collective]:
        """Everything that devices exchange. A chain of parts that belong together counts once."""
        found: dict[tuple[str, str], Collective] = {}
        for name, times in self._runs():
            for inside, part in self._with_fused(name):
                kind = _kind(part)
                if kind is None:
                    continue
                chain = re.search(r'(chain_id|async_collective_name)="([^"]+)"', part.attributes)
                beside = chain is not None or part.opcode.endswith("-start") or kind == BETWEEN_SLICES
                inner = _inner_collective(part, self.computations)
                body = self.computations[inside].instructions
                goes_in = sum(_size(body[o].shape, everywhere=True) for o in part.operands if o in body)
                comes_out = _size(part.shape, everywhere=True)
                if part.opcode.endswith("-start") or part.opcode == "send":  # whose result holds what went in too
                    comes_out -= goes_in
                padded = _size(inner.shape, everywhere=True) if inner is not part else 0
                size = max(goes_in, comes_out, padded)
                new = Collective(kind, size, _group(inner.attributes), times, beside)
                if len(new.group) == 1:
                    continue
                key = (kind, chain.group(2) if chain else f"{name}/{part.name}")
                old = found.get(key)
                if old is None or (new.times, new.size) > (old.times, old.size):
                    found[key] = new
        return list(found.values())

    def traffic(self) -> int:
        """Bytes that one run reads and writes in a device's memory; what stays on the chip beside it is not counted."""
        both_ways = ("all-reduce", "all-to-all", "collective-permute", BETWEEN_SLICES)
        total = sum(c.bytes * (2 if c.kind in both_ways else 1) for c in self.collectives())
        for name, times in self._runs():
            body = self.computations[name].instructions
            total += times * sum(self._moved(instruction, body) for instruction in body.values())
        return total

    def _runs(self) -> Iterator[tuple[str, int]]:
        """The computations that run by themselves (not inside a fusion), and how often."""

        def of(name: str, times: int, unknown: Sequence[int]) -> Iterator[tuple[str, int]]:
            yield name, times
            for i in self.computations[name].instructions.values():
                if i.opcode == "while":
                    condition, body = _called_by_name(i.attributes)
                    if trips := self._trips(condition):
                        yield from of(body, times * trips, unknown)
                    else:
                        yield from of(body, times * (unknown[0] if unknown else 1), unknown[1:])
                elif i.opcode in ("call", "conditional"):
                    for called in _called_by_name(i.attributes):
                        yield from of(called, times, unknown)

        yield from of(self.entry, 1, self.unknown_trips)

    def _trips(self, condition: str) -> int:
        """How often a loop runs: the largest integer that its condition knows; 0 where it knows none."""
        found: list[int] = []
        for _, i in self._with_fused(condition):
            if i.opcode == "constant" and re.match(r"[su]\d+\[\]", i.shape):
                found.append(int(i.operands[0]))
        return max(found, default=0)

    def _with_fused(self, name: str) -> Iterator[tuple[str, Instruction]]:
        """The instructions of a computation and of the fusions in it, but not what makes up a collective."""
        for i in self.computations[name].instructions.values():
            yield name, i
            if i.called in self.computations and not _is_reduce_scatter(i):
                yield from self._with_fused(i.called)

    def _moved(self, i: Instruction, body: dict[str, Instruction]) -> int:
        """Bytes that an instruction reads and writes in memory."""
        if i.opcode in _NOTHING_MOVES or i.opcode.endswith("-done") or _kind(i):
            return 0
        shape = lambda name: body[name].shape if name in body else ""
        if i.opcode in ("copy-start", "slice-start"):
            parts = _parts(i.shape)  # (where to, where from, ...)
            slow = [part for part in parts[:2] if "S(" not in part]
            return len(slow) * min(_size(part, everywhere=True) for part in parts[:2])
        if i.opcode in _SLICES:
            return 2 * _size(i.shape)
        if i.opcode in _UPDATES:
            return 2 * _size(shape(i.operands[_UPDATES[i.opcode]]))
        if i.called not in self.computations:
            return _size(i.shape) + sum(_size(shape(o)) for o in i.operands)
        fused = self.computations[i.called]
        read = sum(
            min(_size(shape(o)), self._taken(fused, p)) for o, p in zip(i.operands, fused.parameters, strict=False)
        )
        return read + self._written(fused, i.shape)

    def _taken(self, fused: Computation, name: str) -> int:
        """Bytes of a parameter that a fusion reads: of a slice the slice, of what it writes into nothing."""
        total = 0
        for user in fused.instructions.values():
            if name not in user.operands:
                continue
            if user.opcode == "tuple":  # handed through
                continue
            if user.opcode in _VIEWS:
                total += self._taken(fused, user.name)
            elif user.opcode in _SLICES:
                total += _size(user.shape, everywhere=True)
            elif user.opcode in _UPDATES and user.operands[0] == name:
                continue
            elif user.called in self.computations:
                inner = self.computations[user.called]
                passed = [p for o, p in zip(user.operands, inner.parameters, strict=False) if o == name]
                total += sum(self._taken(inner, p) for p in passed)
                if _source(inner, inner.root).name in passed:  # a fusion that is but a view of it
                    total += self._taken(fused, user.name)
            elif _is_exchange(user):  # counted with its collective
                continue
            else:
                total += _size(fused.instructions[name].shape, everywhere=True)
        return total

    def _written(self, fused: Computation, shape: str) -> int:
        """Bytes that a fusion writes: of an update in place, the update."""
        root = fused.root
        results = [fused.instructions[o] for o in root.operands] if root.opcode == "tuple" else [root]
        total = 0
        for result, part in zip(results, _parts(shape), strict=False):
            source = _source(fused, result)
            if "S(" in part or _is_exchange(source) or source.opcode == "parameter":
                continue
            if source.opcode in _UPDATES:
                update = source.operands[_UPDATES[source.opcode]]
                total += _size(fused.instructions[update].shape, everywhere=True)
            else:
                total += _size(part)
        return total


def parse(text: str, unknown_trips: Sequence[int] = ()) -> Program:
    """The program of `compiled.as_text()`.

    `unknown_trips` are how often loops run whose number of turns is data, from the outermost on; once by default.

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
        elif name and line.strip() == "}":  # attributes of a kernel may end with }} and more
            computations[name] = Computation(lines, root or list(lines.values())[-1])
            name = ""
    if not entry:
        raise ValueError("The text is no compiled program: it has no ENTRY computation.")
    return Program(computations, entry, unknown_trips)


def _instruction(line: str) -> Instruction:
    name, rest = line.strip().removeprefix("ROOT ").split(" = ", 1)
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside = re.sub(r"/\*.*?\*/", "", rest[opening + 1 : closing])
    operands = tuple(re.findall(r"%([\w.\-]+)", inside)) or tuple(filter(None, [inside.strip()]))
    return Instruction(name.lstrip("%"), shape, rest[:opening], operands, rest[closing + 1 :])


def _source(computation: Computation, result: Instruction) -> Instruction:
    """What an instruction is, or is a view of."""
    while result.opcode in _VIEWS and result.operands[0] in computation.instructions:
        result = computation.instructions[result.operands[0]]
    return result


def _called_by_name(attributes: str) -> list[str]:
    """The computations of a call, the branches of a condition, or the condition and the body of a loop."""
    if branches := re.search(r"branch_computations=\{([^}]*)\}", attributes):
        return re.findall(r"%?([\w.\-]+)", branches.group(1))
    return re.findall(r"(?:to_apply|true_computation|false_computation|condition|body)=%?([\w.\-]+)", attributes)


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis that opens at `opening` is closed."""
    depth = 0
    for i in range(opening, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"A parenthesis is not closed: {text[:80]}")


@functools.lru_cache(maxsize=65536)
def _parts(shape: str) -> tuple[str, ...]:
    """The arrays of a shape, each with its layout."""
    return tuple(re.findall(r"\w+\[[^\]]*\](?:\{[^}]*\})?", shape))


@functools.lru_cache(maxsize=65536)
def _size(shape: str, everywhere: bool = False) -> int:
    """Bytes of the arrays of a shape that lie in the device's main memory, or in any memory."""
    total = 0
    for part in _parts(shape):
        if "S(" in part and not everywhere:
            continue
        kind, sizes = re.match(r"(\w+)\[([^\]]*)\]", part).groups()  # type: ignore[union-attr]
        digits = re.search(r"\d+", kind)
        bits = _BITS.get(kind) or (int(digits.group()) if digits else 0)
        total += math.prod(int(re.sub(r"\D", "", n)) for n in sizes.split(",") if n) * bits // 8
    return total


def _is_reduce_scatter(i: Instruction) -> bool:
    """Whether a fusion is the TPU's reduce-scatter, which is written as a sum and a slice."""
    return i.opcode == "fusion" and i.called.startswith("all-reduce-scatter")


def _kind(i: Instruction) -> str | None:
    if _is_reduce_scatter(i):
        return "reduce-scatter"
    if i.opcode == "send" and "xla_megascale_runtime" in i.attributes:
        return BETWEEN_SLICES
    return next((kind for kind in KINDS if i.opcode in (kind, f"{kind}-start")), None)


def _inner_collective(i: Instruction, computations: dict[str, Computation]) -> Instruction:
    if not _is_reduce_scatter(i):
        return i
    return next(part for part in computations[i.called].instructions.values() if part.opcode == "all-reduce")


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
