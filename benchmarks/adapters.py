"""What do adapters save, and do three players of one base score faster together? JSON lines.

    python benchmarks/adapters.py --model smollm2 --row-length 2048 --repeats 5

One line for each way to train: all parameters, adapters of queries and values, adapters of all projections. The steps
are of the same packed rows and interleaved; bytes are those of the compiled program, and of a player in the ring. Then
one line for scoring by three players that are adapters of one base: one after the other, and all in one pass over the
base (`vmap` over the adapters), interleaved.

    python benchmarks/adapters.py --topology v5e:2x2 --config RUN.yaml configs/overlays/lora.yaml --architecture MODEL

compiles both for a TPU topology instead, and prints what they should take there: bytes of memory traffic and of
collectives, and seconds by the roofline of `tpaw plan`.
"""

import argparse
from pathlib import Path
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tpaw_jax.config import ObjectiveConfig, PackingConfig, TrainConfig, config_file
from tpaw_jax.data import packing
from tpaw_jax.models import adapters, hub
from tpaw_jax.models.adapters import Lora
from tpaw_jax.planning import expected, lowering, planner, roofline, workload
from tpaw_jax.runtime import sharding, tpu
from tpaw_jax.runtime.host import restart_with_huge_pages
from tpaw_jax.training import logprobs, memory, train_step
from tpaw_jax.training.train_step import StepScalars

WAYS = {"all parameters": (), "adapters of q, v": ("q", "v"), "adapters of all": tuple(adapters.PROJECTIONS.values())}
PLAYERS = 3


def main() -> None:
    restart_with_huge_pages()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=common.MODELS, default="smollm2")
    parser.add_argument("--row-length", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=27, help="they fill four rows")
    parser.add_argument("--scale", type=float, default=0.25, help="of the lengths; 1 is the paper's")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--topology", help="compile scoring for this topology, and measure nothing")
    parser.add_argument("--config", nargs="+")
    parser.add_argument("--architecture", type=Path)
    options = parser.parse_args()
    if options.topology:
        planned(options)
        return
    data = common.workload(options.prompts, 3, options.scale, 0, common.MODELS[options.model].vocab_size)
    setup = common.set_up(options.model, PackingConfig(row_length=options.row_length), data, "layer", 256)
    steps(setup, options)
    scoring(setup, options)


def with_adapters(setup: common.Setup, rank: int, targets: tuple[str, ...]) -> tuple[Any, Any]:
    """The model and its parameters with random adapters, B included."""
    if not targets:
        return setup.model, setup.params
    model = setup.model.clone(lora=Lora(rank, 1.0, tuple(sorted(targets))))
    init = jax.jit(lambda: adapters.split(model.init(jax.random.key(1), jnp.zeros((1, 8), jnp.int32))["params"])[0])
    noise = lambda x: x + 1e-3 * jax.random.normal(jax.random.key(2), x.shape)
    return model, adapters.join(setup.params, jax.tree.map(noise, init()))


def steps(setup: common.Setup, options: argparse.Namespace) -> None:
    """A line for each way to train."""
    optimizer = train_step.make_optimizer(TrainConfig())
    scores = common.team_scores(setup, 1, PLAYERS)
    inputs = packing.step_batch(setup.rows, scores, np.arange(len(setup.rows)), 1, len(setup.rows))
    scalars = StepScalars(np.float32(1e-7), np.float32(0.1), np.float32(0), np.bool_(False))
    ready = {}
    for name, targets in WAYS.items():
        model, params = with_adapters(setup, options.rank, targets)
        trained, frozen = adapters.parts(params, model.lora)
        log_prob_fn = logprobs.make_log_prob_fn(model, 256)
        step: Any = train_step.make_train_step(log_prob_fn, optimizer, ObjectiveConfig(), setup.mesh, lora=model.lora)
        state = train_step.init_state(jax.tree.map(jnp.copy, trained), optimizer, setup.mesh)
        ready[name] = (step.lower(state, *inputs, scalars, *frozen).compile(), state, frozen)
    readings: dict[str, list[float]] = {name: [] for name in ready}
    for repeat in range(options.repeats + 1):
        for name, (step, state, frozen) in ready.items():
            states = []
            seconds = common.seconds_of(lambda: states.append(step(state, *inputs, scalars, *frozen)) or states)  # noqa: B023
            ready[name] = (step, states[0][0], frozen)
            readings[name] += [seconds] * (repeat > 0)
    whole = np.array(readings["all parameters"])
    for name, (step, state, _) in ready.items():
        common.emit(
            benchmark="adapters_step",
            model=options.model,
            trains=name,
            rank=options.rank if WAYS[name] else None,
            row_length=options.row_length,
            rows=len(setup.rows),
            trained_parameters=sum(x.size for x in jax.tree.leaves(state.params)),
            seconds=common.spread(readings[name]),
            time_of_all_parameters=common.spread((whole / np.array(readings[name])).tolist()),
            program_gib=memory.needed_bytes(step) / 2**30,
            player_mib=sum(x.nbytes for x in jax.tree.leaves(state.params)) / 2**20,
            machine=common.machine(),
        )


