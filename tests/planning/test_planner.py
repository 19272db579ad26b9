"""Plans: every stage of a small model compiled for TPU slices that are not here, against counts by hand."""

import dataclasses
import functools
import json

import forked
import jax
import numpy as np
import pytest
from conftest import DEMO, ROOT, SIMILAR, STORIES
from jax.experimental.compilation_cache import compilation_cache

from tpaw_jax import cli
from tpaw_jax.config import MeshConfig, PackingConfig, config_file
from tpaw_jax.generation.cache import Pages
from tpaw_jax.models import ModelConfig, hub
from tpaw_jax.models.checkpoints import config_json
from tpaw_jax.planning import expected, layouts, lowering, planner, roofline, workload
from tpaw_jax.planning.measured import tune
from tpaw_jax.planning.roofline import Flops
from tpaw_jax.runtime import host, sharding, tpu

SMALL = ModelConfig("llama", 2048, 512, 1024, 2, 4, 2, 128, 10000.0, 1e-5, 8192, False)
TIED = dataclasses.replace(SMALL, tie_embeddings=True, model_type="qwen2", qkv_bias=True)
WIDER = dataclasses.replace(TIED, hidden_size=1024, num_heads=8)
EXPERTS = dataclasses.replace(
    SMALL, model_type="qwen3_moe", qk_norm=True, num_experts=8, experts_per_token=2, expert_size=256
)
BESIDE = dataclasses.replace(  # what Gemma 4 has: experts beside a dense feed-forward, heads of two sizes
    EXPERTS,
    model_type="gemma4_text",
    num_layers=4,
    post_norm=True,
    experts_beside_dense=True,
    output_scale=True,
    sliding_window=512,
    window_layers=(True, False, True, False),
    local_rope_theta=1e4,
    global_head_dim=256,
    global_kv_heads=2,
)


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    """The compiler's lowest level: what it schedules differs, what it computes and exchanges does not.

    A program for a TPU that is not here cannot be read back from the compilation cache.
    """
    host.quiet_libtpu(compute=False)
    wanted = {"jax_optimization_level": "O0", "jax_compilation_cache_dir": None}
    before = {name: getattr(jax.config, name) for name in wanted}
    for settings in (wanted, before):
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # whether there is one is asked but once
        if settings is wanted:
            yield


@pytest.fixture(autouse=True, scope="module")
def equal_programs_are_compiled_once():
    """Several tests plan the same stage of the same topology."""
    compile_stage, stages = roofline.compile_stage, {}

    def shared(lowered, mesh, *rest, **named):
        if not isinstance(lowered, jax.stages.Lowered):  # a test's own
            return compile_stage(lowered, mesh, *rest, **named)
        level = jax.config.jax_optimization_level
        key = lowered.as_text(), repr(mesh.devices.tolist()), level, repr((rest, named))
        if key not in stages:
            stages[key] = compile_stage(lowered, mesh, *rest, **named)
        return stages[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "compile_stage", shared)
        yield


def run_of(mesh=None, **overrides):
    settings = {
        "policy.path": "unused",
        "data.sources": "[{path: unused}]",
        "packing.row_length": 2048,
        "sampling.slots": 16,
    }
    settings |= (
        {"mesh.preset": "auto" if mesh is None else '""'}
        | overrides
        | {f"mesh.{axis}": size for axis, size in (mesh or {}).items()}
    )
    return config_file.load(ROOT / "configs" / "qwen25_1b5_ultrachat.yaml", [f"{k}={v}" for k, v in settings.items()])


def target(topology, model=SMALL, mesh=None, **overrides):
    return lowering.target_of(run_of(mesh, **overrides), model, tpu.parse_topology(topology))


def exchanged(record):
    """GiB of each kind of collective, in any way."""
    found = {}
    for e in record["exchanges"]:
        found[e["kind"]] = found.get(e["kind"], 0) + e["GiB sent"]
    return found


