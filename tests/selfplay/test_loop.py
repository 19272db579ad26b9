"""Whole runs: three rounds, what they leave behind, what they compile, and being killed in every stage."""

import dataclasses
import json
import os
import signal

import forked
import jax
import killed_run
import numpy as np
import pytest
import torch
import transformers
import yaml
from conftest import DEMO, SHARED_PROGRAMS, small_run

from tpaw_jax import cli
from tpaw_jax.config import MeshConfig, PackingConfig
from tpaw_jax.data import packing
from tpaw_jax.generation.policy import open_policy
from tpaw_jax.observe import metrics
from tpaw_jax.observe.profiling import compile_log
from tpaw_jax.runtime import preemption, sharding
from tpaw_jax.selfplay import loop, round_store, round_summary, round_training
from tpaw_jax.storage import bucket, journal, ring
from tpaw_jax.training import batch_shapes

# Each (program, times, why) of a three-round run; anything else is a leak.
PROGRAMS = {
    "jit(prefill)": 1,  # one bucket of prompt lengths
    "jit(admit)": 1,  # one number of slots and pages
    "jit(decode)": 1,  # all rounds
    "jit(log_probs)": 1,  # every player, every round, held-out prompts
    "jit(step)": 1,  # every round, and the dry run that measures noise
}
SMALL_PROGRAMS = 16
"""Casts, placements and the like that make up no stage, and digests of two kinds of trees; one more is a leak too."""


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """One three-round run on one device, what it said, and what it compiled."""
    directory, said = tmp_path_factory.mktemp("run"), []
    SHARED_PROGRAMS.clear()
    with pytest.MonkeyPatch.context() as patch, compile_log() as compiled:
        patch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
        table = loop.play(small_run(directory), said.append)
    return directory, table, "\n".join(said), compiled


def test_each_round_has_its_players_opponents_and_data(played):
    directory, table, said, _ = played
    assert [row["players"] for row in table] == [1, 2, 3]
    assert [row["triplets"] for row in table] == [12, 24, 36]
    for t, (players, opponents) in enumerate(
        [("theta_0", "D_0"), ("theta_1, theta_0", "D_1, D_0"), ("theta_2, theta_1, theta_0", "D_2, D_1, D_0")]
    ):
        manifest = said.split(f"Round {t} of 3")[1]
        assert f"players          {players}\n" in manifest
        assert f"opponents        {opponents}\n" in manifest
    assert sorted(p.name for p in (directory / "ring" / "policies").iterdir()) == ["00001", "00002", "00003"]


def test_the_newest_players_reward_is_zero_at_a_rounds_first_step(played):
    directory, table, _, _ = played
    for t, row in enumerate(table):
        first = metrics.read_metrics(directory, t)[0]
        assert first["newest_max_abs_reward"] <= 2 * row["P_t at step 0"] + 1e-6
        assert first[f"player_{t}/alpha_is_eta"] == 1.0


def test_a_round_tells_what_it_should_cost_and_what_it_did(played):
    directory, table, said, _ = played
    for t, row in enumerate(table):
        of_round = said.split(f"Round {t} of 3")[1]
        assert "Expected: " in of_round
        models = "1 reference model" if t == 0 else f"{t + 1} reference models"
        assert f"Padded pairs with {models} in each step need {row['saving']:.1f} x as much" in of_round
        assert row["saving"] == pytest.approx(row["TFLOP in pairs"] / row["TFLOP"])
        seconds = json.loads((directory / f"round_{t:04d}" / "timings.json").read_text())
        stages = {"sampling", "packing", "scoring", "held-out", "dry run", "training", "saving", "other"}
        stages |= {"compiling", "input wait", "restoring", "lost steps"} | ({"startup"} if t == 0 else set())
        assert stages == set(seconds) - {"round"}
        assert sum(seconds[s] for s in stages) <= seconds["round"]
        shares = [row["goodput"], *(value for name, value in row.items() if name.startswith("badput/"))]
        assert all(0 <= share < 1 for share in shares)
        assert row["goodput"] > 0
        assert sum(shares) == pytest.approx(1)
        assert (row["badput/training_prep"] > 0) == (t == 0)  # one process played all rounds
        assert row["badput/program_startup"] > 0
    assert table[2]["saving"] > table[0]["saving"]


