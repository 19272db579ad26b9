"""Plan a run before a chip is rented: what every stage needs of a TPU topology, and how long the whole run takes.

Memory, collectives and their overlap come from the TPU's own compiler. FLOPs are counted by hand (`expected`) and times
follow from the roofline (`roofline`): they are predictions and labelled so; nothing here was measured on a TPU.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from tpaw_jax.config import RunConfig
from tpaw_jax.data import packing
from tpaw_jax.generation.slots import STEPS_PER_CHUNK
from tpaw_jax.models import adapters
from tpaw_jax.models.model_config import ModelConfig
from tpaw_jax.models.parallel import exchange
from tpaw_jax.models.transformer import REMAT_POLICIES
from tpaw_jax.observe import tables
from tpaw_jax.planning import expected, lowering, roofline, workload
from tpaw_jax.planning.expected import SLOTS_BUSY
from tpaw_jax.planning.lowering import Target
from tpaw_jax.planning.roofline import GIB, Flops, Stage
from tpaw_jax.planning.workload import Workload
from tpaw_jax.runtime import sharding, tpu
from tpaw_jax.training.batch_shapes import most_micro_batches
from tpaw_jax.training.memory import SHARE_TO_USE

PROMPTS = 50_000
"""Prompts per round: the paper's subset of UltraChat."""

STAGES = ("step", "scoring", "prefill", "decode")

LONGEST_ROW = 16384
"""Longest row that a search tries: a row's keys fit into VMEM, with heads of up to 256."""

SEARCHED = ("most rows a device", "longest row")
"""Keys of the results of a search."""

LABELS = {
    "beside it GiB": "also resident GiB",
    "of GiB": "available GiB",
    "memory traffic GiB, by hand": "memory traffic GiB, expected",
    "predicted exchange beside s": "predicted overlapped collectives s",
    "predicted exchange alone s": "predicted exposed collectives s",
    "binds": "bottleneck",
    "most rows a device": "most rows per device",
    "triplets a step": "triplets per step",
    "padded pairs, hours": "hours as padded pairs",
    "padded pairs, FLOPs": "FLOPs, padded pairs / trees",
}
"""Printed labels of the JSON keys that do not explain themselves; all other keys are printed as they are."""


def plan(
    target: Target,
    prompts: int = PROMPTS,
    stages: Sequence[str] = STAGES,
    search: bool = False,
    say: Callable[[str], None] = lambda text: None,
    calibration: Mapping[str, float] | None = None,
    *,
    lengths: workload.Lengths | None = None,
) -> dict[str, Any]:
    """Compile `stages` for the topology and report them, JSON-able; with all four stages, also the hours of the run.

    Args:
        target: the configuration on its topology.
        prompts: prompts per round.
        stages: some of `STAGES`.
        search: also find the most rows per device and the longest row whose train step fits, by compiling them.
        say: receives progress messages.
        calibration: measured over predicted seconds, by stage; scales the predicted times.
        lengths: of the run's data; None: assumed ones.

    Raises:
        ValueError: `search` is on, but `stages` does not contain the step.
    """
    if search and "step" not in stages:
        raise ValueError("--search compiles train steps; name step among --stages.")
    load = workload.assumed(target.config, target.model.config, prompts, lengths)
    compiled: dict[str, Stage] = {}
    remat: str = target.config.policy.remat
    for name in stages:
        say(f"{target.topology.name}: compiling {name}")
        if name == "step":
            remat, compiled[name] = _step(target, load)
        else:
            compiled[name] = _other_stage(target, load, name)
        compiled[name] = compiled[name]._replace(calibration=(calibration or {}).get(name, 1.0))
    report = _description(target, load, remat)
    report["stages"] = {name: _record(target, load, name, stage, remat) for name, stage in compiled.items()}
    if set(STAGES) <= set(compiled) and all(stage.fits for stage in compiled.values()):
        report["predicted run"] = hours(target, load, compiled)
    if search:
        report |= largest(target, remat, say)
    report["warnings"] = _warnings(target, load, compiled)
    return report