@pytest.mark.parametrize(
    ("topology", "model", "mesh", "reduce_dtype"),
    [
        ("v5e:2x2", SMALL, None, "float32"),  # fsdp alone
        pytest.param("v5e:2x2", TIED, {"data": 2, "fsdp": 2}, "bfloat16", marks=SIMILAR),
        ("v5e:2x2", SMALL, {"data": 1, "fsdp": 2, "tensor": 2}, "float32"),
        ("2 x v5e:2x2", SMALL, {"data": 4, "fsdp": 2}, "float32"),  # data over slices, and over two devices of each
        # fsdp over two dimensions of the torus, parts of 64 columns
        pytest.param("v5e:4x4", WIDER, None, "float32", marks=SIMILAR),
        pytest.param("v6e:2x2", SMALL, {"data": 2, "fsdp": 2}, "float32", marks=SIMILAR),  # SparseCores, as on tpu7x
        pytest.param("tpu7x:2x2x1", SMALL, None, "float32", marks=SIMILAR),  # two devices to a chip
        pytest.param("v5e:2x2", EXPERTS, None, "float32", marks=SIMILAR),
        ("v5e:2x2", EXPERTS, {"data": 1, "fsdp": 2, "expert": 2}, "float32"),
        pytest.param("v5e:2x2", BESIDE, {"data": 1, "fsdp": 2, "tensor": 2}, "float32", marks=SIMILAR),
    ],
)
def test_a_step_and_a_scoring_pass_exchange_what_the_design_says(topology, model, mesh, reduce_dtype):
    # In a loop over micro-batches, the compiler transposes gradients with parts of 64 rows, and sums instead.
    settings = {"train.batch_triplets": 16} if model is WIDER else {}
    planned = target(topology, model, mesh, **{"train.reduce_dtype": reduce_dtype}, **settings)
    plan = planner.plan(planned, stages=("step", "scoring"))
    assert [warning for warning in plan["warnings"] if "row_length: 0 finds" not in warning] == []
    for record in plan["stages"].values():
        assert record["fits"]
        found, expected = exchanged(record), record["GiB sent by hand"]
        assert set(expected) <= set(found)
        for kind in found:  # reduce-scatters of odd sizes are padded, norms and scalars are not in the count
            assert found[kind] == pytest.approx(expected.get(kind, 0), rel=0.1, abs=1e-4), (kind, found, expected)


def test_no_logits_are_gathered_and_no_table_more_than_once():
    record = planner.plan(target("v5e:2x2"), stages=("scoring",))["stages"]["scoring"]
    table = SMALL.vocab_size * SMALL.hidden_size * 2 / 2**30
    layers = sum(
        np.prod(shape) * 2 / 2**30 for name, shape in hub.param_shapes(SMALL).items() if name.endswith("kernel")
    )
    assert exchanged(record)["all-gather"] < 1.02 * (table + layers)


@pytest.mark.parametrize("tensor", [1, 2])
def test_sampling_exchanges_only_over_tensor(tensor):
    plan = planner.plan(target("v5e:2x2", **{"sampling.tensor": tensor}), stages=("prefill", "decode"))
    for record in plan["stages"].values():
        if tensor == 1:
            assert record["exchanges"] == []
        else:
            found = exchanged(record)
            assert set(found) == set(record["GiB sent by hand"]) == {"all-reduce", "all-gather"}
            for kind, size in record["GiB sent by hand"].items():
                assert found[kind] == pytest.approx(size, rel=0.1)


@pytest.mark.parametrize(
    ("topology", "heads", "kv_heads", "head_dim", "sharers", "most"),
    [
        ("v5e:2x2", 16, 4, 128, 1, 1.1),
        # a page that four slots may hold has four slots' intermediates
        pytest.param("v5e:2x2", 16, 4, 128, 4, 1.2, marks=SIMILAR),
        pytest.param("v5e:2x2", 32, 4, 64, 1, 1.1, marks=SIMILAR),
        # three heads of 64 are joined: what they give is wider
        pytest.param("v5e:2x2", 24, 3, 64, 1, 1.2, marks=SIMILAR),
        pytest.param(
            "v5p:2x2x1", 16, 4, 128, 1, 1.6, marks=SIMILAR
        ),  # whose compiler leaves small intermediates in main memory
    ],
)
def test_decoding_reads_every_weight_and_page_once_a_step_and_little_else(
    topology, heads, kv_heads, head_dim, sharers, most, monkeypatch
):
    monkeypatch.setattr(lowering, "Pages", functools.partial(Pages, sharers=sharers))
    model = ModelConfig("llama", 32768, 2048, 8192, 3, heads, kv_heads, head_dim, 10000.0, 1e-5, 8192, False)
    quick = jax.config.jax_optimization_level  # which leaves out what moves data beside products
    jax.config.update("jax_optimization_level", "UNKNOWN")  # the default
    try:
        planned = planner.plan(target(topology, model, **{"sampling.slots": 512}), stages=("decode",))
    finally:
        jax.config.update("jax_optimization_level", quick)
    found = planned["stages"]["decode"]
    assert 1 < found["memory traffic GiB"] / found["memory traffic GiB, by hand"] < most