def test_a_run_that_chooses_its_rematerialization_and_rows(tmp_path, monkeypatch):
    """`remat: auto` compiles the step once and uses it; rows_per_batch 0 is resolved when the run begins and kept."""
    said = []
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
    settings = {"policy.remat": "auto", "packing.rows_per_batch": 0, "rounds": 1}
    with compile_log() as compiled:
        loop.play(small_run(tmp_path, **settings), said.append)
    assert [name for name, _ in compiled].count("jit(step)") == 1
    assert "Rematerialization `none`: a step needs " in "\n".join(said)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["packing"]["rows_per_batch"] == 1
    two = sharding.make_mesh(MeshConfig(fsdp=2), jax.local_devices()[:2])
    before = journal.open_journal(tmp_path).config["packing"]
    with pytest.raises(ValueError, match=r"rows_per_batch is 1; it must be a multiple of the 2 devices"):
        batch_shapes.resolve_packing(small_run(tmp_path, **settings), two, before)
    assert batch_shapes.resolve_packing(small_run(tmp_path, **settings), two).rows_per_batch == 2


def test_a_batch_of_auto_scales_the_learning_rate(tmp_path, monkeypatch):
    """A step is one batch of rows; the rate is scaled by the square root of its triplets over SPIN's 64."""
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
    said, settings = [], {"rounds": 1, "train.batch_triplets": "auto", "train.learning_rate": 1e-4}
    loop.play(small_run(tmp_path, **settings, **{"train.warmup_ratio": 0, "train.schedule": "constant"}), said.append)
    steps = metrics.read_metrics(tmp_path, 0)
    mean = np.mean([step["triplets"] for step in steps[:-1]])
    rates = {step["learning_rate"] for step in steps}
    assert len(rates) == 1
    assert rates.pop() == pytest.approx(1e-4 * (mean / 64) ** 0.5, rel=0.2)  # the last step of an epoch has less
    assert any(line.startswith("Round 0: steps of ") and "train.batch_triplets is auto" in line for line in said)


def test_steps_that_leave_devices_idle_are_warned_of(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
    said, settings = [], {"rounds": 1, "train.batch_triplets": 1, "packing.rows_per_batch": 4}
    loop.play(small_run(tmp_path, **settings), said.append)
    (warning,) = (line for line in said if "of what they compute is padding" in line)
    assert "has 1 rows, but the devices compute 4 rows at a time: 75%" in warning


def test_metrics_carry_the_names_people_know(played):
    records = metrics.read_metrics(played[0], 2)
    assert {
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
        "grad_norm",
        "learning_rate",
        "beta_entropy",
        "lengths/chosen",
        "lengths/rejected",
        "tokens_per_second",
        "triplets_per_second",
        "input_wait_share",
        "player_0/reward_target",
        "player_1/margin",
        "player_2/beta",
        "player_2/alpha_is_eta",
    } <= records[0].keys()
    assert [r["step"] for r in records] == list(range(len(records)))
    assert not any(name.startswith("player_1") for name in metrics.read_metrics(played[0], 0)[0])
    for r in records:
        np.testing.assert_allclose(sum(r[f"player_{j}/beta"] for j in range(3)), 1, rtol=1e-5)


def test_every_program_is_compiled_once(played):
    names = [name for name, _ in played[3]]
    for program, times in PROGRAMS.items():
        assert names.count(program) == times, (program, names)
    assert len([name for name in names if name not in PROGRAMS]) <= SMALL_PROGRAMS, names


def test_each_response_is_scored_once_per_player(played):
    for t in range(3):
        scored = {}
        for path in sorted(played[0].glob(f"round_*/scores_of_player_{t:04d}.npz")):
            arrays = np.load(path)
            for key in zip(arrays["prompt_index"].tolist(), arrays["source"].tolist(), strict=True):
                scored[key] = scored.get(key, 0) + 1
        assert set(scored.values()) == {1}


def test_a_finished_run_is_left_alone_and_can_be_prolonged(played, tmp_path):
    import shutil

    directory = tmp_path / "copy"
    shutil.copytree(played[0], directory)
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
        assert loop.play(small_run(directory), said.append) == played[1]
        assert not any("sampling" in line for line in said[:-1])
        with pytest.raises(ValueError, match=r"objective.eta was 6.0, is 1.0"):
            loop.play(small_run(directory, **{"objective.eta": 1}), said.append)
        opened = journal.open_journal(directory)
        journal.save(dataclasses.replace(opened, data_fingerprint="of other data"))
        with pytest.raises(ValueError, match="the run began with other prompts and targets"):
            loop.play(small_run(directory), said.append)
        journal.save(opened)
        longer = loop.play(small_run(directory, rounds=4), said.append)
    assert [row["players"] for row in longer] == [1, 2, 3, 3]
    assert ring.open_ring(journal.open_journal(directory), 3).policies == [2, 3, 4]


def test_the_export_is_loaded_by_transformers_and_generates_our_tokens(played, tmp_path, capsys):
    out = tmp_path / "exported"
    assert cli.main(["export", "--run", str(played[0]), "--out", str(out)]) == 0
    assert "The policy of round 3" in capsys.readouterr().out
    model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    prompt = torch.tensor([[1, *tokenizer.encode("Once upon a time", add_special_tokens=False)]])
    theirs = model.generate(prompt, do_sample=False, max_new_tokens=16)[0, prompt.shape[1] :].tolist()

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "Once upon a time", "completion": "there was"}) + "\n")
    config, made = DEMO / "demo.yaml", tmp_path / "made.jsonl"
    options = ["--data.sources", f"[{{path: {prompts}}}]", "--data.holdout_prompts", "0", "--data.max_prompts", "0"]
    options += ["--sampling.temperature", "0", "--sampling.max_new_tokens", "16", "--model", str(out)]
    assert cli.main(["generate", "--config", str(config), "--out", str(made), *options]) == 0
    assert json.loads(made.read_text())["token_ids"] == theirs