def predictions_here(
    config: RunConfig,
    architecture: ModelConfig,
    stages: Sequence[str],
    say: Callable[[str], None],
    lengths: workload.Lengths | None = None,
) -> dict[str, float | None]:
    """The predicted seconds of each stage on the devices at hand; empty unless they are TPUs."""
    topology = tpu.topology_of(jax.devices())
    if topology is None:
        return {}
    target = lowering.target_of(config, architecture, topology, jax.devices())
    report = plan(target, stages=stages, say=say, lengths=lengths)
    return {name: stage.get("predicted s") for name, stage in report["stages"].items()}


def text(report: dict[str, Any]) -> str:
    """A report as tables: one column per stage, then the run as a whole, then warnings."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
    lines = [
        f"{report['topology']}: {report['chips']} chips as {mesh}; {report['parameters'] / 1e9:.3g} G parameters, rows "
        f"of {report['row length']} tokens, {report['rows a batch']} rows per batch, remat {report['remat']}"
    ]
    columns = []
    for name, record in report["stages"].items():
        column = {"stage": name, **{k: v for k, v in record.items() if k not in ("exchanges", "GiB sent by hand")}}
        for e in record.get("exchanges", []):
            if e["GiB sent"] > 0.001:
                column[f"{e['kind']} GiB sent, {'overlapped' if e['asynchronous'] else 'exposed'}"] = e["GiB sent"]
        column |= {f"{kind} GiB sent, expected": size for kind, size in record.get("GiB sent by hand", {}).items()}
        columns.append(_labelled(column))
    lines.append(tables.table(columns))
    run = {key: report[key] for key in ("fill", "attention pairs computed / seen", *SEARCHED) if key in report}
    lines.append(tables.table([_labelled(run | report.get("predicted run", {}))]))
    lines += [f"Warning: {warning}" for warning in report["warnings"]]
    return "\n".join(lines)


def comparison(reports: Sequence[dict[str, Any]]) -> str:
    """A table of several topologies, one column each."""
    columns = []
    for report in reports:
        column = {"topology": report["topology"], "chips": report["chips"]}
        for name, record in report["stages"].items():
            main = _labelled({key: record.get(key) for key in ("peak GiB", "predicted MFU", "binds")})
            column |= {f"{name}: {label}": value for label, value in main.items()}
        columns.append(column | _labelled(report.get("predicted run", {})))
    return tables.table(columns)


def _labelled(values: dict[str, Any]) -> dict[str, Any]:
    return {LABELS.get(key, key): value for key, value in values.items()}


def hours(target: Target, load: Workload, stages: dict[str, Stage]) -> dict[str, Any]:
    """Predict the configured run: hours of each part, hours and chip-hours of the whole, and rates.

    A decode step samples one token in every busy slot; a train step takes as many rows as it has room for. Padded pairs
    with live references are assumed to reach the step's own FLOPs per second.
    """
    config, devices = target.config, target.topology.device_count
    shards = sharding.row_shards(target.sampling_mesh) * (devices // target.sampling_mesh.size)  # of all processes
    decode_steps = load.new_tokens / (shards * lowering.slots_per_shard(target) * SLOTS_BUSY)
    prefills = load.prompt_tokens / (shards * lowering.prefill_row(config))
    sampling = decode_steps * stages["decode"].seconds / STEPS_PER_CHUNK + prefills * stages["prefill"].seconds
    rows, step = config.packing.rows_per_batch, stages["step"]
    seconds_of_batch = step.seconds / math.ceil(rows_of_step(config, load.triplets_per_row) / rows)
    rate = step.flops.useful / step.seconds * devices
    seconds = {"sampling": 0.0, "scoring": 0.0, "training": 0.0}
    for r in load.rounds:
        seconds["sampling"] += sampling
        batches = r.scored_rows / (rows * config.packing.scoring_batches)
        seconds["scoring"] += math.ceil(batches) * stages["scoring"].seconds
        of_step = rows_of_step(config, r.triplets_per_row)
        batches = math.ceil(r.rows / of_step) * math.ceil(of_step / rows)
        seconds["training"] += config.train.epochs * batches * seconds_of_batch
    total = sum(seconds.values())
    pairs = seconds["sampling"] + sum(r.padded_pair_flops for r in load.rounds) / rate
    triplets = rows_of_step(config, load.triplets_per_row) * load.triplets_per_row
    slower = seconds["sampling"] + _slower(target, step) * (seconds["scoring"] + seconds["training"])
    return {
        **{f"{name} h": s / 3600 for name, s in seconds.items()},
        "hours": total / 3600,
        **({"hours at published MFU": slower / 3600} if _published_mfu(target) else {}),
        "chip-hours": total * target.topology.chips / 3600,
        "triplets a step": triplets,
        "triplets/s of training": triplets / step.seconds,
        "new tokens/s of sampling": load.new_tokens / sampling,
        "padded pairs, hours": pairs / 3600,
        "padded pairs, FLOPs": sum(r.padded_pair_flops for r in load.rounds) / sum(r.tree_flops for r in load.rounds),
    }


def largest(target: Target, remat: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Find the most rows per device, and the longest row up to `LONGEST_ROW`, whose train step fits.

    With context parallelism, rows per group of devices, and rows up to `LONGEST_ROW` for each of its devices.

    The steps of one and two rows give an estimate of the most rows, which is verified by compiling that number and the
    next. The row length is doubled, at one row per device, while the step fits.
    """
    chip, c = target.topology.chip.device, target.config.packing
    shards = sharding.row_shards(target.mesh, target.config.mesh.context)
    compiled: dict[tuple[int, int], Stage] = {}

    def step(rows: int, length: int) -> Stage:
        if (rows, length) not in compiled:
            say(f"{target.topology.name}: compiling a step with {rows} rows of {length} tokens per device")
            resized = lowering.with_rows(target, rows * shards, length)
            lowered = lowering.team_step(resized, remat, most_micro_batches(resized.config))
            compiled[rows, length] = roofline.compile_stage(lowered, target.mesh, chip, Flops(0, 0))
        return compiled[rows, length]

    one, two = step(1, c.row_length), step(2, c.row_length)
    most = int(one.fits) + int(one.fits and two.fits)
    if most == 2:
        most = max(2, 1 + int((chip.hbm_bytes - one.peak) / max(two.peak - one.peak, GIB / 64)))
        while most > 2 and not step(most, c.row_length).fits:
            most -= 1
        while step(most + 1, c.row_length).fits:
            most += 1
    longest = c.row_length if most else 0
    while most and longest < LONGEST_ROW * target.config.mesh.context and step(1, 2 * longest).fits:
        longest *= 2
    return dict(zip(SEARCHED, (most, longest), strict=True))


