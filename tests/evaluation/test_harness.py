"""lm-eval's tasks through the policy, beside lm-eval's own `hf` model: the same scores and log-likelihoods."""

import json

import jax
import lm_eval
import pytest
import yaml
from conftest import DEMO, STORIES
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from tpaw_jax import cli
from tpaw_jax.config import config_file
from tpaw_jax.evaluation import harness
from tpaw_jax.generation.policy import open_policy
from tpaw_jax.runtime import sharding

STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her"


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A directory of three tasks on local files: multiple choice, generation and perplexity."""
    directory = tmp_path_factory.mktemp("tasks")
    words = STORY.split()
    records = [
        {
            "question": " ".join(words[: 4 + i]),
            "choices": [words[4 + i], "the big dog", "xylophone"],
            "gold": 0,
            "answer": words[4 + i],
            "text": " ".join(words[: 3 * i + 2]) if i else "",
        }
        for i in range(8)
    ]
    (directory / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(directory / "records.jsonl")}}}
    common |= {"test_split": "test", "metadata": {"version": 1.0}}
    choice = {
        "task": "choice",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    generation = {
        "task": "generation",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": 24},
        "metric_list": [{"metric": "exact_match"}],
    }
    perplexity = {
        "task": "perplexity",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question + ' ' + text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    }
    for task in (choice, generation, perplexity):
        (directory / f"{task['task']}.yaml").write_text(yaml.safe_dump({**common, **task}))
    return directory


def settings(*more):
    return [f"policy.path={STORIES}", "mesh.fsdp=1", "packing.row_length=512", *more]


@pytest.fixture(scope="module")
def theirs(tasks):
    model = HFLM(pretrained=str(STORIES), device="cpu", dtype="float32", batch_size=4, max_length=512)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    names = ["choice", "generation", "perplexity"]
    return lm_eval.simple_evaluate(model=model, tasks=names, task_manager=manager)


@pytest.fixture(scope="module")
def ours(tasks):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
        run = config_file.load(DEMO / "demo.yaml", settings("packing.max_responses_per_row=6"))
        mesh = sharding.make_mesh(run.mesh)
        player = open_policy(run, mesh)
        policy = harness.PolicyLM(player, player.params, run, mesh)
        return harness.run(policy, ["choice", "generation", "perplexity"], str(tasks))


def responses(results, task):
    return [sample["resps"] for sample in sorted(results["samples"][task], key=lambda sample: sample["doc_id"])]


def test_every_score_is_that_of_the_hf_model(ours, theirs):
    for task, scores in theirs["results"].items():
        for metric, value in scores.items():
            if isinstance(value, float):
                assert ours["results"][task][metric] == pytest.approx(value, rel=1e-5), (task, metric)


def test_log_likelihoods_are_those_of_the_hf_model(ours, theirs):
    """To 1e-3 nats, and the same continuations are greedy."""
    compared = 0
    for mine, other in zip(responses(ours, "choice"), responses(theirs, "choice"), strict=True):
        for ((a, greedy),), ((b, also),) in zip(mine, other, strict=True):
            assert a == pytest.approx(b, abs=1e-3)
            assert greedy == bool(also)
            compared += 1
    assert compared == 24
    for mine, other in zip(responses(ours, "perplexity"), responses(theirs, "perplexity"), strict=True):
        assert mine[0][0] == pytest.approx(other[0][0], abs=1e-3)


def test_generations_are_those_of_the_hf_model(ours, theirs):
    mine, others = responses(ours, "generation"), responses(theirs, "generation")
    assert mine == others
    assert all("." not in text for ((text,),) in mine)
    assert any(text for ((text,),) in mine)


def test_texts_longer_than_the_model_are_scored_in_windows(stories_tokenizer):
    run = config_file.load(DEMO / "demo.yaml", settings())
    mesh = sharding.make_mesh(run.mesh)
    player = open_policy(run, mesh)
    policy = harness.PolicyLM(player, player.params, run, mesh)
    text = " ".join([STORY] * 40)
    assert len(policy.tok_encode(text)) > 2 * policy.max_length
    request = lambda *arguments: type("Request", (), {"args": arguments})()
    (mine,) = policy.loglikelihood_rolling([request(text)])
    model = HFLM(pretrained=str(STORIES), device="cpu", dtype="float32", batch_size=1, max_length=policy.max_length)
    (other,) = model.loglikelihood_rolling([request(text)])
    assert mine == pytest.approx(other, abs=2e-2)  # of 2,000 tokens
    ((mine, _),) = policy.loglikelihood([request(text, " and the")])
    ((other, _),) = model.loglikelihood([request(text, " and the")])
    assert mine == pytest.approx(other, abs=1e-3)


CHAT = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def test_nothing_to_score_is_told():
    policy = harness.PolicyLM.__new__(harness.PolicyLM)
    with pytest.raises(ValueError, match="request 0 has no token to score after its context: ''"):
        policy._loglikelihood_tokens([(("a", ""), [1, 2], [])])


def test_conversations_become_the_tokens_that_the_policy_was_trained_on():
    run = config_file.load(
        DEMO / "demo.yaml",
        settings(f"data.chat_template='{CHAT}'".replace("\n", "\\n"), "data.system_prompt=Be brief"),
    )
    mesh = sharding.make_mesh(run.mesh)
    player = open_policy(run, mesh)
    policy = harness.PolicyLM(player, player.params, run, mesh)
    history = [{"role": "user", "content": "The dog"}]
    assert policy.tok_encode(policy.apply_chat_template(history)) == player.template.prompt_tokens(history)
    assert policy.chat_template(True) == player.template.chat
    request = type("Request", (), {"args": ("The dog", {"max_gen_toks": 600})})()
    with pytest.raises(ValueError, match="a task asks for 600 new tokens, but the model has 512 positions"):
        policy.generate_until([request])
    plain = config_file.load(DEMO / "demo.yaml", settings())
    policy = harness.PolicyLM(open_policy(plain, mesh), player.params, plain, mesh)
    with pytest.raises(ValueError, match=r"data\.chat_template is 'none'"):
        policy.apply_chat_template(history)


def test_the_command_prints_lm_evals_table(tasks, tmp_path, capsys):
    words = ["eval", "--config", str(DEMO / "demo.yaml"), "--policy.path", str(STORIES), "--mesh.fsdp", "1"]
    words += ["--harness-path", str(tasks)]
    out = tmp_path / "results.json"
    assert cli.main([*words, "--harness", "choice", "--limit", "3", "--out", str(out)]) == 0
    assert "acc_norm" in capsys.readouterr().out
    assert json.loads(out.read_text())["n-samples"]["choice"]["effective"] == 3
    assert cli.main([*words, "--harness", "nothing"]) == 2
    assert "lm-eval has no task 'nothing'" in capsys.readouterr().err