def test_ten_steps_in_a_row_that_are_not_finite_stop_the_run(tmp_path, monkeypatch):
    def poisoned(*arguments):
        scores = original(*arguments)
        return scores.replace(log_probs=scores.log_probs * np.float32(np.inf))

    original = round_store.team_scores
    monkeypatch.setattr(round_store, "team_scores", poisoned)
    settings = {"train.max_skipped_in_a_row": 3, "mesh.fsdp": 1, "objective.tolerance": 0, "report_to": "[tensorboard]"}
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
    with pytest.raises(FloatingPointError, match="not finite in 3 steps in a row") as caught:
        loop.play(small_run(tmp_path, **settings), lambda _: None)
    saved = str(caught.value).split("saved in ")[1].split(". ")[0]
    assert {"tokens", "labels", "log_probs"} <= set(np.load(saved).files)
    (events,) = (tmp_path / "tensorboard").iterdir()
    steps = len((tmp_path / "metrics.jsonl").read_text().splitlines())  # those that led to the stop are there to see
    assert events.read_bytes().count(b"train/skipped_in_a_row") == steps >= 2


ON_DISK, IN_BUCKET = ("sampling", "sampled", "scoring", "training"), ("keeping", "scored", "saving", "pushing")


def places(some):
    """Where runs are killed: everywhere in `make test-all`, else in some of the stages."""
    assert {*ON_DISK, *IN_BUCKET} == {*killed_run.PLACES}
    return killed_run.PLACES if "TPAW_ALL_TESTS" in os.environ else some


def play_in_bucket(directory, log, environment, *place_and_signal):
    child = forked.start(killed_run.play, directory, *place_and_signal, output=log, environment=environment)
    code, output, errors = child.finish()
    return code, output + errors


def play(directory, *place_and_signal):
    """Play the run of killed_run.py in a process of its own; its exit code and what it printed."""
    child = forked.start(killed_run.play, directory, *place_and_signal, output=directory.with_suffix(".log"))
    code, output, errors = child.finish()
    return code, output + errors