def scoring(setup: common.Setup, options: argparse.Namespace) -> None:
    """Three players, one after the other and in one pass."""
    model, params = with_adapters(setup, options.rank, WAYS["adapters of all"])
    first, base = adapters.split(params)
    players = [jax.tree.map(lambda x, j=j: x * (1 + 0.1 * j), first) for j in range(PLAYERS)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *players)
    log_prob_fn = logprobs.make_log_prob_fn(model, 256)
    of_player = lambda own, base, batch: log_prob_fn(adapters.join(base, own), batch)
    one, together = jax.jit(of_player), jax.jit(jax.vmap(of_player, in_axes=(0, None, None)))
    batches = [packing.take(setup.rows, np.array([i]), 1).batch for i in range(len(setup.rows))]
    in_turn = lambda: [[one(own, base, batch) for batch in batches] for own in players]
    at_once = lambda: [together(stacked, base, batch) for batch in batches]
    apart = np.array(in_turn())
    difference = np.abs(np.stack(at_once(), axis=1) - apart).max()
    readings: dict[str, list[float]] = {"in turn": [], "at once": []}
    for _ in range(options.repeats):
        readings["in turn"].append(common.seconds_of(in_turn))
        readings["at once"].append(common.seconds_of(at_once))
    ratios = np.array(readings["in turn"]) / np.array(readings["at once"])
    common.emit(
        benchmark="adapters_scoring",
        model=options.model,
        players=PLAYERS,
        rank=options.rank,
        row_length=options.row_length,
        rows=len(setup.rows),
        seconds={name: common.spread(values) for name, values in readings.items()},
        at_once_is_faster_by=common.spread(ratios.tolist()),
        largest_difference=float(difference),
        machine=common.machine(),
    )


def planned(options: argparse.Namespace) -> None:
    """Scoring of one batch by three players on a topology, as compiled: one after the other, and in one pass."""
    config = config_file.load(options.config, [f"policy.path={options.architecture}"])
    architecture = hub.load_architecture(options.architecture)
    target = lowering.target_of(config, architecture, tpu.parse_topology(options.topology))
    load = workload.assumed(target.config, architecture, workload.SAMPLE)
    one = lowering.scoring_pass(target)
    together = _scoring_at_once(target)
    flops = expected.scoring_flops(target, load)
    of_all = roofline.Flops(*(PLAYERS * value for value in flops))
    for name, lowered, work, calls in (("in turn", one, flops, PLAYERS), ("at once", together, of_all, 1)):
        trips = [planner._head_chunks(target, load)]
        stage = roofline.compile_stage(lowered, target.mesh, target.topology.chip.device, work, trips)
        common.emit(
            benchmark="adapters_scoring_planned",
            topology=options.topology,
            architecture=options.architecture.name,
            players=PLAYERS,
            way=name,
            rows=target.config.packing.rows_per_batch,
            row_length=target.config.packing.row_length,
            seconds=calls * stage.seconds,
            compute_seconds=calls * stage.compute_seconds,
            memory_seconds=calls * stage.memory_seconds,
            overlapped_collective_seconds=calls * stage.overlapped_seconds,
            exposed_collective_seconds=calls * stage.exposed_seconds,
            traffic_gib=calls * stage.traffic / 2**30,
            peak_gib=stage.peak / 2**30,
            fits=stage.fits,
        )


def _scoring_at_once(target: lowering.Target) -> Any:
    mesh, by_row = target.mesh, sharding.rows(target.mesh)
    first, base = adapters.split(target.params)
    log_prob_fn = logprobs.make_log_prob_fn(target.model, target.config.policy.head_chunk)
    specs = lambda tree: jax.tree.map(lambda x: x.sharding.spec, tree)
    of_all = jax.tree.map(lambda x: P(None, *x.sharding.spec), first)
    of_player = lambda own, base, batch: log_prob_fn(adapters.join(base, own), batch)
    program = jax.shard_map(
        jax.vmap(of_player, in_axes=(0, None, None)),
        mesh=mesh,
        in_specs=(of_all, specs(base), by_row.spec),
        out_specs=P(None, *by_row.spec),
        check_vma=False,
    )
    stack = lambda x: jax.ShapeDtypeStruct(
        (PLAYERS, *x.shape), x.dtype, sharding=NamedSharding(mesh, P(None, *x.sharding.spec))
    )
    rows = packing.empty(target.config.packing, target.config.packing.rows_per_batch).batch
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype, sharding=by_row), rows)
    options = tpu.options_of(mesh, target.config.mesh.compiler_options)
    jitted: Any = jax.jit(program, compiler_options=options)
    return jitted.trace(jax.tree.map(stack, first), base, batch).lower(lowering_platforms=(target.platform,))


if __name__ == "__main__":
    main()