def _step(target: Target, load: Workload) -> tuple[str, Stage]:
    """Compile the train step with the configured remat policy, or for `auto` with the first policy that fits."""
    config, most = target.config, most_micro_batches(target.config)
    rows = rows_of_step(config, load.triplets_per_row)
    used = math.ceil(rows / config.packing.rows_per_batch)
    rounds = {exchange.SCOPE: expected.EXPERT_ROUNDS}
    policies = list(REMAT_POLICIES) if config.policy.remat == "auto" else [config.policy.remat]
    for remat in policies:
        lowered = lowering.team_step(target, remat, most)
        flops = expected.step_flops(target, load, remat, rows)
        trips = [_head_chunks(target, load)] if most == 1 else [used, _head_chunks(target, load)]
        stage = roofline.compile_stage(
            lowered, target.mesh, target.topology.chip.device, flops, trips, named_trips=rounds
        )
        if config.policy.remat != "auto" or stage.peak <= SHARE_TO_USE * stage.chip.hbm_bytes:  # the run's own rule
            break
    return remat, stage


def _other_stage(target: Target, load: Workload, name: str) -> Stage:
    """Compile scoring, prefill or decode."""
    chip, typical = target.topology.chip.device, load.tokens_per_sequence
    policy = expected.param_bytes(target.params)
    if name == "scoring":
        flops, trips = expected.scoring_flops(target, load), [_head_chunks(target, load)]
        # The scoring player is an argument. The policy is not, nor the next player, which a single process reads ahead;
        # but of adapters, all have the same base.
        trained, _ = adapters.parts(target.params, target.model.lora)
        resident = expected.param_bytes(trained) * (1 if target.mesh.is_multi_process else 2)
        lowered, rounds = lowering.scoring_pass(target), {exchange.SCOPE: expected.EXPERT_ROUNDS}
        return roofline.compile_stage(lowered, target.mesh, chip, flops, trips, resident, named_trips=rounds)
    mesh = target.sampling_mesh
    resident = policy + expected.param_bytes(lowering.sampling_params(target))
    if name == "prefill":
        resident += expected.cache_bytes(target, typical)
        flops = expected.prefill_flops(target, load)
        return roofline.compile_stage(lowering.prefill(target), mesh, chip, flops, [], resident)
    flops, lowered = expected.decode_flops(target, load), lowering.decode(target, typical)
    return roofline.compile_stage(lowered, mesh, chip, flops, [STEPS_PER_CHUNK], resident)


