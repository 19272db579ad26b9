"""A run planned before a chip is rented: what every stage needs of a TPU topology, and how long the whole run takes.

Memory, collectives and their overlap are the word of the TPU's own compiler. FLOPs are counted by hand and times by the
roofline (see `roofline`): they are predictions, and called so; nothing here was measured on a TPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tpaw_jax.config import RunConfig
from tpaw_jax.data import packing
from tpaw_jax.generation.slots import STEPS_PER_CHUNK
from tpaw_jax.models.hub import param_shapes
from tpaw_jax.models.transformer import KEEPS_LOGITS, REMAT_POLICIES
from tpaw_jax.observe import monitoring
from tpaw_jax.planning import lowering, roofline, workload
from tpaw_jax.planning.hlo import BETWEEN_SLICES, KINDS
from tpaw_jax.planning.lowering import Target
from tpaw_jax.planning.roofline import GIB, Flops, Stage
from tpaw_jax.planning.workload import Workload
from tpaw_jax.runtime import sharding
from tpaw_jax.training import cost
from tpaw_jax.training.batch_shapes import most_micro_batches
from tpaw_jax.training.cost import Work
from tpaw_jax.training.memory import SHARE_TO_USE

PROMPTS = 50_000
"""Of a round: the paper's subset of UltraChat."""

STAGES = ("step", "scoring", "prefill", "decode")

LONGEST_ROW = 16384
"""Of a search: what the tree's rule has bits for."""

SEARCHED = ("most rows a device", "longest row")

SLOTS_BUSY = 0.95
"""Share of the sampler's slots that hold an unfinished sequence: as measured on CPU (benchmarks/sampling.py, 512
requests, 64 slots); where devices share a model it is less, since a chunk of steps is then never cut short."""


