"""Plans: every stage of a small model compiled for TPU slices that are not here, against counts by hand."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT, STORIES

from tpaw_jax import config, lowering, planning, roofline, tpu, workload
from tpaw_jax.models import ModelConfig, config_json, hub
from tpaw_jax.roofline import Flops

SMALL = ModelConfig("llama", 2048, 512, 1024, 2, 4, 2, 128, 10000.0, 1e-5, 8192, False)
TIED = dataclasses.replace(SMALL, tie_embeddings=True, model_type="qwen2", qkv_bias=True)


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    """The compiler's least effort: what it schedules differs, what it computes and exchanges does not.

    A program for a TPU that is not here cannot be read back from the compilation cache.
    """
    os.environ.update({name: value for name, value in tpu.QUIET.items() if name not in os.environ})
    wanted = {"jax_exec_time_optimization_effort": -1.0, "jax_enable_compilation_cache": False}
    before = {name: getattr(jax.config, name) for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def target(topology, model=SMALL, mesh=None, **overrides):
    settings = {
        "policy.path": "unused",
        "data.sources": "[{path: unused}]",
        "packing.row_length": 2048,
        "sampling.slots": 16,
    }
    settings |= overrides | {f"mesh.{axis}": size for axis, size in (mesh or {}).items()}
    run = config.load(ROOT / "configs" / "qwen25_1b5_ultrachat.yaml", [f"{k}={v}" for k, v in settings.items()])
    return lowering.target_of(run, model, tpu.parse_topology(topology))


def exchanged(record):
    """GiB of each kind of collective, in any way."""
    found = {}
    for e in record["exchanges"]:
        found[e["kind"]] = found.get(e["kind"], 0) + e["GiB"]
    return found


@pytest.mark.parametrize(
    ("topology", "model", "mesh", "reduce_dtype"),
    [
        ("v5e:2x2", SMALL, None, "float32"),  # fsdp alone
        ("v5e:2x2", TIED, {"data": 2, "fsdp": 2}, "bfloat16"),
        ("v5e:2x2", SMALL, {"data": 1, "fsdp": 2, "tensor": 2}, "float32"),
        ("2 x v5e:2x2", SMALL, None, "float32"),  # data over slices
    ],
)
def test_a_step_and_a_scoring_pass_exchange_what_the_design_says(topology, model, mesh, reduce_dtype):
    planned = target(topology, model, mesh, **{"train.reduce_dtype": reduce_dtype})
    plan = planning.plan(planned, stages=("step", "scoring"))
    assert plan["warnings"] == []
    for record in plan["stages"].values():
        assert record["fits"]
        found, expected = exchanged(record), record["by hand GiB"]
        assert set(expected) <= set(found)
        for kind in found:  # reduce-scatters of odd sizes are padded, norms and scalars are not in the count
            assert found[kind] == pytest.approx(expected.get(kind, 0), rel=0.1, abs=1e-4), (kind, found, expected)


def test_no_logits_are_gathered_and_no_table_more_than_once():
    record = planning.plan(target("v5e:2x2"), stages=("scoring",))["stages"]["scoring"]
    table = SMALL.vocab_size * SMALL.hidden_size * 2 / 2**30
    layers = sum(
        np.prod(shape) * 2 / 2**30 for name, shape in hub.param_shapes(SMALL).items() if name.endswith("kernel")
    )
    assert exchanged(record)["all-gather"] < 1.02 * (table + layers)


@pytest.mark.parametrize("tensor", [1, 2])
def test_sampling_exchanges_only_over_tensor(tensor):
    plan = planning.plan(target("v5e:2x2", **{"sampling.tensor": tensor}), stages=("prefill", "decode"))
    for record in plan["stages"].values():
        if tensor == 1:
            assert record["exchanges"] == []
        else:
            found = exchanged(record)
            assert set(found) == set(record["by hand GiB"]) == {"all-reduce", "all-gather"}
            for kind, size in record["by hand GiB"].items():
                assert found[kind] == pytest.approx(size, rel=0.1)


def test_a_whole_plan_is_json_with_hours_and_tables():
    plan = planning.plan(target("v5e:2x2"), prompts=2000)
    again = json.loads(json.dumps(plan))
    run = again["predicted run"]
    assert run["hours"] == pytest.approx(run["sampling h"] + run["scoring h"] + run["training h"])
    assert run["chip-hours"] == pytest.approx(4 * run["hours"])
    assert run["padded pairs, hours"] > run["hours"]
    text = planning.text(plan)
    for words in ("predicted MFU", "all-gather GiB, by hand", "fsdp 4", "padded pairs"):
        assert words in text
    assert "v5e:2x2" in planning.comparison([plan, plan])


def test_the_largest_batch_is_the_last_that_fits(monkeypatch):
    """The search against a compiler whose programs need 2 GiB and 1.5 GiB for each 2048 tokens of a device."""
    asked = []

    def compiled(lowered, mesh, chip, flops):
        tokens = lowered.packing.rows_per_batch / mesh.size * lowered.packing.row_length
        asked.append(tokens)
        return roofline.Stage(0, True, (2 + 1.5 * tokens / 2048) * 2**30, 0, flops, 0, (), chip)

    monkeypatch.setattr(lowering, "team_step", lambda wanted, remat, micro_batches: wanted.config)
    monkeypatch.setattr(roofline, "compile_stage", compiled)
    small = target("v5e:2x2")
    found = planning.largest(small, "layer", lambda line: None)
    assert found == {"most rows a device": 9, "longest row": 16384}  # of 15.75 GiB
    assert 9 * 2048 in asked


def test_a_program_that_does_not_fit_is_reported_with_what_it_needs():
    class Refused:
        def compile(self):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
                "Used 15.82G of 15.75G hbm. Exceeded hbm capacity by 74.5M."
            )

    small = target("v5e:2x2")
    stage = roofline.compile_stage(Refused(), small.mesh, small.topology.chip, Flops(1.0, 1.0))
    assert not stage.fits
    assert stage.peak == pytest.approx(15.82 * 2**30)
    assert "predicted s" not in roofline.record(stage)


def test_steps_of_many_more_triplets_than_asked_for_are_warned_of():
    warnings = planning.plan(target("v5e:8x8"), stages=())["warnings"]
    assert len(warnings) == 1
    assert "train.batch_triplets asks for 64" in warnings[0]


def test_slices_that_the_compiler_does_not_know_are_told():
    with pytest.raises(ValueError, match="v5e:3x5: the TPU compiler knows no such slice"):
        tpu.parse_topology("v5e:3x5").devices()
    with pytest.raises(ValueError, match="v4:2x2x1: the compiler sees 8 devices in 4 chips"):
        tpu.parse_topology("v4:2x2x1").devices()


def test_links_of_a_group_follow_the_torus():
    """An axis of 16 chips is a ring on v5e:16x16; on v5e:4x4 it spans two dimensions that do not wrap."""
    gather = roofline.Collective("all-gather", 16 * 10**9, tuple(range(16)), 1, True)
    for topology, seconds in (("v5e:16x16", 15 / 100), ("v5e:4x4", 15 / 100), ("v5p:4x4x4", 15 / 400)):
        small = target(topology, mesh={"data": -1, "fsdp": 16})
        assert roofline.collective_seconds(gather, small.mesh, small.topology.chip) == pytest.approx(seconds)


def test_assumed_rounds_grow_to_the_team_and_stay():
    run = target("v5e:2x2").config
    load = workload.assumed(run, SMALL, 4096)
    rows = [r.rows for r in load.rounds]
    assert len(rows) == 4
    assert rows[0] < rows[1] < rows[2] == rows[3]
    assert 0.8 < load.fill <= 1
    assert 0 < load.blocks < 1
    assert load.computed.tokens == 2048
    assert load.row.pairs < load.computed.pairs


def test_the_configurations_for_pods_are_the_papers():
    for name, model, parameters in (
        ("llama31_8b_ultrachat", "llama-3.1-8b", 8.03e9),
        ("qwen25_1b5_ultrachat", "qwen2.5-1.5b", 1.54e9),
    ):
        run = config.load(ROOT / "configs" / f"{name}.yaml")
        assert (run.rounds, run.data.max_prompts, run.objective.n_max) == (4, 50_000, 3)
        fields = json.loads((ROOT / "configs" / "models" / model / "config.json").read_text())
        shapes = hub.param_shapes(config_json.from_dict(fields, model))
        assert sum(np.prod(s) for s in shapes.values()) == pytest.approx(parameters, rel=0.01)


def test_the_command_plans_without_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_json.to_dict(SMALL, "bfloat16")))
    out = tmp_path / "plan.json"
    arguments = ["--config", str(ROOT / "configs" / "llama31_8b_ultrachat.yaml"), "--architecture", str(tmp_path)]
    arguments += ["--topology", "v5e:2x2,v5e:2x4", "--stages", "prefill,decode", "--json", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "tpaw_jax.cli", "plan", *arguments, "--sampling.tensor", "2"],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1.0"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [plan["chips"] for plan in json.loads(out.read_text())] == [4, 8]
    assert "decode: peak GiB" in done.stdout  # the comparison


def test_an_unknown_stage_is_told(capsys):
    from tpaw_jax import cli

    arguments = ["--config", str(ROOT / "configs" / "demo.yaml"), "--topology", "v5e:2x2", "--stages", "stepp"]
    assert cli.main(["plan", *arguments, "--policy.path", str(STORIES)]) == 2
    assert "there is no stage 'stepp'; known are step, scoring, prefill, decode" in capsys.readouterr().err
