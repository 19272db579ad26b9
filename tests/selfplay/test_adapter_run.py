"""Runs whose policies are adapters of one frozen model: what is trained and saved, kills, exports."""

import itertools
import json
import os
import shutil
import signal

import forked
import jax
import killed_run
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers
import yaml
from conftest import DEMO, STORIES, small_run

from tpaw_jax import cli, models
from tpaw_jax.models import adapters, hub
from tpaw_jax.selfplay import export, loop
from tpaw_jax.storage import journal, ring

LORA = {"policy.lora.rank": 4, "policy.lora.targets": "[q_proj,v_proj,down_proj]", "train.learning_rate": 1e-3}
RANK_4 = 4 * 5 * ((64 + 64) + (64 + 32) + (172 + 64))
"""Numbers in the adapters of the targets: five layers of 64 features, 32 of values and 172 of feed-forward."""


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """A run of three rounds, and its table."""
    directory = tmp_path_factory.mktemp("adapters") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
        return directory, loop.play(small_run(directory, **LORA), lambda _: None)


def test_adapters_learn_in_rounds(played):
    _, table = played
    assert [line["players"] for line in table] == [1, 2, 3]
    for line in table:
        assert line["P_t at step 0"] == 0  # scoring and step compute the same
        assert line["skipped"] == 0
        assert line["loss"] < np.log(2)  # where policy and players agree
        assert line["chosen"] > 0 > line["rejected"]


def test_the_ring_holds_adapters_alone(played):
    directory, _ = played
    for policy in sorted((directory / "ring" / "policies").iterdir()):
        shapes = ring.ocp.StandardCheckpointer().metadata(policy).item_metadata["values"]
        leaves = jax.tree.leaves(jax.tree.map(lambda x: int(np.prod(x.shape)), shapes))
        assert sum(leaves) == RANK_4