def plan(
    target: Target,
    prompts: int = PROMPTS,
    stages: Sequence[str] = STAGES,
    search: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Compile `stages` for the topology and report them, JSON-able, with the hours of the run where all are there.

    With `search`, also the most rows a device and the longest row whose step fits, found by compiling. `prompts` are
    what a round plays on.

    Raises:
        ValueError: it is to search without the step among the stages.
    """
    config, chip = target.config, target.topology.chip
    if search and "step" not in stages:
        raise ValueError("--search compiles train steps; name step among --stages.")
    load = workload.assumed(config, target.model.config, prompts)
    found: dict[str, Stage] = {}
    remat: str = config.policy.remat
    for name in stages:
        say(f"{target.topology.name}: compiling {name}")
        if name == "step":
            remat, found[name] = _step(target, load)
        else:
            found[name] = _other_stage(target, load, name)
    report: dict[str, Any] = {
        "model": config.policy.path,
        "topology": target.topology.name,
        "chips": target.topology.chips,
        "mesh": dict(target.mesh.shape),
        "parameters": sum(math.prod(p.shape) for p in jax.tree.leaves(target.params)),
        "remat": remat,
        "row length": config.packing.row_length,
        "rows a batch": config.packing.rows_per_batch,
        "fill": load.fill,
        "attention blocks / causal": load.blocks,
        "published peaks": {k: v for k, v in chip._asdict().items() if k != "host"},
        "stages": {name: _record(target, load, name, s, remat) for name, s in found.items()},
    }
    if set(STAGES) <= set(found) and all(s.fits for s in found.values()):
        report["predicted run"] = hours(target, load, found)
    if search:
        report |= largest(target, remat, say)
    report["warnings"] = _warnings(target, load, found)
    return report


def step_flops(target: Target, load: Workload, remat: str, micro_batches: int) -> Flops:
    """Of one device in a train step.

    A layer's products are computed three times and, where `remat` keeps only its input, a fourth time; attention's two
    products forward are five backward; the head computes its logits again unless it keeps them.
    """
    again = 1.0 if remat == "layer" else 0.0
    head = 4.0 - (remat in KEEPS_LOGITS)
    c, rows = load.computed, target.config.packing.rows_per_batch * micro_batches
    passes = Work(c.tokens * (3 + again), c.predictions * head, c.pairs * (3.5 + again))
    return _of_device(target, passes * rows, load.row * (3 * rows), target.mesh.size)


def by_hand(target: Target, stage: str, remat: str = "layer", micro_batches: int = 1) -> dict[str, float]:
    """Bytes that the design has a device send in a run of a stage, by kind of collective: of n devices that gather or
    scatter V, V (n - 1) / n; of those that sum V, twice that.

    Every layer's matrices are gathered forward, and backward unless they are kept, in the compute dtype, the head's
    table once; gradients are scattered back in `train.reduce_dtype` and summed over `data`; embeddings are exchanged,
    tokens by the columns of the table that a device holds; over `tensor`, what attention and feed-forward add up to is
    summed forward, their gradients backward, and what attention adds up to once more where a layer is computed again.
    """
    config, sampled = target.config, stage in ("prefill", "decode")
    mesh, model = (target.sampling_mesh, target.sampling_model) if sampled else (target.mesh, target.model)
    c, fsdp, data, tensor = target.model.config, mesh.shape["fsdp"], mesh.shape["data"], mesh.shape["tensor"]
    compute, reduce = jnp.dtype(config.policy.compute_dtype).itemsize, jnp.dtype(config.train.reduce_dtype).itemsize
    found = dict.fromkeys((*KINDS, BETWEEN_SLICES), 0.0)
    if sampled:
        slots = lowering.slots_a_shard(target)
        row = lowering.prefill_row(config)
        tokens, logits, size, times = (
            (slots, slots, 4, STEPS_PER_CHUNK) if stage == "decode" else (row, row // 16, compute, 1)
        )
        if tensor > 1:
            found["all-reduce"] = 2 * _others(tensor) * times * (2 * c.num_layers + 1) * tokens * c.hidden_size * size
            found["all-gather"] = _others(tensor) * times * logits * c.vocab_size * 4
        if mesh.is_multi_process and stage == "decode":  # what the host sees: a flag, a count, tokens and log-probs
            seen, shards = 5 + 8 * config.sampling.max_new_tokens, sharding.row_shards(mesh)
            found["all-gather"] += _others(shards) * slots * shards * seen
        return found
    batches = micro_batches if stage == "step" else config.packing.scoring_batches
    tokens = config.packing.row_length * config.packing.rows_per_batch // (data * fsdp) * batches
    again = stage == "step" and remat != "none"
    gathers = 1 + again
    specs, shapes = model.parallel.specs, param_shapes(c)
    head = "embed/embedding" if c.tie_embeddings else "head/embedding"
    for name, shape in shapes.items():
        axes = {a for part in specs.get(name, ()) if part for a in (part if isinstance(part, tuple) else (part,))}
        held = math.prod(shape) / (tensor if "tensor" in axes else 1)  # by the devices of an fsdp group together
        layer = name.startswith("layers/")
        if "fsdp" in axes and (layer or name == head):
            times = (gathers if layer else 1) * (batches if stage == "step" else 1)
            found["all-gather"] += _others(fsdp) * held * compute * times
            found["reduce-scatter"] += _others(fsdp) * held * reduce * batches if stage == "step" else 0
        if stage == "step":
            own, others = (held / fsdp, data) if "fsdp" in axes else (held, data * fsdp)
            _add_sum_over_data(found, own * reduce, others, target.topology.slices)
    if fsdp > 1:
        found["all-to-all"] = _others(fsdp) * (2 if stage == "step" else 1) * tokens * c.hidden_size * compute
        found["all-gather"] += _others(fsdp) * 4 * tokens * fsdp
    if tensor > 1:
        sums = (4 + again) * c.num_layers + 2 if stage == "step" else 2 * c.num_layers + 1
        found["all-reduce"] += 2 * _others(tensor) * sums * tokens * c.hidden_size * compute
    return found


def _others(devices: int) -> float:
    """The share of what a group holds that is on other devices than one's own."""
    return (devices - 1) / devices


def _add_sum_over_data(found: dict[str, float], size: float, data: int, slices: int) -> None:
    """What a sum over `data` exchanges; where that spans slices, each chip of a slice sums its part with the others."""
    inside = data // slices
    if slices == 1:
        found["all-reduce"] += 2 * _others(data) * size
    else:
        found[BETWEEN_SLICES] += 2 * _others(slices) * size / inside
        found["reduce-scatter"] += _others(inside) * size
        found["all-gather"] += _others(inside) * size


def text(report: dict[str, Any]) -> str:
    """A report as tables: what is fact first, then what is predicted."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
    lines = [
        f"{report['topology']}: {report['chips']} chips as {mesh}; {report['parameters'] / 1e9:.3g} G parameters, rows "
        f"of {report['row length']}, {report['rows a batch']} a batch, remat {report['remat']}"
    ]
    stages = []
    for name, record in report["stages"].items():
        flat = {"stage": name, **{k: v for k, v in record.items() if k not in ("exchanges", "GiB sent by hand")}}
        for e in record.get("exchanges", []):
            if e["GiB sent"] > 0.001:
                flat[f"{e['kind']} GiB sent, {'beside' if e['asynchronous'] else 'alone'}"] = e["GiB sent"]
        flat |= {f"{kind} GiB sent, by hand": size for kind, size in record.get("GiB sent by hand", {}).items()}
        stages.append(flat)
    lines.append(monitoring.table(stages))
    of_run = {k: report[k] for k in ("fill", "attention blocks / causal", *SEARCHED) if k in report}
    of_run |= report.get("predicted run", {})
    lines.append(monitoring.table([of_run]))
    lines += [f"Warning: {warning}" for warning in report["warnings"]]
    return "\n".join(lines)


def comparison(reports: Sequence[dict[str, Any]]) -> str:
    """Several topologies, a column each."""
    columns = []
    for report in reports:
        column = {"topology": report["topology"], "chips": report["chips"]}
        for name, record in report["stages"].items():
            column |= {f"{name}: {key}": record.get(key) for key in ("peak GiB", "predicted MFU", "binds")}
        columns.append(column | report.get("predicted run", {}))
    return monitoring.table(columns)


def hours(target: Target, load: Workload, stages: dict[str, Stage]) -> dict[str, Any]:
    """The configured run by the roofline: seconds of each part, hours, chip-hours, and triplets a second.

    A sampled token is a step of all slots of a process; a team step is as many rows as the step takes. Padded pairs
    with live references are given the step's own FLOPs a second.
    """
    config, chips = target.config, target.topology.chips
    shards = sharding.row_shards(target.sampling_mesh) * (chips // target.sampling_mesh.size)  # of all processes
    decode_steps = load.new_tokens / (shards * lowering.slots_a_shard(target) * SLOTS_BUSY)
    prefills = load.prompt_tokens / (shards * lowering.prefill_row(config))
    sampling = decode_steps * stages["decode"].seconds / STEPS_PER_CHUNK + prefills * stages["prefill"].seconds
    rows, step = config.packing.rows_per_batch, stages["step"]
    per_step = _micro_batches(config, load)
    rate = step.flops.useful / step.seconds * chips
    seconds = {"sampling": 0.0, "scoring": 0.0, "training": 0.0}
    for r in load.rounds:
        seconds["sampling"] += sampling
        batches = r.scored_rows / (rows * config.packing.scoring_batches)
        seconds["scoring"] += math.ceil(batches) * stages["scoring"].seconds
        seconds["training"] += config.train.epochs * math.ceil(r.rows / (rows * per_step)) * step.seconds
    total = sum(seconds.values())
    pairs = seconds["sampling"] + sum(r.pairs for r in load.rounds) / rate
    triplets = rows * per_step * load.triplets_a_row
    return {
        **{f"{name} h": s / 3600 for name, s in seconds.items()},
        "hours": total / 3600,
        "chip-hours": total * chips / 3600,
        "triplets a step": triplets,
        "triplets/s of training": triplets / step.seconds,
        "new tokens/s of sampling": load.new_tokens / sampling,
        "padded pairs, hours": pairs / 3600,
        "padded pairs, FLOPs": sum(r.pairs for r in load.rounds) / sum(r.trees for r in load.rounds),
    }


def largest(target: Target, remat: str, say: Callable[[str], None]) -> dict[str, Any]:
    """The most rows a device, and the longest row up to `LONGEST_ROW`, whose step fits.

    The number is guessed from the compiled steps of one and two rows and made sure by compiling it and the next.
    """
    chip, c = target.topology.chip, target.config.packing
    shards = sharding.row_shards(target.mesh)
    known: dict[tuple[int, int], Stage] = {}

    def step(rows: int, length: int) -> Stage:
        if (rows, length) not in known:
            say(f"{target.topology.name}: compiling a step of {rows} rows of {length} a device")
            wanted = lowering.with_rows(target, rows * shards, length)
            lowered = lowering.team_step(wanted, remat, most_micro_batches(wanted.config))
            known[rows, length] = roofline.compile_stage(lowered, target.mesh, chip, Flops(0, 0))
        return known[rows, length]

    one, two = step(1, c.row_length), step(2, c.row_length)
    most = int(one.fits) + int(one.fits and two.fits)
    if most == 2:
        most = max(2, 1 + int((chip.memory - one.peak) / max(two.peak - one.peak, GIB / 64)))
        while most > 2 and not step(most, c.row_length).fits:
            most -= 1
        while step(most + 1, c.row_length).fits:
            most += 1
    longest = c.row_length if most else 0
    while most and longest < LONGEST_ROW and step(1, 2 * longest).fits:
        longest *= 2
    return dict(zip(SEARCHED, (most, longest), strict=True))


def _step(target: Target, load: Workload) -> tuple[str, Stage]:
    """The train step with the configured rematerialisation, or for `auto` with the first whose program fits."""
    config, most, used = target.config, most_micro_batches(target.config), _micro_batches(target.config, load)
    policies = list(REMAT_POLICIES) if config.policy.remat == "auto" else [config.policy.remat]
    for remat in policies:
        lowered = lowering.team_step(target, remat, most)
        flops = step_flops(target, load, remat, used)
        chunks = math.ceil(load.computed.predictions / config.policy.head_chunk)
        trips = [chunks] if most == 1 else [used, chunks]
        found = roofline.compile_stage(lowered, target.mesh, target.topology.chip, flops, trips)
        if config.policy.remat != "auto" or found.peak <= SHARE_TO_USE * found.chip.memory:  # as the run chooses
            break
    return remat, found


def decode_bytes(target: Target, typical_tokens: int) -> float:
    """Bytes a device must read for `STEPS_PER_CHUNK` steps: every weight and every page of the cache, once a step."""
    model = target.model.config
    weights = _bytes_held(lowering.sampling_params(target))
    if not model.tie_embeddings:  # of whose table a few rows are read
        weights -= _bytes_held(lowering.sampling_params(target)["embed"])
    return STEPS_PER_CHUNK * (weights + _cache_bytes(target, typical_tokens))


def _cache_bytes(target: Target, typical_tokens: int) -> float:
    """Bytes of a device's pages."""
    cache = jax.tree.leaves(lowering.slots_of(target, typical_tokens)[0].cache)
    return sum(x.size * x.dtype.itemsize for x in cache) / target.sampling_mesh.size


def _other_stage(target: Target, load: Workload, name: str) -> Stage:
    config, chip, typical = target.config, target.topology.chip, load.tokens_of_sequence
    policy = _bytes_held(target.params)
    if name == "scoring":
        chunks = math.ceil(load.computed.predictions / config.policy.head_chunk)
        rows = config.packing.rows_per_batch * config.packing.scoring_batches
        flops = _of_device(target, load.computed * rows, load.row * rows, target.mesh.size)
        # The player that scores is an argument; the policy is not, nor the player that one process reads meanwhile.
        resident = policy * (1 if target.mesh.is_multi_process else 2)
        return roofline.compile_stage(lowering.scoring_pass(target), target.mesh, chip, flops, [chunks], resident)
    mesh = target.sampling_mesh
    sampled = _bytes_held(lowering.sampling_params(target))
    if name == "prefill":
        row = lowering.prefill_row(config)
        count = load.prompts * row / load.prompt_tokens  # prompts in a row
        seen = row * (row / count + 1) / 2
        shards = sharding.row_shards(mesh)
        executed, useful = Work(row, row // 16, seen) * shards, Work(row, count, seen) * shards
        flops = _of_device(target, executed, useful, mesh.size)
        resident = policy + sampled + _cache_bytes(target, typical)
        return roofline.compile_stage(lowering.prefill(target), mesh, chip, flops, [], resident)
    slots = lowering.slots_a_shard(target) * sharding.row_shards(mesh)
    work = Work(slots, slots, slots * typical) * STEPS_PER_CHUNK
    flops = _of_device(target, work, work * SLOTS_BUSY, mesh.size)
    lowered = lowering.decode(target, typical)
    return roofline.compile_stage(lowered, mesh, chip, flops, [STEPS_PER_CHUNK], policy + sampled)


def _record(target: Target, load: Workload, name: str, stage: Stage, remat: str) -> dict[str, Any]:
    record = roofline.record(stage)
    if stage.traffic:
        expected = by_hand(target, name, remat, _micro_batches(target.config, load))
        record["GiB sent by hand"] = {kind: size / GIB for kind, size in expected.items() if size}
        if name == "decode":
            record["memory traffic GiB, by hand"] = decode_bytes(target, load.tokens_of_sequence) / GIB
    return record


def _warnings(target: Target, load: Workload, stages: dict[str, Stage]) -> list[str]:
    config, found = target.config, []
    for name, s in stages.items():
        if not s.fits:
            needed, there = (s.peak + s.resident) / GIB, s.chip.memory / GIB
            found.append(f"{name} does not fit: it needs {needed:.2f} of the {there:.2f} GiB of a device.")
    if config.policy.remat in ("auto", "offload"):
        found.append("What remat `offload` moves to the host's memory and back is not in the predicted times.")
    triplets = config.packing.rows_per_batch * _micro_batches(config, load) * load.triplets_a_row
    if triplets > 2 * config.train.batch_triplets:
        found.append(
            f"A step has {triplets:.0f} triplets, since every device computes a row of {load.triplets_a_row:.0f}; "
            f"train.batch_triplets asks for {config.train.batch_triplets}. Shorter rows come closer."
        )
    return found


def _micro_batches(config: RunConfig, load: Workload) -> int:
    c = config.packing
    wanted = packing.micro_batches_of(load.triplets_a_row, config.train.batch_triplets, c.rows_per_batch)
    return min(most_micro_batches(config), wanted)


def _of_device(target: Target, executed: Work, useful: Work, devices: int) -> Flops:
    of = lambda work: cost.flops(target.model.config, work) / devices
    return Flops(of(executed), of(useful))


def _bytes_held(params: Any) -> float:
    """Bytes that a device holds of parameters."""
    size = lambda p: math.prod(p.sharding.shard_shape(p.shape)) * p.dtype.itemsize
    return float(sum(size(p) for p in jax.tree.leaves(params)))
