"""Compile a stage for a TPU, and predict its time from the published peaks of the chip (a roofline).

A program takes as long as the longest of its arithmetic, its memory traffic and its overlapped collectives, plus its
exposed collectives, which computation waits for. FLOPs are counted by hand; memory traffic and collectives come from
the compiled program (`hlo`). All times are predictions: no matmul reaches a chip's full peak.
"""

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from tpaw_jax.planning import hlo
from tpaw_jax.planning.hlo import Collective
from tpaw_jax.runtime import tpu

GIB = 2**30

DIE_TO_DIE = 6
"""Speed between the two devices of a tpu7x chip, in links of the torus (docs.cloud.google.com/tpu/docs/tpu7x)."""


PUBLISHED_MFU = {"v5p": 0.654, "v6e": 0.4546}
"""MFU that MaxText publishes for its best tuned dense models in bfloat16: Llama 2 70B at 4,096 tokens on 512 v5p, and
Llama 3.1 8B at 8,192 tokens on 256 v6e (maxtext.readthedocs.io, version 0.2.2, reference/models/tiering)."""


ATTENTION = {"v4": (0.49, 0.82), "v5e": (0.47, 0.76), "v5p": (0.49, 0.82), "v6e": (0.19, 0.34), "tpu7x": (0.11, 0.19)}
"""Speed of the attention kernels, forward and backward, as a share of a plain matmul's. From the schedules of the
compiler for heads of 128 in groups of 4, and 4 chunks per matmul (benchmarks/tree_attention.py); v4 is assumed to be
like v5p."""


class Flops(NamedTuple):
    """FLOPs of one run of a program on one device."""

    executed: float  # everything that is computed, with padding, masked pairs and recomputation
    useful: float  # of real tokens only, without recomputation: the model FLOPs that MFU counts
    stalled: float = 0.0  # that the matrix units could execute while attention computes its softmax


class Exchange(NamedTuple):
    """All overlapped, or all exposed, collectives of one kind."""

    kind: str
    asynchronous: bool  # overlapped with computation
    sent: float  # bytes that one device sends
    seconds: float
    devices: int  # of the largest group


class Stage(NamedTuple):
    """A compiled program on one device. Bytes and seconds are of one run."""

    compile_seconds: float
    fits: bool
    peak: float  # bytes of memory, arguments included; if the compiler refuses the program, what it would need
    resident: float  # bytes of memory that are in use at the same time but are not arguments of the program
    flops: Flops
    traffic: float  # bytes read and written in memory; 0 if the compiler refuses the program
    exchanges: tuple[Exchange, ...]
    chip: tpu.Chip
    calibration: float = 1.0  # measured over predicted seconds of such a stage on such chips, if known

    @property
    def compute_seconds(self) -> float:
        """Seconds of arithmetic: matmuls at the chip's peak, attention at the speed of its kernels."""
        return (self.flops.executed + self.flops.stalled) / self.chip.peak_flops

    @property
    def memory_seconds(self) -> float:
        """Seconds of memory traffic at the chip's peak bandwidth."""
        return self.traffic / self.chip.hbm_bandwidth

    @property
    def overlapped_seconds(self) -> float:
        """Seconds of collectives that overlap with computation."""
        return sum(e.seconds for e in self.exchanges if e.asynchronous)

    @property
    def exposed_seconds(self) -> float:
        """Seconds of collectives that computation waits for."""
        return sum(e.seconds for e in self.exchanges if not e.asynchronous)

    @property
    def seconds(self) -> float:
        """Predicted seconds of one run."""
        bound = max(self.compute_seconds, self.memory_seconds, self.overlapped_seconds) + self.exposed_seconds
        return self.calibration * bound

    @property
    def bottleneck(self) -> str:
        """What takes most of the time: compute, memory or interconnect."""
        times = {
            "compute": self.compute_seconds,
            "memory": self.memory_seconds,
            "interconnect": self.overlapped_seconds,
        }
        longest = max(times, key=lambda name: times[name])
        return "interconnect" if self.exposed_seconds > times[longest] else longest

    @property
    def mfu(self) -> float:
        """Useful FLOPs per second, as a share of the chip's peak."""
        return self.flops.useful / (self.seconds * self.chip.peak_flops)