def test_a_whole_plan_is_json_with_hours_and_tables():
    plan = planner.plan(target("v5e:2x2"), prompts=2000)
    again = json.loads(json.dumps(plan))
    run = again["predicted run"]
    assert run["hours"] == pytest.approx(run["sampling h"] + run["scoring h"] + run["training h"])
    assert run["chip-hours"] == pytest.approx(4 * run["hours"])
    assert run["padded pairs, hours"] > run["hours"]
    text = planner.text(plan)
    for words in ("predicted MFU", "all-gather GiB sent, expected", "fsdp 4", "padded pairs"):
        assert words in text
    assert "v5e:2x2" in planner.comparison([plan, plan])


@pytest.mark.parametrize(("topology", "published"), [("v5p:2x2x1", 0.654), ("v5e:2x2", None)])
def test_a_bound_above_what_is_published_comes_with_the_time_at_that(topology, published):
    """A stage whose arithmetic takes one second, of which 90 % is useful."""
    of = target(topology)
    load = workload.assumed(of.config, of.model.config, 200)
    chip = of.topology.chip.device
    stage = roofline.Stage(0, True, 1, 0, Flops(chip.peak_flops, 0.9 * chip.peak_flops), 1, (), chip)
    found = planner._record(of, load, "step", stage, "layer")
    assert found["predicted MFU"] == pytest.approx(0.9)
    run = planner.hours(of, load, dict.fromkeys(planner.STAGES, stage))
    if published is None:
        assert not {"published MFU", "s at published MFU"} & found.keys()
        assert "hours at published MFU" not in run
        return
    assert found["published MFU"] == published
    assert found["s at published MFU"] == pytest.approx(0.9 / published)
    slower = run["sampling h"] + 0.9 / published * (run["scoring h"] + run["training h"])
    assert run["hours at published MFU"] == pytest.approx(slower)


def test_the_largest_batch_is_the_last_that_fits(monkeypatch):
    """The search against a compiler whose programs need 2 GiB and 1.5 GiB for each 2048 tokens of a device."""
    asked = []

    def compiled(lowered, mesh, chip, flops):
        tokens = lowered.packing.rows_per_batch / mesh.size * lowered.packing.row_length
        peak = (2 + 1.5 * tokens / 2048) * 2**30
        asked.append(tokens)
        return roofline.Stage(0, peak <= chip.hbm_bytes, peak, 0, flops, 0, (), chip)

    monkeypatch.setattr(lowering, "team_step", lambda wanted, remat, micro_batches: wanted.config)
    monkeypatch.setattr(roofline, "compile_stage", compiled)
    found = planner.largest(target("v5e:2x2"), "layer", lambda line: None)
    assert found == {"most rows a device": 9, "longest row": 16384}  # of 15.75 GiB
    assert {9 * 2048, 10 * 2048} <= set(asked)


