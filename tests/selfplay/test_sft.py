"""Supervised fine-tuning: transformers' loss, the whole data path, a resumed run that ends as an undisturbed one."""

import json

import jax
import numpy as np
import pytest
import torch
import transformers
import yaml
from conftest import DEMO, STORIES, small_run

from tpaw_jax import cli
from tpaw_jax.cli import training
from tpaw_jax.config import PackingConfig, config_file
from tpaw_jax.data import dataset, packing, prefix_trees, templates
from tpaw_jax.generation.policy import open_policy
from tpaw_jax.report import run_report
from tpaw_jax.runtime import preemption, sharding
from tpaw_jax.selfplay import loop
from tpaw_jax.storage import journal, ring

SETTINGS = {"objective.loss": "sft", "rounds": 1, "train.optimizer": "adamw", "train.epochs": 2}


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])


def run(directory, notice=None, **overrides):
    said = []
    table = loop.play(small_run(directory, **SETTINGS, **overrides), said.append, notice=notice)
    return table, "\n".join(said)


def policy_of(directory):
    c = small_run(directory, **SETTINGS)
    like = open_policy(c, sharding.make_mesh(c.mesh, jax.local_devices()[:1])).params
    return ring.restore_policy(ring.open_ring(journal.open_journal(directory, read_only=True), 3), 1, like)


def records(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sft")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
        table, said = run(directory, **{"train.validate_each_epoch": True, "train.learning_rate": 1e-3})
    return directory, table, said


def test_the_loss_of_the_first_step_is_that_of_transformers(trained):
    """All eight targets of one step: the mean over their tokens, prompts left out."""
    directory, *_ = trained
    c = small_run(directory)
    template = templates.make_template(transformers.AutoTokenizer.from_pretrained(STORIES), c.data)
    prompts, _, _ = dataset.load(c.data, template, c.seed)
    rows = packing.pack(prefix_trees.trees_of_targets(prompts), PackingConfig(128, 2, 64, 1))
    first = records(directory)[0]
    used = packing.epoch_order(rows, c.seed, 0, 0)
    model = transformers.LlamaForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    total, tokens = 0.0, 0
    for row in used:
        for i in {int(i) for i in rows.prompt_index[row] if i >= 0}:
            x, y = prompts.prompt_tokens[i], prompts.target_tokens[i]
            with torch.no_grad():
                logits = model(torch.tensor(np.concatenate([x, y]))[None].long()).logits[0, len(x) - 1 : -1]
            total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(y).long(), reduction="sum"))
            tokens += len(y)
        if tokens >= first["lengths/chosen"] * first["triplets"]:
            break
    assert tokens == pytest.approx(first["lengths/chosen"] * first["triplets"])
    assert first["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert first["logps/chosen"] == pytest.approx(-total / first["triplets"], rel=1e-5)


def test_a_supervised_run_learns_its_targets_and_says_so(trained):
    directory, (line,), said = trained
    steps = [r for r in records(directory) if "loss" in r]
    assert len(steps) == line["steps"]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1
    assert line["targets"] == 12
    assert "12 targets, " in said
    (between,) = [r["held-out"] for r in records(directory) if "held-out" in r]
    assert np.isfinite([between, line["held-out before"], line["held-out after"]]).all()
    again, said = run(directory, **{"train.validate_each_epoch": True, "train.learning_rate": 1e-3})
    assert again == [line]
    assert "The run resumes with theta_1." in said


def test_a_supervised_run_is_reported(trained, tmp_path):
    """Without players, responses and texts: its table and curves, and where the time went."""
    run_report.write([str(trained[0])], tmp_path / "report.html", tmp_path)
    names = {path.stem for path in tmp_path.glob("*.png")}
    assert {"rounds_held_out_after", "steps_loss", "seconds"} <= names
    assert not {"players_beta", "margins", "lengths"} & names
    assert "target tokens" in (tmp_path / "report.html").read_text()


def test_a_stopped_supervised_run_ends_as_the_undisturbed_one(trained, tmp_path, monkeypatch):
    same = {"train.validate_each_epoch": True, "train.learning_rate": 1e-3}
    notice = preemption.PreemptionNotice()
    monkeypatch.setattr(notice, "received_at", lambda step: step == 1)
    with pytest.raises(preemption.Preempted, match="training stopped after step 2"):
        run(tmp_path, notice, **same)
    _, said = run(tmp_path, **same)
    assert "training resumes after step 2" in said
    jax.tree.map(np.testing.assert_array_equal, policy_of(tmp_path), policy_of(trained[0]))


def test_the_command_has_zephyrs_recipe_for_defaults(tmp_path, capsys, monkeypatch):
    path = tmp_path / "sft.yaml"
    path.write_text(
        yaml.safe_dump({"policy": {"path": "m"}, "data": {"sources": [{"path": "d"}]}, "train": {"epochs": 3}})
    )
    c = config_file.load(path, ["train.b2=0.9"], config_file.SFT)
    assert (c.train.learning_rate, c.train.schedule, c.train.batch_triplets) == ((2e-5,), "cosine", 128)
    assert (c.train.epochs, c.train.b2, c.data.max_length, c.objective.loss) == (3, 0.9, 2048, "sft")
    monkeypatch.setattr(training, "_train", lambda *_: pytest.fail("trained"))
    assert cli.main(["play", "--config", str(DEMO / "demo.yaml"), "--objective.loss", "sft"]) == 2
    assert "rounds must be 1" in capsys.readouterr().err
    asked = ["--config", str(path), "--objective.loss", "sft", "--rounds", "1"]
    assert cli.main(["play", *asked]) == 2
    assert "Use `tpaw sft` for that" in capsys.readouterr().err
    assert cli.main(["sft", *asked[:2], "--objective.loss", "team"]) == 2
    assert "Use `tpaw play` for that" in capsys.readouterr().err