def test_exports_load_in_peft_and_transformers(played, tmp_path):
    directory, _ = played
    assert "for PEFT" in export.write(directory, 2, tmp_path / "adapters")
    export.write(directory, 2, tmp_path / "merged", merge=True)
    fields = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"]) == (4, 8)
    assert fields["target_modules"] == ["q_proj", "v_proj", "down_proj"]
    tokens = np.random.default_rng(0).integers(3, 512, (2, 30)).astype(np.int32)
    config, params = models.load_pretrained(tmp_path / "merged")
    ours = np.asarray(models.Transformer(config).apply({"params": params}, tokens))
    base = transformers.AutoModelForCausalLM.from_pretrained(STORIES)
    before = base(torch.tensor(tokens, dtype=torch.long)).logits.detach().numpy()
    assert np.abs(before - ours).max() > 0.01
    for model in (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
        peft.PeftModel.from_pretrained(base, tmp_path / "adapters"),
    ):
        with torch.no_grad():
            theirs = model.eval()(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    assert hub.load_tokenizer(tmp_path / "adapters").chat_template == hub.load_tokenizer(STORIES).chat_template


def test_each_round_adds_its_own_adapters_if_they_are_merged(tmp_path):
    settings = LORA | {"policy.lora.merge_each_round": True}
    table = loop.play(small_run(tmp_path / "run", **settings), lambda _: None)
    assert [line["P_t at step 0"] for line in table] == [0, 0, 0]
    assert all(line["chosen"] > 0 > line["rejected"] for line in table)
    of_players = []
    for number in (1, 2, 3):
        export.write(tmp_path / "run", number, tmp_path / f"adapters_{number}")
        fields = json.loads((tmp_path / f"adapters_{number}" / "adapter_config.json").read_text())
        assert (fields["r"], fields["lora_alpha"]) == (4 * number, 8 * number)
        tensors = safetensors.numpy.load_file(tmp_path / f"adapters_{number}" / "adapter_model.safetensors")
        of_players.append({name: x for name, x in tensors.items() if "lora_B" in name})
    for before, after in itertools.pairwise(of_players):
        for name, x in before.items():
            assert x.any(axis=0).all()  # each round has trained
            np.testing.assert_array_equal(after[name][:, : x.shape[1]], x)  # and no later one has
    export.write(tmp_path / "run", 3, tmp_path / "merged", merge=True)
    tokens = torch.arange(3, 33)[None]
    with torch.no_grad():
        whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(tokens).logits
        base = transformers.AutoModelForCausalLM.from_pretrained(STORIES)
        both = peft.PeftModel.from_pretrained(base, tmp_path / "adapters_3").eval()(tokens).logits
    np.testing.assert_allclose(whole, both, rtol=0, atol=1e-4)
    assert answers(tmp_path / "run", tmp_path) == answers(tmp_path / "merged", tmp_path)
    with pytest.raises(ValueError, match=r"rounds was 3, is 4"):  # the adapters have columns for three rounds
        loop.play(small_run(tmp_path / "run", **settings, rounds=4), lambda _: None)


def test_a_run_goes_on_from_the_adapters_of_another(played, tmp_path):
    directory, _ = played
    export.write(directory, 3, tmp_path / "adapters")
    settings = {"policy.lora.path": str(tmp_path / "adapters"), "rounds": 1}
    loop.play(small_run(tmp_path / "next", **settings), lambda _: None)
    facts = [journal.open_journal(run, read_only=True).facts for run in (directory, tmp_path / "next")]
    assert facts[0]["ring/policies/00003"]["same"] == facts[1]["ring/policies/00000"]["same"]


def test_a_lost_first_player_is_read_from_its_adapters_again(played, tmp_path):
    export.write(played[0], 3, tmp_path / "begun")
    run = small_run(tmp_path / "next", **{"policy.lora.path": str(tmp_path / "begun"), "rounds": 2})
    loop.play(run, lambda _: None)
    before = {name: f["same"] for name, f in journal.open_journal(tmp_path / "next", read_only=True).facts.items()}
    shutil.rmtree(tmp_path / "next" / "ring" / "policies" / "00000")
    (tmp_path / "next" / "round_0000" / "generations.npz").unlink()
    said = []
    loop.play(run, said.append)
    assert "starting at round 0" in "\n".join(said)
    assert before == {
        name: f["same"] for name, f in journal.open_journal(tmp_path / "next", read_only=True).facts.items()
    }


def test_dora_cannot_be_merged_each_round(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_dora": true}')
    tensors = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": np.zeros((2, 64), np.float32)}
    safetensors.numpy.save_file(tensors, tmp_path / "adapter_model.safetensors")
    settings = {"policy.lora.path": str(tmp_path), "policy.lora.merge_each_round": True}
    with pytest.raises(ValueError, match=r"merge_each_round must be false: the adapters at .* are DoRA's"):
        loop.play(small_run(tmp_path / "run", **settings), lambda _: None)


def test_merging_begins_with_the_adapters_of_another_run(played, tmp_path):
    directory, _ = played
    export.write(directory, 3, tmp_path / "begun")
    settings = {"policy.lora.path": str(tmp_path / "begun"), "policy.lora.merge_each_round": True, "rounds": 2}
    loop.play(small_run(tmp_path / "next", **settings, **{"train.learning_rate": 1e-3}), lambda _: None)
    tensors = []
    for out, number in ((tmp_path / "theta_0", 0), (tmp_path / "theta_2", 2)):
        export.write(tmp_path / "next", number, out)
        tensors.append(safetensors.numpy.load_file(out / "adapter_model.safetensors"))
    for name, begun in safetensors.numpy.load_file(tmp_path / "begun" / "adapter_model.safetensors").items():
        np.testing.assert_array_equal(tensors[0][name], begun)
        assert sum(tensors[1][name].shape) == sum(begun.shape) + 4  # of the second round


def test_another_base_is_told(played, tmp_path):
    directory, _ = played
    config, params = models.load_pretrained(STORIES)
    other = jax.tree.map(lambda p: 1.01 * p, params)
    models.save_pretrained(tmp_path / "other", config, other, hub.load_tokenizer(STORIES))
    opened = journal.open_journal(directory)
    opened.config["policy"]["path"] = str(tmp_path / "other")  # as if the model at that path had changed
    journal.save(opened)
    try:
        with pytest.raises(ValueError, match="the adapters of this run belong to other parameters than those now at"):
            loop.play(small_run(directory, **LORA, **{"policy.path": str(tmp_path / "other"), "rounds": 4}))
    finally:
        opened.config["policy"]["path"] = str(STORIES)
        journal.save(opened)


def test_evaluation_takes_the_adapters_of_the_run(played, tmp_path, monkeypatch, capsys):
    """Whatever the configuration says of adapters, and not beside another base."""
    directory, _ = played
    export.write(directory, None, tmp_path / "merged", merge=True)
    assert answers(directory, tmp_path) == answers(tmp_path / "merged", tmp_path)
    architecture, params = models.load_pretrained(STORIES)
    models.save_pretrained(
        tmp_path / "other", architecture, jax.tree.map(lambda p: 1.01 * p, params), hub.load_tokenizer(STORIES)
    )
    with pytest.raises(SystemExit):
        answers(directory, tmp_path, "--policy.path", str(tmp_path / "other"))
    assert "the adapters of this run belong to other parameters" in capsys.readouterr().err


def answers(checkpoint, place, *more):
    """The tokens that `tpaw eval` samples with a run's newest policy, or with a model."""
    task = {"name": "stories", "path": str(DEMO / "tinystories.jsonl"), "answer": "", "response": "", "limit": 4}
    fields = {"policy": {"path": str(STORIES)}, "data": {"sources": [{"path": "x.jsonl"}], "chat_template": "none"}}
    fields |= {"evaluation": {"tasks": [task | {"max_new_tokens": 8}]}, "sampling": {"max_new_tokens": 8}}
    config, out = place / "run.yaml", place / "answers.jsonl"
    config.write_text(yaml.safe_dump(fields))
    code = cli.main(["eval", "--config", str(config), "--checkpoint", str(checkpoint), "--out", str(out), *more])
    if code:
        raise SystemExit(code)
    return [json.loads(line)["token_ids"] for line in out.read_text().splitlines()]


def test_targets_that_a_model_lacks_are_told(tmp_path):
    from families import random_model

    random_model("mixtral", tmp_path / "model", vocab_size=512)
    hub.load_tokenizer(STORIES).save_pretrained(tmp_path / "model")
    settings = {"policy.path": str(tmp_path / "model"), "policy.lora.rank": 2, "policy.lora.targets": "up_proj"}
    with pytest.raises(ValueError, match=r"policy\.lora\.targets: this mixtral model has none of .* up_proj"):
        loop.play(small_run(tmp_path / "run", **settings), lambda _: None)


@pytest.mark.parametrize("merged", [False, True])
def test_a_run_of_adapters_killed_in_its_stages_ends_as_the_undisturbed_one(tmp_path, merged):
    settings = LORA | {"policy.lora.merge_each_round": merged}
    some_places = ["training"] if merged else ["scored", "training"]
    for place in [*killed_run.PLACES] if "TPAW_ALL_TESTS" in os.environ else some_places:
        code, output = play(tmp_path / "killed", place, settings)
        assert code == -signal.SIGKILL, (place, output)
    facts = []
    for name in ("killed", "undisturbed"):
        code, output = play(tmp_path / name, None, settings)
        assert code == 0, output
        facts.append(journal.open_journal(tmp_path / name, read_only=True).facts)
    policies = [name for name in facts[0] if name.startswith("ring/policies")]
    assert len(policies) == 3
    assert [facts[0][name]["same"] for name in policies] == [facts[1][name]["same"] for name in policies]


def play(directory, place, settings):
    """Play the run of killed_run.py with adapters in a process of its own; its exit code and what it printed last."""
    arguments = directory, place, signal.SIGKILL, tuple(settings.items())
    code, output, errors = forked.start(killed_run.play, *arguments, output=directory.with_suffix(".log")).finish()
    return code, (output + errors)[-2000:]


def test_sampled_responses_are_those_of_the_merged_model(played, tmp_path):
    from tpaw_jax.generation import engine
    from tpaw_jax.generation.policy import open_policy
    from tpaw_jax.runtime import sharding

    directory, _ = played
    run = small_run(directory, **LORA, **{"sampling.temperature": 0})
    policy = open_policy(run, sharding.make_mesh(run.mesh))
    trained, frozen = adapters.parts(policy.params, policy.model.lora)
    kept = ring.open_ring(journal.open_journal(directory, read_only=True), 3)
    params = adapters.join(ring.restore_policy(kept, 3, sharding.abstract(trained)), *frozen)
    export.write(directory, 3, tmp_path / "merged", merge=True)
    merged_run = small_run(tmp_path, **{"policy.path": str(tmp_path / "merged"), "sampling.temperature": 0})
    merged = open_policy(merged_run, sharding.make_mesh(merged_run.mesh))
    from conftest import random_prompts

    prompts, _ = random_prompts(np.random.default_rng(0), 8)
    ours = engine.generate(policy.sampler, params, prompts, seed=0, round_number=0)
    theirs = engine.generate(merged.sampler, merged.params, prompts, seed=0, round_number=0)
    assert [a.tolist() for a in ours.tokens] == [b.tolist() for b in theirs.tokens]
