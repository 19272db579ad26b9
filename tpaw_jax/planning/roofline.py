"""What a compiled stage needs of a TPU, and the time that the published peaks of its chips allow for it.

The roofline: a program takes as long as the longest of its arithmetic, its memory traffic and what devices exchange
beside them; what they exchange while nothing else runs comes on top. FLOPs are counted by hand, memory traffic and
exchanges from the compiled program (`hlo`). The times are predictions: no kernel reaches all of a chip's peak.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from tpaw_jax.planning import hlo
from tpaw_jax.planning.hlo import Collective
from tpaw_jax.runtime import tpu

GIB = 2**30


class Flops(NamedTuple):
    """FLOPs of one run of a program on one device."""

    executed: float  # whatever is computed: padding, masked pairs, what is computed again
    useful: float  # of tokens alone, nothing twice: the model FLOPs that MFU counts


class Exchange(NamedTuple):
    """All collectives of a kind, of those that run beside computation or of those that do not."""

    kind: str
    asynchronous: bool
    sent: float  # bytes that a device sends
    seconds: float
    devices: int  # of the largest group that exchanges


class Stage(NamedTuple):
    """A compiled program on one device. Bytes and seconds are of one run."""

    compile_seconds: float
    fits: bool
    peak: float  # bytes of memory, the arguments among them; of a program that is refused, what it would need
    resident: float  # bytes of what is no argument of it and in memory meanwhile
    flops: Flops
    traffic: float  # bytes read and written in memory
    exchanges: tuple[Exchange, ...]
    chip: tpu.Chip

    @property
    def compute(self) -> float:
        """Seconds of arithmetic at the chip's peak."""
        return self.flops.executed / self.chip.flops

    @property
    def memory(self) -> float:
        """Seconds of memory traffic."""
        return self.traffic / self.chip.hbm

    @property
    def beside(self) -> float:
        """Seconds of exchanges that run beside computation."""
        return sum(e.seconds for e in self.exchanges if e.asynchronous)

    @property
    def alone(self) -> float:
        """Seconds of exchanges that computation waits for."""
        return sum(e.seconds for e in self.exchanges if not e.asynchronous)

    @property
    def seconds(self) -> float:
        """By the roofline."""
        return max(self.compute, self.memory, self.beside) + self.alone

    @property
    def binds(self) -> str:
        """What most of the time goes to: compute, memory or interconnect."""
        times = {"compute": self.compute, "memory": self.memory, "interconnect": self.beside}
        longest = max(times, key=lambda name: times[name])
        return "interconnect" if self.alone > times[longest] else longest

    @property
    def mfu(self) -> float:
        """Useful FLOPs a second, as a share of the chip's peak."""
        return self.flops.useful / (self.seconds * self.chip.flops)


def compile_stage(
    lowered: jax.stages.Lowered,
    mesh: Mesh,
    chip: tpu.Chip,
    flops: Flops,
    unknown_trips: Sequence[int] = (),
    resident: float = 0,
) -> Stage:
    """Compile a stage and read its figures. A program that does not fit the memory has no traffic and no exchanges.

    `unknown_trips` are how often loops run whose number of turns is data (see `hlo.parse`), `resident` is what else is
    in memory, bytes.
    """
    start = time.perf_counter()
    try:
        compiled: Any = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _needed(str(error))
        if needed is None:
            raise
        seconds = time.perf_counter() - start
        return Stage(seconds, False, needed, resident, flops, 0, (), chip)
    seconds = time.perf_counter() - start
    program = hlo.parse(compiled.as_text(), unknown_trips)
    peak = compiled.memory_analysis().peak_memory_in_bytes
    return Stage(
        compile_seconds=seconds,
        fits=peak + resident <= chip.memory,
        peak=peak,
        resident=resident,
        flops=flops,
        traffic=program.traffic(),
        exchanges=exchanges(program.collectives(), mesh, chip),
        chip=chip,
    )


