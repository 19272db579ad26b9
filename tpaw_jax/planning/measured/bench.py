"""Measure the stages of a run on the devices at hand: the programs of `tpaw play`, with random weights and data.

One call of a stage's program is what `tpaw plan` predicts: an optimizer step, a scoring pass over
`packing.scoring_batches` batches, a prefill row per shard, or eight decode steps of all slots.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from tpaw_jax.config import RunConfig
from tpaw_jax.data import packing, prefix_trees
from tpaw_jax.generation import token_sampling
from tpaw_jax.generation.cache import PAGE, Pages
from tpaw_jax.generation.policy import lora_of, sharded_models
from tpaw_jax.generation.slots import STEPS_PER_CHUNK, DecodeState, Sampler, make_sampler
from tpaw_jax.models import ModelConfig, Transformer, adapters, quantized
from tpaw_jax.models.parallel import exchange
from tpaw_jax.planning import expected, hlo, lowering, workload
from tpaw_jax.runtime import processes, sharding, tpu
from tpaw_jax.runtime.host import Prefetch
from tpaw_jax.training import batch_shapes, cost, fitting_step, memory, scoring, train_step
from tpaw_jax.training.batch_shapes import most_micro_batches
from tpaw_jax.training.cost import Work
from tpaw_jax.training.train_step import StepScalars
from tpaw_jax.types import PackedPrompts, TeamScores, TreeBatch

WARM_UP = 2
"""Calls of a program before the first that is timed."""

GIB = 2**30

Say = Callable[[str], None]


class Setup(NamedTuple):
    """A model with random weights on the devices at hand, and packed random rows."""

    config: RunConfig  # with rows per batch filled in
    mesh: Mesh
    model: Transformer
    params: PyTree[Any]
    sampler: Sampler
    rows: packing.Rows
    rows_of_step: int
    load: workload.Workload
    lengths: workload.Lengths | None  # of the data; None: assumed


class Done(NamedTuple):
    """What one call has computed, over all devices that compute together."""

    tokens: float  # useful: no padding
    flops: float  # of useful tokens, nothing twice
    triplets: float = 0.0


class Reading(NamedTuple):
    """The timed calls of a stage."""

    stage: str
    compile_seconds: float
    seconds: Sequence[float]  # of each call
    done: Sequence[Done]  # by each call
    program: Any  # compiled
    input_wait: float | None = None  # share of the time in which the devices' inputs were waited for


def measure(
    config: RunConfig,
    architecture: ModelConfig,
    stages: Sequence[str],
    calls: int,
    say: Say,
    lengths: workload.Lengths | None = None,
) -> list[Any]:
    """Time `calls` calls of each stage; returns a JSON-able record of each.

    Args:
        config: the run.
        architecture: of the model; its weights are random.
        stages: some of `planner.STAGES`; the step comes last, because it takes the memory of the weights.
        calls: timed calls of each stage, after `WARM_UP` others.
        say: receives progress messages.
        lengths: of the run's data; None: assumed ones.

    Raises:
        ValueError: the configuration cannot be used on these devices.
    """
    setup = _set_up(config, architecture, lengths)
    readers = {"prefill": _prefill, "decode": _decode, "scoring": _score, "step": _step}
    records = []
    for stage in [name for name in readers if name in stages]:
        say(f"{stage}: compiling, then {WARM_UP} + {calls} calls")
        records.append(_record(setup, readers[stage](setup, calls, say)))
    return records


def _set_up(config: RunConfig, architecture: ModelConfig, lengths: workload.Lengths | None) -> Setup:
    mesh = sharding.make_mesh(config.mesh)
    config = dataclasses.replace(config, packing=batch_shapes.resolve_packing(config, mesh))
    tpu.check_options(mesh, config.mesh.compiler_options)
    params = _random_params(config, architecture, mesh)
    model, decoder, sampling_mesh = sharded_models(config, architecture, params, mesh)
    sampler = make_sampler(decoder, config.sampling, [], sampling_mesh)
    rows, rows_of_step = _rows(config, architecture.vocab_size, lengths)
    load = workload.assumed(config, architecture, workload.SAMPLE, lengths)
    return Setup(config, mesh, model, params, sampler, rows, rows_of_step, load, lengths)


def _random_params(config: RunConfig, architecture: ModelConfig, mesh: Mesh) -> PyTree[Any]:
    dtype = jnp.dtype(config.policy.param_dtype)
    lora = lora_of(config.policy.lora, config.rounds)
    model = Transformer(architecture, jnp.dtype(config.policy.compute_dtype), dtype, lora=lora)
    init = lambda: model.init(jax.random.key(config.seed), jnp.zeros((1, 8), jnp.int32))["params"]
    params = jax.jit(init, out_shardings=sharding.param_shardings(jax.eval_shape(init), mesh))()
    if model.lora and config.policy.lora.base_dtype == "int8":
        return quantized.quantize_projections(params, sharding.param_sharder(mesh))
    return params


def _rows(config: RunConfig, vocabulary: int, lengths: workload.Lengths | None) -> tuple[packing.Rows, int]:
    """Rows of random trees that fill at least two steps, and the rows of a step.

    A round has few of first-fit-decreasing's last rows, which are less full, so they are left out.
    """
    c, size = config.packing, 64
    while True:
        prompts, window = workload.random_window(config, vocabulary, size, lengths)
        rows = packing.pack(prefix_trees.trees_of_window(prompts, window), c)
        triplets, most = float(rows.triplets.mean()), most_micro_batches(config)
        of_step = packing.rows_per_step(triplets, config.train.batch_triplets, c, most)
        if len(rows) > 2 * of_step:
            whole = np.arange(len(rows) // of_step * of_step)
            return packing.take(rows, whole, len(whole)), of_step
        size *= 2


def _step(setup: Setup, calls: int, say: Say) -> Reading:
    config, mesh, rows = setup.config, setup.mesh, setup.rows
    optimizer = train_step.make_optimizer(config.train)
    step: Any = fitting_step.make_fitting_step(config, setup.model, setup.params, optimizer, mesh, say)[1]
    players, most = config.objective.n_max, most_micro_batches(config)
    scores = TeamScores(np.zeros((players, *rows.prompt_index.shape), np.float32), np.ones(players, bool))
    scalars = StepScalars(np.float32(0), np.float32(config.objective.lam[0]), np.float32(0), np.bool_(False))
    shardings = train_step.input_shardings(mesh, config.mesh.context)

    def inputs(indices: np.ndarray) -> tuple[Any, Done]:
        batch, team, used = packing.step_batch(rows, scores, indices, config.packing.rows_per_batch, most)
        placed = sharding.place((batch, team, used, scalars), shardings)
        return placed, _done(setup, packing.take(rows, indices, len(indices)), with_backward=True)

    order = [np.arange(i, i + setup.rows_of_step) % len(rows) for i in _starts(setup.rows_of_step, calls)]
    trained, frozen = adapters.parts(setup.params, setup.model.lora)
    state = train_step.init_state(trained, optimizer, mesh)
    compiled, seconds_to_compile = _compiled(step, state, *inputs(order[0])[0], *frozen)
    done, waited = [], []
    with Prefetch(inputs, order, depth=2) as ahead:

        def call() -> Any:
            nonlocal state
            arguments, counts = next(ahead)
            state, metrics = compiled(state, *arguments, *frozen)
            done.append(counts)
            waited.append(ahead.waited)
            return metrics

        seconds = _timed(call, calls)
    wait = (waited[WARM_UP + calls - 1] - waited[WARM_UP - 1]) / sum(seconds)
    counts = done[WARM_UP : WARM_UP + calls]
    return Reading("step", seconds_to_compile, seconds, counts, compiled, wait)


def _score(setup: Setup, calls: int, _: Say) -> Reading:
    config, mesh, rows = setup.config, setup.mesh, setup.rows
    optimizer = train_step.make_optimizer(config.train)
    log_prob_fn = fitting_step.configured_step(config, setup.model, optimizer, mesh)[0]
    options, context = tpu.options_of(mesh, config.mesh.compiler_options), config.mesh.context
    program = scoring.score_program(log_prob_fn, mesh, options, context)
    size = config.packing.rows_per_batch * config.packing.scoring_batches

    def batch(start: int) -> tuple[packing.Rows, TreeBatch]:
        chosen = packing.take(rows, np.arange(start, start + size) % len(rows), size)
        return chosen, chosen.batch

    place = lambda arrays: sharding.place(arrays, scoring.batch_sharding(mesh, context))
    compiled, seconds_to_compile = _compiled(program, setup.params, place(batch(0)[1]))
    done = []
    with Prefetch(batch, _starts(size, calls), depth=1) as ahead:

        def call() -> Any:
            chosen, arrays = next(ahead)
            done.append(_done(setup, chosen)._replace(triplets=0.0))
            return compiled(setup.params, place(arrays))

        seconds = _timed(call, calls)
    counts = done[WARM_UP : WARM_UP + calls]
    return Reading("scoring", seconds_to_compile, seconds, counts, compiled)


def _prefill(setup: Setup, calls: int, _: Say) -> Reading:
    sampler: Any = setup.sampler
    weights = _sampling_weights(setup)
    prompts, lengths = _prefill_rows(setup)
    compiled, seconds_to_compile = _compiled(sampler.prefill, weights.prefill, _place(sampler, prompts))
    seconds = _timed(lambda: compiled(weights.prefill, _place(sampler, prompts)), calls)
    pairs = float(sum(n * (n + 1) / 2 for n in lengths))
    work = Work(float(sum(lengths)), len(lengths), pairs)
    done = Done(work.tokens, cost.flops(setup.model.config, work))
    return Reading("prefill", seconds_to_compile, seconds, [done] * calls, compiled)


def _prefill_rows(setup: Setup) -> tuple[PackedPrompts, list[int]]:
    """A row for each shard, filled with prompts, and the prompts' lengths."""
    length, shards = lowering.prefill_row(setup.config), setup.sampler.shards
    tokens, positions, segments = np.zeros((3, shards, length), np.int32)
    first, lengths = np.zeros((shards, length // 16), np.int32), np.ones((shards, length // 16), np.int32)
    sizes, rng = [], np.random.default_rng(setup.config.seed)
    drawn = workload.draw_lengths(setup.config, workload.SAMPLE, setup.lengths)[0].prompt_tokens
    for row in range(shards):
        used = 0
        for n, prompt in enumerate(drawn[: length // 16]):
            if used + len(prompt) > length:
                break
            run = slice(used, used + len(prompt))
            tokens[row, run] = rng.integers(0, setup.model.config.vocab_size, len(prompt))
            positions[row, run], segments[row, run] = np.arange(len(prompt)), n + 1
            first[row, n], lengths[row, n] = used, len(prompt)
            sizes.append(len(prompt))
            used = run.stop
    return PackedPrompts(tokens, positions, segments, first, lengths), sizes


def _decode(setup: Setup, calls: int, _: Say) -> Reading:
    """Decode in slots that all hold sequences of about the average length, starting again after a page of tokens."""
    sampler: Any = setup.sampler
    config, shards = setup.config.sampling, setup.sampler.shards
    slots = math.ceil(config.slots * sampler.processes / shards)
    typical = setup.load.tokens_per_sequence
    room = max(1, min(config.max_new_tokens, PAGE) // STEPS_PER_CHUNK) * STEPS_PER_CHUNK
    start = max(1, typical - room // 2)
    held = math.ceil((start + room) / PAGE)
    pages = Pages(shards, slots, held * slots, held)
    pages.reserve(np.full((shards, slots), start + room))
    state, table = _busy(sampler.init(slots, pages.pages), start, room), _place(sampler, pages.table())
    weights, key = _sampling_weights(setup).decode, token_sampling.round_key(setup.config.seed, 0)
    until = _place(sampler, np.zeros(shards, np.int32))
    compiled, seconds_to_compile = _compiled(sampler.decode, weights, state, table, key, until)
    made = 0

    def call() -> Any:
        nonlocal state, made
        if made and made * STEPS_PER_CHUNK % room == 0:
            state = _busy(state, start, room)
        made += 1
        state, snapshot = compiled(weights, state, table, key, until)
        return snapshot.generated

    seconds = _timed(call, calls)
    new = float(slots * shards * STEPS_PER_CHUNK)
    done = Done(new, cost.flops(setup.model.config, Work(new, new, new * typical)))
    return Reading("decode", seconds_to_compile, seconds, [done] * calls, compiled)


def _busy(state: DecodeState, position: int, limit: int) -> DecodeState:
    """The state with every slot in the middle of a response, at `position` of its sequence."""
    full = lambda x, value: jax.device_put(np.full(x.shape, value, x.dtype), x.sharding)
    return state.replace(
        active=full(state.active, True),
        position=full(state.position, position),
        generated=full(state.generated, 0),
        limit=full(state.limit, limit + 1),
    )


def _sampling_weights(setup: Setup) -> Any:
    local = sharding.resplit(setup.params, setup.sampler.mesh, setup.sampler.dtype)
    return setup.sampler.prepare(local)


def _place(sampler: Sampler, arrays: PyTree[Any]) -> PyTree[Any]:
    return arrays if sampler.processes == 1 else sharding.place(arrays, sharding.rows(sampler.mesh))


def _starts(size: int, calls: int) -> list[int]:
    """The first row of each call."""
    return [size * i for i in range(WARM_UP + calls + 1)]


def _compiled(program: Any, *arguments: Any) -> tuple[Any, float]:
    """The compiled program, and the seconds that it took; a program that is compiled already took none."""
    start = time.perf_counter()
    compiled = program.lower(*arguments).compile() if hasattr(program, "lower") else program
    return compiled, time.perf_counter() - start


def _timed(call: Callable[[], Any], calls: int) -> list[float]:
    """Seconds between the results of successive calls. Like a run, it queues a call before it awaits the last one."""
    stamps, pending = [], call()
    for _ in range(WARM_UP + calls):
        following = call()
        jax.block_until_ready(pending)
        stamps.append(time.perf_counter())
        pending = following
    jax.block_until_ready(pending)
    return np.diff(stamps)[WARM_UP - 1 :].tolist()


def _done(setup: Setup, rows: packing.Rows, with_backward: bool = False) -> Done:
    forward = cost.work_of_rows(rows)._replace(tokens=float(rows.tokens.sum()))
    work = cost.with_backward(forward, setup.model.lora is not None) if with_backward else forward
    return Done(forward.tokens, cost.flops(setup.model.config, work), float(rows.triplets.sum()))


def _record(setup: Setup, reading: Reading) -> dict[str, Any]:
    """The reading as JSON-able values. A rate is that of the median call."""
    seconds, devices = np.array(reading.seconds), setup.mesh.size
    apart = reading.stage in ("prefill", "decode") and setup.sampler.processes == 1  # each process samples on its own
    copies = jax.process_count() if apart else 1
    rate = lambda values: copies * float(np.median(np.array(values) / seconds))
    chip = tpu.CHIPS.get(tpu.generation(setup.mesh.devices.flat[0]) or "")
    flops = rate([done.flops for done in reading.done]) / devices
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peak = max(s.get("peak_bytes_in_use", 0) for s in stats)
    return {
        "stage": reading.stage,
        "generation": tpu.generation(setup.mesh.devices.flat[0]),
        "median s": float(np.median(seconds)),
        "fastest s": float(seconds.min()),
        "slowest s": float(seconds.max()),
        "calls": len(seconds),
        "tokens/s": rate([done.tokens for done in reading.done]),
        "tokens/s per device": rate([done.tokens for done in reading.done]) / devices,
        "triplets/s": rate([done.triplets for done in reading.done]) if reading.done[0].triplets else None,
        "model TFLOP/s per device": flops / 1e12,
        "MFU": flops / chip.device.peak_flops if chip else None,
        "program GiB per device": memory.needed_bytes(reading.program) / GIB,
        "collectives GiB sent per device": _sent(reading.program, devices) / GIB,
        "device peak GiB": peak / GIB if peak else None,
        "input wait": reading.input_wait,
        "compile s": reading.compile_seconds,
        "seconds": list(reading.seconds),
        "settings": dict(_settings(setup)),
    }


def _sent(program: Any, devices: int) -> float:
    """Bytes that a device sends in the collectives of one run of a program. Loops over micro-batches count once."""
    rounds = {exchange.SCOPE: expected.EXPERT_ROUNDS}
    collectives = hlo.parse(program.as_text(), named_trips=rounds).collectives()
    return sum(c.sent(len(c.group) or devices) for c in collectives)


def _settings(setup: Setup) -> Iterator[tuple[str, Any]]:
    """What a reading belongs to."""
    c, model, device = setup.config, setup.model.config, setup.mesh.devices.flat[0]
    yield "devices", f"{setup.mesh.size} x {device.device_kind}"
    yield "processes", jax.process_count()
    yield "mesh", dict(setup.mesh.shape)
    yield "parameters", sum(math.prod(p.shape) for p in jax.tree.leaves(setup.params))
    yield "model", f"{model.model_type}, {model.num_layers} layers of {model.hidden_size}"
    yield "dtypes", f"{c.policy.param_dtype}, {c.policy.compute_dtype}"
    yield "remat", c.policy.remat
    yield "row length", c.packing.row_length
    yield "rows of a step", setup.rows_of_step
    yield "rows per batch", c.packing.rows_per_batch
    yield "context", c.mesh.context
    yield "lengths", "assumed" if setup.lengths is None else "of the data"
    yield "fill", round(setup.rows.fill, 4)
    yield "slots", c.sampling.slots
    facts = processes.facts_of_this_host()
    yield "versions", {name: facts[name] for name in sorted(facts)}