def compile_stage(
    lowered: jax.stages.Lowered,
    mesh: Mesh,
    chip: tpu.Chip,
    flops: Flops,
    unknown_trips: Sequence[int] = (),
    resident: float = 0,
    *,
    named_trips: Mapping[str, int] | None = None,
) -> Stage:
    """Compile a stage and measure the compiled program. One that the compiler refuses has no traffic or exchanges.

    Args:
        lowered: the stage's program.
        mesh: its devices.
        chip: their published peaks.
        flops: of one run on one device.
        unknown_trips: trip counts of the loops whose trip count depends on data (see `hlo.parse`).
        resident: bytes of memory in use that are not arguments of the program.
        named_trips: see `hlo.parse`.
    """
    start = time.perf_counter()
    try:
        compiled: Any = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        required = _required_bytes(str(error))
        if required is None:
            raise
        seconds = time.perf_counter() - start
        return Stage(seconds, False, required, resident, flops, 0, (), chip)
    seconds = time.perf_counter() - start
    program = hlo.parse(compiled.as_text(), unknown_trips, named_trips)
    peak = compiled.memory_analysis().peak_memory_in_bytes
    return Stage(
        compile_seconds=seconds,
        fits=peak + resident <= chip.hbm_bytes,
        peak=peak,
        resident=resident,
        flops=flops,
        traffic=program.traffic(),
        exchanges=exchanges(program.collectives(), mesh, chip),
        chip=chip,
    )


def exchanges(collectives: list[Collective], mesh: Mesh, chip: tpu.Chip) -> tuple[Exchange, ...]:
    """Sum collectives by kind and by whether they overlap with computation; the largest come first."""
    totals: dict[tuple[str, bool], Exchange] = {}
    for c in collectives:
        key, devices = (c.kind, c.asynchronous), _group_size(c, mesh)
        old = totals.get(key, Exchange(*key, 0.0, 0.0, 0))
        seconds = old.seconds + c.times * collective_seconds(c, mesh, chip)
        totals[key] = Exchange(*key, old.sent + c.sent(devices), seconds, max(old.devices, devices))
    return tuple(sorted(totals.values(), key=lambda e: -e.sent))


def collective_seconds(c: Collective, mesh: Mesh, chip: tpu.Chip) -> float:
    """Predicted seconds of one run of a collective, from the bandwidth of its group's links.

    Rings run in both directions along each dimension of the torus that the group spans. With W the bandwidth of a
    device's links, n devices gather or scatter V bytes in V (n - 1) / n / W seconds, sum them in twice that, and
    exchange them all-to-all in V n / 4 / W, where each holds V (jax-ml.github.io/scaling-book). W counts two links per
    dimension, or one if the dimension does not wrap around. Sums between slices go over each chip's share of the
    network; the little else that slices exchange is counted as a sum.
    """
    sent, count = c.sent(_group_size(c, mesh)) / c.times, _group_size(c, mesh)
    if c.kind == hlo.BETWEEN_SLICES:
        return sent / chip.dcn_bandwidth
    if c.kind == "collective-permute":
        return sent / chip.ici_bandwidth
    width = chip.ici_bandwidth * links([mesh.devices.flat[i] for i in c.group] or list(mesh.devices.flat), mesh)
    return (c.size * count / 4 if c.kind == "all-to-all" else sent) / width


def _group_size(c: Collective, mesh: Mesh) -> int:
    """Devices in the collective's group; for an exchange between slices, the number of slices."""
    if c.kind == hlo.BETWEEN_SLICES:
        return len({d.slice_index for d in mesh.devices.flat})
    return len(c.group) or mesh.size


def links(devices: list[Any], mesh: Mesh) -> int:
    """Links per device that a group uses: two along each spanned dimension of the torus that wraps around, else one."""
    shape = tuple(max(along) + 1 for along in zip(*(d.coords for d in mesh.devices.flat), strict=True))
    spanned = [len(set(along)) for along in zip(*(d.coords for d in devices), strict=True)]
    ring = [n == size and wraps for n, size, wraps in zip(spanned, shape, tpu.wraps(shape), strict=True)]
    return sum(2 if r else 1 for n, r in zip(spanned, ring, strict=True) if n > 1) or DIE_TO_DIE


def record(stage: Stage) -> dict[str, Any]:
    """A stage as JSON-able values. Keys of values that the compiled program does not determine contain 'predicted'."""
    figures: dict[str, Any] = {
        "fits": stage.fits,
        "peak GiB": stage.peak / GIB,
        "beside it GiB": stage.resident / GIB,
        "of GiB": stage.chip.hbm_bytes / GIB,
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
        "predicted compute s": stage.compute_seconds,
        "predicted memory s": stage.memory_seconds,
        "predicted exchange beside s": stage.overlapped_seconds,
        "predicted exchange alone s": stage.exposed_seconds,
        **({"calibration": stage.calibration} if stage.calibration != 1 else {}),
        "predicted s": stage.seconds,
        "predicted MFU": stage.mfu,
        "binds": stage.bottleneck,
    }


def _required_bytes(message: str) -> float | None:
    """Bytes of memory that a refused program would need; None if the compiler refused it for another reason."""
    used = r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm"
    ran_out = r"Ran out of memory on HBM.*?\(([\d.]+)([KMGT]?)\)"
    match = re.search(used, message) or re.search(ran_out, message)
    if "RESOURCE_EXHAUSTED" not in message or match is None:
        return None
    return float(match.group(1)) * {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "": 1}[match.group(2)]