def test_a_program_that_does_not_fit_is_reported_with_what_it_needs(monkeypatch):
    class Refused:
        message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 15.82G of 15.75G hbm."

        def compile(self):
            raise jax.errors.JaxRuntimeError(self.message)

    small = target("v5e:2x2")
    stage = roofline.compile_stage(Refused(), small.mesh, small.topology.chip, Flops(1.0, 1.0))
    assert not stage.fits
    assert stage.peak == pytest.approx(15.82 * 2**30)
    assert "predicted s" not in roofline.record(stage)
    monkeypatch.setattr(
        Refused, "message", "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 18M of 17M vmem."
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        roofline.compile_stage(Refused(), small.mesh, small.topology.chip, Flops(1.0, 1.0))


@pytest.mark.parametrize(
    ("batch", "warning"),
    [
        ("64", "A step has 14 rows with 64 triplets, but the devices compute 64 rows at a time: 78% of what they"),
        ("17", "A step has 4 rows with 18 triplets, but the devices compute 64 rows at a time: 94% of what they"),
        ("auto", None),
    ],
)
def test_batches_that_the_devices_cannot_fill_are_warned_of(batch, warning):
    warnings = planner.plan(target("v5e:8x8", **{"train.batch_triplets": batch}), stages=())["warnings"]
    assert len(warnings) == (warning is not None)
    assert not warning or warnings[0].startswith(warning)


@pytest.fixture
def llama(monkeypatch):
    """Llama-3.1-8B's architecture, and few row lengths to try."""
    lengths = lambda config: [config.packing.row_length] if config.packing.row_length else [1280, 2048, 8192]
    monkeypatch.setattr(layouts, "_row_lengths", lengths)
    return hub.load_architecture(str(ROOT / "configs" / "models" / "llama-3.1-8b"))


def test_a_layout_for_the_batch_keeps_the_devices_busy(llama):
    """On 64 chips, 64 triplets fill 3 rows of 8,192 tokens. Shorter rows and a tensor axis are faster."""
    config = dataclasses.replace(target("v5e:8x8").config, packing=PackingConfig(row_length=0))
    topology = tpu.parse_topology("v5e:8x8")
    found = layouts.layouts(config, llama, topology)
    assert {layout.mesh.tensor for layout in found} == {1, 2, 4, 8}  # it has eight key heads
    for layout in found:
        assert abs(layout.triplets / 64 - 1) <= 0.1
    rate = lambda layout: layout.triplets / layout.seconds
    best = found[0]
    assert rate(best) == max(map(rate, found))
    assert best.mesh.tensor > 1
    assert rate(best) > 2 * max(rate(layout) for layout in found if layout.mesh.tensor == 1)
    automatic = dataclasses.replace(config, mesh=MeshConfig(preset="auto"))
    said = []
    resolved = layouts.resolve(automatic, llama, topology, said.append)
    assert said == [f"v5e:8x8: {best}, for steps of about {best.triplets:.0f} triplets."]
    assert resolved.mesh == dataclasses.replace(best.mesh, preset="auto")
    fitted = lowering.target_of(resolved, llama, topology)
    load = workload.assumed(fitted.config, llama, 4096)
    assert planner.rows_of_step(fitted.config, load.triplets_per_row) > 0.7 * fitted.config.packing.rows_per_batch
    sft = dataclasses.replace(automatic, objective=dataclasses.replace(config.objective, loss="sft"))
    assert layouts.resolve(sft, llama, topology, said.append) is sft
    with_option = dataclasses.replace(automatic, mesh=MeshConfig(preset="auto", compiler_options=("a=b",)))
    assert layouts.resolve(with_option, llama, topology, said.append).mesh.compiler_options == ("a=b",)
    with pytest.raises(ValueError, match=r"mesh\.context is 8 and mesh\.preset is auto"):
        layouts.resolve(
            dataclasses.replace(config, mesh=MeshConfig(preset="auto", context=8)), llama, topology, said.append
        )
    # A run that resumes keeps its row length, and finds a mesh for it.
    kept = layouts.resolve(automatic, llama, topology, said.append, begun_with=4096)
    assert kept.packing.row_length == 4096
    with pytest.raises(ValueError, match="rows_per_batch is 3; on v5e:8x8 it must be a multiple of 64 or 32"):
        layouts.layouts(dataclasses.replace(config, packing=PackingConfig(0, 3)), llama, topology)


def test_every_stage_lowers_for_gpus():
    """As far as can be seen without one."""
    one = tpu.parse_topology("v5e:1x1")
    on_gpu = lowering.target_of(run_of({"fsdp": 1}), SMALL, one, jax.devices()[:1], "cuda")
    lowered = [lowering.team_step(on_gpu, "layer", 2), lowering.scoring_pass(on_gpu)]
    lowered += [lowering.prefill(on_gpu), lowering.decode(on_gpu, 512)]
    for program in lowered:
        text = program.as_text()
        assert "stablehlo.dot_general" in text
        assert "tpu_custom_call" not in text
        assert "tpaw_" not in text  # the CPU's kernels


def test_predictions_for_the_devices_at_hand(monkeypatch):
    """They are those of the plan, and of rows with the lengths of the data if those are measured."""
    planned = target("v5e:2x2")
    expected_seconds = planner.plan(planned, stages=["scoring"])["stages"]["scoring"]["predicted s"]
    assert planner.predictions_here(planned.config, SMALL, ["scoring"], str) == {}  # on a CPU
    devices = planned.topology.devices()
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    found = planner.predictions_here(planned.config, SMALL, ["scoring"], str)
    assert found == {"scoring": pytest.approx(expected_seconds)}
    given, assumed, lengths = [], workload.assumed, workload.Lengths(np.full(50, 500), np.full(50, 500))
    monkeypatch.setattr(workload, "assumed", lambda *arguments: given.append(arguments[3]) or assumed(*arguments))
    planner.predictions_here(planned.config, SMALL, ["scoring"], str, lengths)
    assert given == [lengths]
    (knob,) = [knob for knob in tune.knobs_of(planned.config)["step"] if knob.key == "policy.attention_chunks"]
    assert knob.values == [2, 4, 8]


def test_a_layout_for_large_steps_is_the_preset_with_long_rows(llama):
    config = target("v5e:4x4", **{"train.batch_triplets": "auto"}).config
    config = dataclasses.replace(config, packing=PackingConfig(row_length=0))
    best = layouts.layouts(config, llama, tpu.parse_topology("v5e:4x4"))[0]
    assert (best.mesh, best.row_length) == (sharding.PRESETS["v5e-16"], 8192)


def test_slices_that_the_compiler_does_not_know_are_told():
    with pytest.raises(ValueError, match="v5e:3x5: the TPU compiler does not support this slice"):
        tpu.parse_topology("v5e:3x5").devices()
    with pytest.raises(ValueError, match="v4:2x2x1: the compiler reports 8 devices, not 4"):
        tpu.parse_topology("v4:2x2x1").devices()


def test_links_of_a_group_follow_the_torus():
    """An axis of 16 chips is a ring on v5e:16x16; on v5e:4x4 it spans two dimensions that do not wrap."""
    gather = roofline.Collective("all-gather", 16 * 10**9, tuple(range(16)), 1, True)
    for topology, seconds in (("v5e:16x16", 15 / 100), ("v5e:4x4", 15 / 100), ("v5p:4x4x4", 15 / 400)):
        small = target(topology, mesh={"data": -1, "fsdp": 16})
        assert roofline.collective_seconds(gather, small.mesh, small.topology.chip) == pytest.approx(seconds)


def test_devices_of_a_chip_share_its_arithmetic_and_memory_and_are_next_to_each_other_in_a_ring():
    small = target("tpu7x:2x2x2")
    whole, half = small.topology.chip, small.topology.chip.device
    assert (small.topology.chips, small.topology.device_count, small.mesh.size) == (8, 16, 16)
    assert whole.peak_flops == 2 * half.peak_flops
    assert whole.hbm_bytes == 2 * half.hbm_bytes
    assert whole.ici_bandwidth == half.ici_bandwidth
    axis = list(small.mesh.devices[0, :, 0, 0])
    assert tpu.lines(axis) == (2, 2, 2, 2)
    assert all(a.coords == b.coords for a, b in zip(axis[::2], axis[1::2], strict=True))
    on_one_chip = roofline.Collective("reduce-scatter", 12 * 10**9, (0, 1), 1, True)
    assert roofline.collective_seconds(on_one_chip, small.mesh, half) == pytest.approx(6 / 600)


@pytest.mark.parametrize(
    ("remat", "layers", "attention", "head"),
    [("none", 3, 3.5, 3), ("dots", 3, 3.5, 3), ("head", 3, 3.5, 4), ("layer", 4, 4.5, 4)],
)
def test_flops_of_a_step_count_what_is_computed_again(remat, layers, attention, head):
    """Of a model whose layers, attention and head are counted apart."""
    small = target("v5e:2x2")
    load = workload.assumed(small.config, SMALL, 1024)
    per_token = 2 * SMALL.num_layers * (2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 1024)
    computed = load.computed
    by_hand = layers * per_token * 2048 + attention * 4 * 512 * 2 * computed.attended
    by_hand += head * 2 * 512 * 2048 * computed.predictions
    found = expected.step_flops(small, load, remat, 4)
    assert found.executed == pytest.approx(by_hand)  # of a row, since a device has one
    forward, backward = (1 / share - 1 for share in roofline.ATTENTION["v5e"])
    pairs = (attention - 2.5) * forward + 2.5 * backward
    assert found.stalled == pytest.approx(pairs * 4 * 512 * 2 * computed.attended)
    useful = 3 * (per_token * load.row.tokens + 4 * 512 * 2 * load.row.attended + 2 * 512 * 2048 * load.row.predictions)
    assert found.useful == pytest.approx(useful)
    padded = expected.step_flops(small, load, remat, 1)  # one device computes a row, and the others wait for it
    assert (padded.executed, padded.useful) == (found.executed, pytest.approx(useful / 4))


def test_a_stage_takes_as_long_as_the_longest_of_what_overlaps_and_what_is_alone():
    chip = tpu.CHIPS["v5e"]
    over = roofline.Exchange("all-gather", True, 1, 0.5, 4), roofline.Exchange("all-reduce", False, 1, 0.25, 4)
    stage = roofline.Stage(
        0, True, 0, 0, Flops(2 * chip.peak_flops, chip.peak_flops), 1.5 * chip.hbm_bandwidth, over, chip
    )
    assert (
        stage.compute_seconds,
        stage.memory_seconds,
        stage.overlapped_seconds,
        stage.exposed_seconds,
    ) == pytest.approx((2, 1.5, 0.5, 0.25))
    assert stage.seconds == pytest.approx(2.25)
    assert stage.mfu == pytest.approx(1 / 2.25)
    assert stage.bottleneck == "compute"
    assert stage._replace(traffic=3 * chip.hbm_bandwidth).bottleneck == "memory"
    assert stage._replace(flops=Flops(0.1 * chip.peak_flops, 0), traffic=0).bottleneck == "interconnect"


def test_hours_are_those_of_steps_passes_and_tokens():
    """Made-up stages of a second each: a run's seconds are how often they run."""
    small = target("v5e:2x2")
    load = workload.assumed(small.config, SMALL, 4096)
    chip = small.topology.chip
    second = roofline.Stage(0, True, 0, 0, Flops(chip.peak_flops, chip.peak_flops), 1, (), chip)
    found = planner.hours(small, load, dict.fromkeys(planner.STAGES, second))
    rows = [planner.rows_of_step(small.config, r.triplets_per_row) for r in load.rounds]
    assert rows[0] > rows[1] > rows[2] == rows[3] == 14  # later rounds have more triplets in a row
    batches = [2 * -(-r.rows // n) * -(-n // 4) for r, n in zip(load.rounds, rows, strict=True)]
    assert found["training h"] * 3600 == pytest.approx(sum(batches) / 4, rel=0.01)  # the stage has 4 batches of 4 rows
    passes = sum(-(-r.scored_rows // 4) for r in load.rounds)
    assert found["scoring h"] * 3600 == pytest.approx(passes, rel=0.01)
    decoded = load.new_tokens / (16 * planner.SLOTS_BUSY) / planner.STEPS_PER_CHUNK  # chunks of steps of 16 slots
    prefilled = load.prompt_tokens / (4 * 2048)
    assert found["sampling h"] * 3600 == pytest.approx(4 * (decoded + prefilled), rel=0.01)


def test_a_calibration_scales_the_predicted_times():
    small = target("v5e:2x2")
    plain = planner.plan(small, stages=("prefill",))["stages"]["prefill"]
    scaled = planner.plan(small, stages=("prefill",), calibration={"prefill": 1.5, "step": 9.0})["stages"]["prefill"]
    assert scaled["predicted s"] == pytest.approx(1.5 * plain["predicted s"])
    assert scaled["predicted MFU"] == pytest.approx(plain["predicted MFU"] / 1.5)
    assert scaled["predicted compute s"] == plain["predicted compute s"]
    assert scaled["calibration"] == 1.5
    assert "calibration" not in plain


def test_a_search_needs_the_step():
    with pytest.raises(ValueError, match="name step among --stages"):
        planner.plan(target("v5e:2x2"), stages=("scoring",), search=True)


def test_rows_that_do_not_divide_are_told_as_the_run_tells_them():
    with pytest.raises(ValueError, match=r"packing\.rows_per_batch is 6; it must be a multiple of the 4 devices"):
        target("v5e:2x2", **{"packing.rows_per_batch": 6})


def test_assumed_rounds_grow_to_the_team_and_stay():
    run = target("v5e:2x2").config
    load = workload.assumed(run, SMALL, 4096)
    rows = [r.rows for r in load.rounds]
    assert len(rows) == 4
    assert rows[0] < rows[1] < rows[2] == rows[3]
    assert 0.8 < load.fill <= 1
    assert load.computed.tokens == 2048
    assert load.row.attended < load.computed.attended < 2.1 * load.row.attended


def test_the_configurations_for_pods_are_the_papers():
    for name, model, parameters in (
        ("llama31_8b_ultrachat", "llama-3.1-8b", 8.03e9),
        ("qwen25_1b5_ultrachat", "qwen2.5-1.5b", 1.54e9),
    ):
        run = config_file.load(ROOT / "configs" / f"{name}.yaml")
        assert (run.rounds, run.data.max_prompts, run.objective.n_max) == (4, 50_000, 3)
        fields = json.loads((ROOT / "configs" / "models" / model / "config.json").read_text())
        shapes = hub.param_shapes(config_json.from_dict(fields, model))
        assert sum(np.prod(s) for s in shapes.values()) == pytest.approx(parameters, rel=0.01)


@pytest.mark.parametrize(
    ("model", "billions"),
    [
        ("qwen3-8b", 8.19),
        ("qwen3-30b-a3b", 30.53),
        ("mixtral-8x7b", 46.70),
        ("gemma-3-4b", 3.88),
        ("gemma-3-12b", 11.77),
        ("gemma-4-31b", 30.70),
        ("gemma-4-26b-a4b", 25.23),
        ("llama-3.1-70b", 70.55),
    ],
)
def test_the_architectures_to_plan_for_have_the_published_numbers_of_parameters(model, billions):
    shapes = hub.param_shapes(hub.load_architecture(ROOT / "configs" / "models" / model))
    assert sum(np.prod(s) for s in shapes.values()) / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize(
    ("name", "topologies", "stages", "chips"),
    [
        pytest.param("llama31_8b_ultrachat", "v5e:2x2,v5e:2x4", "prefill,decode", [4, 8], marks=SIMILAR),
        ("qwen25_1b5_gsm8k", "v5e:2x2,v5e:2x4", "prefill", [4, 8]),
    ],
)
def test_the_command_plans_without_weights(tmp_path, name, topologies, stages, chips):
    (tmp_path / "config.json").write_text(json.dumps(config_json.to_dict(SMALL, "bfloat16")))
    out = tmp_path / "plan.json"
    arguments = ["--config", str(ROOT / "configs" / f"{name}.yaml"), "--architecture", str(tmp_path)]
    arguments += ["--topology", topologies, "--stages", stages, "--json", str(out)]
    command = forked.start(
        cli.main,
        ["plan", *arguments, "--sampling.tensor", "2"],
        output=tmp_path / "printed",
        jax_optimization_level="O0",
    )
    code, printed, errors = command.finish()
    assert code == 0, errors[-2000:]
    assert [plan["chips"] for plan in json.loads(out.read_text())] == chips
    last = stages.split(",")[-1]
    assert (f"{last}: peak GiB" in printed) == (len(chips) > 1)  # the comparison


def test_an_unknown_stage_is_told(capsys):
    arguments = ["--config", str(DEMO / "demo.yaml"), "--topology", "v5e:2x2", "--stages", "stepp"]
    assert cli.main(["plan", *arguments, "--policy.path", str(STORIES)]) == 2
    assert "there is no stage 'stepp'. The stages are step, scoring, prefill, decode" in capsys.readouterr().err
