"""Exact-match tasks: what counts as the answer, the interval, and a policy that is scored while it plays."""

import json

import jax
import numpy as np
import pytest
import scipy.stats
from conftest import DEMO, STORIES, small_run

from tpaw_jax import cli
from tpaw_jax.config import DataConfig, EvaluationConfig, TaskConfig
from tpaw_jax.data import templates
from tpaw_jax.evaluation import exact_match
from tpaw_jax.models import hub
from tpaw_jax.runtime import preemption
from tpaw_jax.selfplay import loop

GSM8K = TaskConfig("gsm8k", "gsm8k.jsonl")


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        (GSM8K.answer, "Half of 48 is 24.\n#### 72", "72"),
        (GSM8K.answer, "#### 1\n#### 2", "2"),
        (GSM8K.answer, "no answer", None),
        (GSM8K.response, "First 3 and 4, so she has 1,234.50.", "1,234.50"),
        (GSM8K.response, "it is -7", "-7"),
        (GSM8K.response, "none", None),
        ("", "  all of it ", "all of it"),
    ],
)
def test_the_last_match_is_the_answer(pattern, text, expected):
    assert exact_match.extract(pattern, text) == expected


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [("1,234", "1234", True), ("$18", "18.0", True), ("18.", "18", True), ("18", "81", False), ("yes", "yes ", True)],
)
def test_equal_numbers_are_the_same_answer(one, other, same):
    assert exact_match.same_answer(one, other) == same


@pytest.mark.parametrize(("correct", "problems"), [(56, 100), (0, 10), (10, 10), (1, 1), (700, 1319)])
def test_the_interval_is_wilsons(correct, problems):
    expected = scipy.stats.binomtest(correct, problems).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(exact_match.interval(correct, problems), (expected.low, expected.high), atol=1e-9)


def test_a_problem_without_an_answer_is_told(tmp_path, stories_tokenizer):
    path = tmp_path / "problems.jsonl"
    path.write_text('{"question": "1 + 1?", "answer": "#### 2"}\n{"question": "2 + 2?", "answer": "four"}\n')
    template = templates.make_template(stories_tokenizer, DataConfig(chat_template="none"))
    with pytest.raises(ValueError, match=r"problems\.jsonl, line 2: the target contains no answer"):
        exact_match.load_task(TaskConfig("sums", str(path)), template)
    task = exact_match.load_task(TaskConfig("sums", str(path), limit=1), template)
    assert task.answers == ("2",)


def test_tasks_are_chosen_by_name():
    tasks = (TaskConfig("a", "x"), TaskConfig("b", "y"))
    assert exact_match.select_tasks(EvaluationConfig(tasks), []) == list(tasks)
    assert exact_match.select_tasks(EvaluationConfig(tasks), ["b"]) == [tasks[1]]
    with pytest.raises(ValueError, match=r"no task 'c'; evaluation\.tasks has a, b"):
        exact_match.select_tasks(EvaluationConfig(tasks), ["c"])
    with pytest.raises(ValueError, match="has no task to evaluate on"):
        exact_match.select_tasks(EvaluationConfig(), [])


@pytest.fixture(scope="module")
def stories_task(tmp_path_factory):
    """Problems whose answer is in what the model says greedily, but for every second one."""
    directory = tmp_path_factory.mktemp("task")
    beginnings = ["Once upon a time, there was a little", "The dog", "Lily and Tom", "One day a", "Mom said", "He saw"]
    path = directory / "problems.jsonl"
    lines = [{"question": text, "answer": "x"} for text in beginnings]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {
        "evaluation.tasks": f"[{{name: words, path: {path}, answer: '', response: '[a-z]+', max_new_tokens: 12}}]",
        "rounds": 1,
    }
    out = directory / "first.jsonl"
    arguments = ["--config", str(DEMO / "demo.yaml"), "--policy.path", str(STORIES), "--mesh.fsdp", "1"]
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
        assert cli.main(["eval", *arguments, *words, "--out", str(out)]) == 0
    said = [json.loads(line) for line in out.read_text().splitlines()]
    answers = [record["extracted"] if i % 2 else "never said" for i, record in enumerate(said)]
    lines = [line | {"answer": answer} for line, answer in zip(lines, answers, strict=True)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return settings, said, [*arguments, *words]


def test_eval_answers_greedily_and_counts_exact_matches(stories_task, tmp_path, capsys, stories_tokenizer):
    import torch
    import transformers

    _, said, arguments = stories_task
    assert cli.main(["eval", *arguments, "--out", str(tmp_path / "out.jsonl"), "--tasks", "words"]) == 0
    assert "words: 50.0% (3 of 6; 95 % interval 18.8% to 81.2%)" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["correct"] for record in records] == [False, True] * 3
    model = transformers.LlamaForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    template = templates.make_template(hub.load_tokenizer(STORIES), DataConfig(chat_template="none"))
    for record in said:
        ids = template.prompt_tokens([{"role": "user", "content": record["prompt"].removeprefix("<s>").strip()}])
        made = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert record["token_ids"] == made[0, len(ids) :].tolist()


def test_a_run_is_evaluated_each_round_and_its_ring_by_eval(stories_task, tmp_path, capsys):
    settings, _, arguments = stories_task
    run = small_run(tmp_path / "run", **settings, **{"evaluation.each_round": True})
    said = []
    (line,) = loop.play(run, said.append)
    assert line["eval/words before"] == 0.5
    assert 0 <= line["eval/words"] <= 1
    assert sum(text.startswith("words: ") for text in said) == 2
    for number, share in ((0, 0.5), (1, line["eval/words"])):
        assert cli.main(["eval", *arguments, "--checkpoint", str(tmp_path / "run"), "--round", str(number)]) == 0
        assert f"words: {share:.1%}" in capsys.readouterr().out
    assert cli.main(["eval", *arguments, "--checkpoint", str(tmp_path / "run"), "--round", "7"]) == 2
    assert "the policy of round 7 is not in the ring; it holds [0, 1]" in capsys.readouterr().err


def test_a_run_that_is_stopped_while_it_is_evaluated_has_its_training(stories_task, tmp_path, monkeypatch):
    settings, *_ = stories_task
    run = lambda name: small_run(tmp_path / name, **settings, **{"evaluation.each_round": True})
    whole = loop.play(run("whole"), lambda _: None)
    notice, said = preemption.PreemptionNotice(), []

    def check(what):
        if what.startswith("Evaluation") and (tmp_path / "stopped" / "metrics.jsonl").exists():
            raise preemption.Preempted(what)

    monkeypatch.setattr(notice, "check", check)
    with pytest.raises(preemption.Preempted, match="the training of the round is saved"):
        loop.play(run("stopped"), lambda _: None, notice=notice)
    ended = loop.play(run("stopped"), said.append)
    assert f"training resumes after step {whole[0]['steps']}." in "\n".join(said)
    for key in ("loss", "margin", "held-out after", "eval/words", "eval/words before"):
        assert ended[0][key] == whole[0][key]
