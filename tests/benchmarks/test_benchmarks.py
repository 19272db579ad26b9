"""Every benchmark runs, on a model so small that its figures mean nothing, and prints what the report reads."""

import json
import os

import forked
import pytest
from conftest import DEMO, ROOT, STORIES

TINY = ["--model", "tiny"]
RUNS = {  # script: arguments, and the benchmarks of its lines
    "team_step.py": ([*TINY, "--row-length", "512", "--repeats", "2"], ["team_step"]),
    "scoring.py": (
        [*TINY, "--row-length", "512", "--batches-at-once", "1", "2", "--prompts", "8", "--repeats", "1"],
        ["scoring", "scoring", "scoring_from_the_ring"],
    ),
    "adapters.py": (
        [*TINY, "--row-length", "512", "--prompts", "4", "--repeats", "1"],
        [*["adapters_step"] * 3, "adapters_scoring"],
    ),
    "adapters_rounds.py": (
        ["--config", str(DEMO / "demo.yaml"), "--data.max_prompts", "12", "--policy.path", str(STORIES)],
        [*["adapters_rounds_search"] * 8, *["adapters_rounds"] * 9],
    ),
    "trees_vs_pairs.py": (
        [*TINY, "--prompts", "4", "--repeats", "1"],
        ["trees_vs_pairs_loss", *["trees_vs_pairs_turn"] * 4, "trees_vs_pairs"],
    ),
    "durability.py": (
        [*TINY, "--steps", "2", "--row-length", "512", "--rows", "1", "--repeats", "1"],
        ["durability"],
    ),
    "tree_attention.py": (
        ["--trees", "12", "--row-length", "2048", "--topology", "v5e:2x2"],
        ["tree_attention_parity", "tree_attention_pairs", "tree_attention_compile"],
    ),
    "data_scale.py": (["--records", "60", "--hosts", "1", "2"], ["data_scale", "data_scale"]),
    "cache_dtype.py": (["--config", str(DEMO / "demo.yaml"), "--prompts", "4"], ["cache_dtype"]),
    "memory.py": (
        [*TINY, "--row-length", "512", "--policies", "layer", "--budget-gib", "0.02", "--longest", "2048"],
        ["memory_step", "memory_head", "memory_head", "memory_longest_row"],
    ),
}


def run(output, script, *arguments):
    """The JSON lines of a benchmark, from the file `output`."""
    path = ROOT / "benchmarks" / script
    code, printed, errors = forked.start(forked.run_script, path, *arguments, output=output).finish()
    assert code == 0, errors[-3000:]
    return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]


LONG = pytest.mark.skipif(
    "TPAW_ALL_TESTS" not in os.environ, reason="minutes of compiling for a script that computes what other tests test"
)
"""Of `BESIDE`."""

BESIDE = ("adapters.py", "adapters_rounds.py", "memory.py", "trees_vs_pairs.py")
"""Scripts whose parts are tested in test_memory.py, test_logprobs.py, test_train_step.py and test_adapter_run.py."""


@pytest.mark.parametrize("script", [pytest.param(s, marks=LONG) if s in BESIDE else s for s in RUNS])
def test_a_benchmark_prints_its_lines(tmp_path, script):
    arguments, names = RUNS[script]
    lines = run(tmp_path / "lines", script, *arguments)
    assert [line["benchmark"] for line in lines] == names
    for line in lines:
        if line["benchmark"] == "trees_vs_pairs_loss":
            assert line["relative_difference"] < 1e-5
        elif line["benchmark"] == "trees_vs_pairs_turn":
            assert line["system_seconds"] >= 0
            assert line["seconds"] > 0
        elif line["benchmark"] == "tree_attention_pairs":
            assert 1 < line["pairs_computed_over_pairs_seen"] < 2.1
        elif line["benchmark"] == "tree_attention_compile":
            assert 0 < line["peak_gib"] < 1
        elif line["benchmark"] == "cache_dtype":
            assert line["tokens_compared"] > 10
            assert 0 < line["mean_gap"] < line["largest_gap"] < 0.1
        else:
            assert line["machine"]["backend"] == "cpu"
        if line["benchmark"] == "tree_attention_parity":
            assert max(line["largest_relative_error"].values()) < 1e-5
        if line["benchmark"] == "data_scale":
            assert (line["records"], line["prompts"], line["rows"]) == (
                60,
                60 - 32,
                lines[0]["rows"],
            )  # the demo holds 32 out
            assert all(seconds > 0 for seconds in line["seconds"].values())
        if line["benchmark"] == "durability":
            assert line["ratio_at_defaults"] == pytest.approx(
                1 + line["seconds_of_a_save"]["median"] / line["seconds_between_saves"], abs=1e-3
            )
        if line["benchmark"] == "memory_step":
            assert 0.95 < line["ratio"] < 1.05
        if line["benchmark"] == "memory_head":
            assert line["full_gib"] > 3 * line["chunked_gib"]
        if line["benchmark"] == "memory_longest_row":
            assert line["row_length"] in (1024, 2048)


def test_a_host_whose_disk_is_full_ends_the_other(tmp_path):
    (line,) = run(tmp_path / "lines", "failing_hosts.py", "--case", "disk:1", "--timeout", "10")
    assert line["codes"] == [2, 2]
    assert line["rounds"] == 0
    said = "sampled_0001.part could not be written: the disk is full."
    assert line["said"][0][-1].startswith("tpaw: Process 1 of 2 (host ")
    assert all(said in sentences[-1] for sentences in line["said"])


def test_the_benchmark_of_a_round_accounts_for_all_its_time(tmp_path):
    tiny = {
        "rounds": 2,
        "policy.path": STORIES,
        "data.sources": f"[{{path: {DEMO / 'tinystories.jsonl'}}}]",
        "data.max_prompts": 12,
        "data.holdout_prompts": 4,
        "sampling.max_new_tokens": 8,
    }
    options = [word for key, value in tiny.items() for word in (f"--{key}", str(value))]
    lines = run(tmp_path / "lines", "round.py", "--config", str(DEMO / "demo.yaml"), *options)
    lines = [line for line in lines if line.get("benchmark") == "round"]
    assert [line["round"] for line in lines] == [0, 1]
    for line in lines:
        assert sum(line["share_of"].values()) == pytest.approx(1, abs=0.01)
        assert all(share >= 0 for share in line["share_of"].values())
    assert lines[0]["compile_seconds"] > lines[1]["compile_seconds"] >= 0


@LONG
def test_our_sides_of_the_peer_comparisons_run(tmp_path):
    lines = run(
        tmp_path / "lines",
        "sampling.py",
        *TINY,
        *["--batch", "4", "--dtype", "float32", "--requests", "8", "--repeats", "1", "--only", "tpaw_jax"],
    )
    assert [(line["benchmark"], line["contender"]) for line in lines] == [("sampling", "tpaw_jax")]
    assert 0 < lines[0]["slots_busy"] <= 1
    lines = run(tmp_path / "lines", "peers.py", "--prompts", "4", "--repeats", "1", "--only", "tpaw_jax")
    assert [line["benchmark"] for line in lines] == ["peers", "peers_summary"]
    assert lines[0]["triplets"] == 12
    assert lines[0]["triplets_per_second"] < lines[0]["triplets_per_second_in_steps"]