def results(directory):
    """What must not depend on kills: metrics, scores, generations, table without timings, final parameters."""
    timings = ("tokens_per_second", "triplets_per_second", "input_wait_share")
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    found = {"metrics": [{k: v for k, v in line.items() if k not in timings} for line in lines]}
    for path in sorted(directory.glob("round_*/*.npz")):
        arrays = np.load(path)
        found[str(path.relative_to(directory))] = {name: arrays[name].tolist() for name in arrays.files}
    is_timing = lambda name: name.endswith((" s", "/s")) or name.startswith(("goodput", "badput"))
    rows = round_summary.read_all(directory, 3)
    found["table"] = [{name: value for name, value in row.items() if not is_timing(name)} for row in rows]
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The directory of a run that is never stopped."""
    directory = tmp_path_factory.mktemp("undisturbed")
    assert play(directory)[0] == 0
    return directory


def test_a_run_killed_in_its_stages_ends_as_the_undisturbed_one(tmp_path, undisturbed):
    for place in places(ON_DISK):  # one run, killed and started again in every stage
        code, output = play(tmp_path / "killed", place)
        assert code == -signal.SIGKILL, (place, output[-2000:])
    assert_same_as(undisturbed, tmp_path / "killed")
    timings = [json.loads(path.read_text()) for path in sorted((tmp_path / "killed").glob("round_*/timings.json"))]
    assert "startup" in timings[0]
    assert max(seconds["lost steps"] for seconds in timings) > 0
    assert max(seconds["restoring"] for seconds in timings) > 0


def test_a_run_told_to_stop_goes_on_to_the_same_end(tmp_path, undisturbed):
    for place, where in (("sampling", "sampling stopped"), ("training", "training stopped after step 5 of")):
        code, output = play(tmp_path / "stopped", place, signal.SIGTERM)
        assert code == preemption.EXIT_CODE, (place, output[-2000:])
        assert where in output
        assert "run the same command to resume there" in output
    assert_same_as(undisturbed, tmp_path / "stopped")


def test_a_run_in_a_bucket_killed_in_its_stages_ends_as_one_on_a_disk(tmp_path, undisturbed, in_bucket, cloud):
    log = tmp_path / "log"
    for place in places(IN_BUCKET):
        code, output = play_in_bucket(in_bucket, log, cloud, place)
        assert code == -signal.SIGKILL, (place, output[-2000:])
    code, output = play_in_bucket(in_bucket, log, cloud)
    assert code == 0, output[-2000:]
    assert not (in_bucket / ".held").exists()
    for name in bucket.sizes(in_bucket):
        path = tmp_path / "downloaded" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((in_bucket / name).read_bytes())
    assert_same_as(undisturbed, tmp_path / "downloaded")


def assert_same_as(undisturbed, disturbed):
    code, output = play(disturbed)
    assert code == 0, output[-2000:]
    whole, killed = results(undisturbed), results(disturbed)
    assert killed.keys() == whole.keys()
    for name, value in whole.items():
        if name.endswith("generations.npz"):
            # The sampler's log-probs are a health figure that nothing is made of. They come from batches of whatever
            # was being sampled, so their last bits are those of the company; tokens are the same.
            pair = killed[name].pop("log_probs"), value.pop("log_probs")
            np.testing.assert_allclose(*pair, atol=1e-5)
        assert killed[name] == value, name
    like = open_policy(small_run(undisturbed), sharding.make_mesh(small_run("x").mesh, jax.devices()[:1]))
    rings = [ring.open_ring(journal.open_journal(run), 3) for run in (undisturbed, disturbed)]
    policies = [ring.restore_policy(kept, 3, like.params) for kept in rings]
    jax.tree.map(np.testing.assert_array_equal, *policies)


def test_a_configuration_that_cannot_be_opened_binds_nobody(tmp_path):
    settings = {"policy.path": "no/model", "mesh.fsdp": 8, "packing.rows_per_batch": 8}
    with pytest.raises(FileNotFoundError, match="no such file or directory"):
        loop.play(small_run(tmp_path, **settings), lambda _: None)
    assert not (tmp_path / "config.yaml").exists()


def test_the_rows_of_a_step_do_not_depend_on_the_devices(tmp_path):
    """Except in runs that began with version 0.1, whose steps are whole batches of rows."""
    rng = np.random.default_rng(0)
    triplets = rng.integers(1, 4, (40, 1)).astype(np.float32)
    rows = packing.empty(PackingConfig(), 40)
    vars(rows)["sizes"] = rows.sizes._replace(triplets=triplets.sum(axis=1))
    settings = {"train.batch_triplets": 10}  # five rows, which are no multiple of a batch
    config = lambda rows_per_batch: small_run(tmp_path, **settings | {"packing.rows_per_batch": rows_per_batch})
    steps = [round_training.rows_of_steps(rows, config(n), t=1) for n in (1, 2, 4)]
    for other in steps[1:]:
        assert [step.tolist() for step in other] == [step.tolist() for step in steps[0]]
    assert len(steps[0][0]) == round(10 / triplets.mean()) == 5
    old = round_training.rows_of_steps(rows, config(4), t=1, whole_batches=True)
    assert {len(step) for step in old} == {4}