def _description(target: Target, load: Workload, remat: str) -> dict[str, Any]:
    """The part of a report that needs no compiled program."""
    return {
        "model": target.config.policy.path,
        "topology": target.topology.name,
        "chips": target.topology.chips,
        "devices": target.topology.device_count,
        "mesh": dict(target.mesh.shape),
        "parameters": sum(math.prod(p.shape) for p in jax.tree.leaves(target.params)),
        "remat": remat,
        "row length": target.config.packing.row_length,
        "rows a batch": target.config.packing.rows_per_batch,
        "context": target.config.mesh.context,
        "fill": load.fill,
        "attention pairs computed / seen": load.computed.attended / load.row.attended,
        "published peaks": {k: v for k, v in target.topology.chip._asdict().items() if k != "host"},
    }


def _record(target: Target, load: Workload, name: str, stage: Stage, remat: str) -> dict[str, Any]:
    record = roofline.record(stage)
    if stage.traffic and name == "step" and (published := _published_mfu(target)):
        record |= {"published MFU": published, "s at published MFU": stage.seconds * _slower(target, stage)}
    if stage.traffic:
        batches = math.ceil(rows_of_step(target.config, load.triplets_per_row) / target.config.packing.rows_per_batch)
        sent = expected.bytes_sent(target, name, remat, batches)
        record["GiB sent by hand"] = {kind: size / GIB for kind, size in sent.items() if size}
        if name == "decode":
            record["memory traffic GiB, by hand"] = expected.decode_bytes(target, load.tokens_per_sequence) / GIB
    return record


def _warnings(target: Target, load: Workload, stages: dict[str, Stage]) -> list[str]:
    config, warnings = target.config, []
    for name, stage in stages.items():
        if not stage.fits:
            needed, available = (stage.peak + stage.resident) / GIB, stage.chip.hbm_bytes / GIB
            warnings.append(f"{name} does not fit: it needs {needed:.2f} GiB, and a device has {available:.2f} GiB.")
    if config.policy.remat in ("auto", "offload"):
        warnings.append("The predicted times leave out the transfers of remat `offload` to host memory and back.")
    rows, batch = rows_of_step(config, load.triplets_per_row), config.packing.rows_per_batch
    idle, wanted = 1 - rows / (math.ceil(rows / batch) * batch), config.train.batch_triplets
    step = f"A step has {rows} rows with {rows * load.triplets_per_row:.0f} triplets"
    if idle > 0.25:
        warnings.append(
            f"{step}, but the devices compute {batch} rows at a time: {idle:.0%} of what they compute is padding. "
            "packing.row_length: 0 finds a better one."
        )
    elif wanted != "auto" and not 0.9 < rows * load.triplets_per_row / wanted < 1.1:
        warnings.append(f"{step}; train.batch_triplets asks for {wanted}. packing.row_length: 0 finds a better one.")
    return warnings


def _published_mfu(target: Target) -> float | None:
    """The MFU that well-tuned runs on these chips are published to reach; None if none is known."""
    return roofline.PUBLISHED_MFU.get(target.topology.generation)


def _slower(target: Target, step: Stage) -> float:
    """How many times as long scoring and training take at the published MFU as at the roofline."""
    return max(1.0, step.mfu / (_published_mfu(target) or step.mfu))


def _head_chunks(target: Target, load: Workload) -> int:
    """Chunks in which a device's head computes the logits of its part of a row."""
    return math.ceil(load.computed.predictions / target.config.mesh.context / target.config.policy.head_chunk)


def rows_of_step(config: RunConfig, triplets_per_row: float) -> int:
    """Rows of a train step, for rows with so many triplets."""
    most = most_micro_batches(config)
    return packing.rows_per_step(triplets_per_row, config.train.batch_triplets, config.packing, most)