def exchanges(collectives: list[Collective], mesh: Mesh, chip: tpu.Chip) -> tuple[Exchange, ...]:
    """Collectives by kind and by whether they run beside computation, the largest first."""
    found: dict[tuple[str, bool], Exchange] = {}
    for c in collectives:
        key, none = (c.kind, c.asynchronous), Exchange(c.kind, c.asynchronous, 0.0, 0.0, 0)
        old, devices = found.get(key, none), _group_size(c, mesh)
        seconds = old.seconds + c.times * collective_seconds(c, mesh, chip)
        found[key] = Exchange(*key, old.sent + c.sent(devices), seconds, max(old.devices, devices))
    return tuple(sorted(found.values(), key=lambda e: -e.sent))


def collective_seconds(c: Collective, mesh: Mesh, chip: tpu.Chip) -> float:
    """Seconds of one run of a collective at the speed of the links that its group has.

    Rings in both directions along each dimension of the torus that the group spans: n devices gather or scatter V
    bytes in V (n - 1) / n / W, sum them in twice that, exchange V n / 4 / W where each holds V
    (jax-ml.github.io/scaling-book). W is two links a dimension, one where it does not wrap around. What slices sum goes
    over each chip's share of the network; the little else that they exchange is counted as if it were summed.
    """
    sent, count = c.sent(_group_size(c, mesh)) / c.times, _group_size(c, mesh)
    if c.kind == hlo.BETWEEN_SLICES:
        return sent / chip.network
    if c.kind == "collective-permute":
        return sent / chip.link
    width = chip.link * _links([mesh.devices.flat[i] for i in c.group] or list(mesh.devices.flat), mesh)
    return (c.size * count / 4 if c.kind == "all-to-all" else sent) / width


def _group_size(c: Collective, mesh: Mesh) -> int:
    """How many devices exchange it with each other; of what slices exchange, how many slices."""
    if c.kind == hlo.BETWEEN_SLICES:
        return len({d.slice_index for d in mesh.devices.flat})
    return len(c.group) or mesh.size


def _links(devices: list[Any], mesh: Mesh) -> int:
    """Links by which each device of a group takes part: two along a dimension of the torus that wraps, else one."""
    shape = tuple(max(places) + 1 for places in zip(*(d.coords for d in mesh.devices.flat), strict=True))
    spanned = [len(set(places)) for places in zip(*(d.coords for d in devices), strict=True)]
    ring = [n == size and wraps for n, size, wraps in zip(spanned, shape, tpu.wraps(shape), strict=True)]
    return sum(2 if r else 1 for n, r in zip(spanned, ring, strict=True) if n > 1)


def record(stage: Stage) -> dict[str, Any]:
    """The figures of a stage, JSON-able; what is no fact of the compiled program is called predicted."""
    figures: dict[str, Any] = {
        "fits": stage.fits,
        "peak GiB": stage.peak / GIB,
        "beside it GiB": stage.resident / GIB,
        "of GiB": stage.chip.memory / GIB,
        "compile s": stage.compile_seconds,
        "TFLOP executed": stage.flops.executed / 1e12,
        "TFLOP useful": stage.flops.useful / 1e12,
    }
    if not stage.traffic:  # refused by the compiler
        return figures
    return figures | {
        "memory traffic GiB": stage.traffic / GIB,
        "exchanges": [
            {
                "kind": e.kind,
                "asynchronous": e.asynchronous,
                "GiB sent": e.sent / GIB,
                "devices": e.devices,
                "predicted s": e.seconds,
            }
            for e in stage.exchanges
        ],
        "predicted compute s": stage.compute,
        "predicted memory s": stage.memory,
        "predicted exchange beside s": stage.beside,
        "predicted exchange alone s": stage.alone,
        "predicted s": stage.seconds,
        "predicted MFU": stage.mfu,
        "binds": stage.binds,
    }


def _needed(message: str) -> float | None:
    """Bytes of memory that a refused program would need; None where it was refused for another reason."""
    used = r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm"
    wanted = r"Ran out of memory on HBM.*?\(([\d.]+)([KMGT]?)\)"
    match = re.search(used, message) or re.search(wanted, message)
    if "RESOURCE_EXHAUSTED" not in message or match is None:
        return None
    return float(match.group(1)) * {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "": 1}[match.group(2)]
