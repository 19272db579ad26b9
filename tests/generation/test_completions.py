"""`tpaw generate`: prompts from a configuration or a file, and resuming after a stop."""

import json
import shutil

import jax
import pytest
from conftest import STORIES, small_run
from safetensors.numpy import load_file, save_file

from tpaw_jax import cli
from tpaw_jax.config import DataConfig
from tpaw_jax.config.config_file import to_dict
from tpaw_jax.data import templates
from tpaw_jax.generation import completions, engine
from tpaw_jax.models import hub
from tpaw_jax.runtime import sharding


@pytest.fixture(scope="module")
def template():
    return templates.make_template(hub.load_tokenizer(STORIES), DataConfig(chat_template="none"))


def written(path, *records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
    return path


def read(path, template):
    return completions.read_prompts(path, template, vocabulary=512, longest=9)


def test_prompts_are_ids_texts_or_conversations(tmp_path, template):
    turns = [{"role": "user", "content": "Once"}, {"role": "assistant", "content": "upon"}]
    again = {"role": "user", "content": "a time"}
    path = written(
        tmp_path / "prompts.jsonl",
        {"prompt_id": 70, "prompt": "not read", "prompt_token_ids": [1, 9, 4]},
        "",
        {"prompt": "Once upon"},
        {"prompt_id": 5, "messages": [*turns, again]},
    )
    found = read(path, template)
    assert found.ids.tolist() == [70, 2, 5]  # the default id is the line number
    of_text = template.prompt_tokens([{"role": "user", "content": "Once upon"}])
    expected = [[1, 9, 4], of_text, template.prompt_tokens([*turns, again])]
    assert [tokens.tolist() for tokens in found.prompt_tokens] == expected
    assert [len(tokens) for tokens in found.target_tokens] == [0, 0, 0]


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (['{"prompt": "a"'], "line 1: "),
        (["[1]"], "line 1: expected an object with prompt or prompt_token_ids, got list"),
        ([{"prompt": "a"}, {"prompt_id": -1, "prompt": "a"}], "line 2: prompt_id is -1; it must be an integer"),
        ([{"prompt_id": True, "prompt": "a"}], "line 1: prompt_id is True"),
        (
            [{"prompt_id": 1, "prompt": "a"}, {"prompt": "b"}],
            "line 2: prompt_id 1, the default for this line, is already used in line 1",
        ),
        (
            [{"prompt_id": 1, "prompt": "a"}, {"prompt_id": 1, "prompt": "b"}],
            "line 2: prompt_id 1 is already used in line 1",
        ),
        ([{"text": "a"}], "line 1: one of the fields prompt_token_ids, messages or prompt is required"),
        ([{"prompt": 3}], "line 1: expected a list of turns, got int"),
        ([{"prompt": ""}], "line 1, turn 0: the field 'content' is empty"),
        ([{"messages": []}], "line 1: the conversation must end with a turn that is not the assistant's"),
        ([{"messages": [{"role": "assistant", "content": "a"}]}], "line 1: the conversation must end with a turn"),
        ([{"prompt_token_ids": []}], "line 1: prompt_token_ids must be a non-empty list of ids from 0 to 511"),
        ([{"prompt_token_ids": [512]}], "line 1: prompt_token_ids must be"),
        ([{"prompt_token_ids": [3] * 10}], "line 1: the prompt has 10 tokens; data.max_prompt_length is 9"),
        ([""], "the file has no prompts"),
    ],
)
def test_unusable_prompts_are_reported(tmp_path, template, lines, sentence):
    with pytest.raises(ValueError, match=r"prompts\.jsonl") as error:
        read(written(tmp_path / "prompts.jsonl", *lines), template)
    assert sentence in str(error.value)


def test_a_missing_file_is_reported_before_the_model_is_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file of prompts"):
        completions.answer(small_run(tmp_path, **{"policy.path": "nowhere"}), None, tmp_path / "out", tmp_path / "none")


def changed_model(directory):
    """The stories model with one weight changed."""
    shutil.copytree(STORIES, directory)
    tensors = load_file(directory / "model.safetensors")
    next(iter(tensors.values())).flat[0] += 1
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize("num_generations", [0, 4097])
def test_a_number_of_responses_that_no_random_stream_has_is_refused(tmp_path, num_generations):
    with pytest.raises(ValueError, match=f"--num-generations is {num_generations}; it must be from 1 to 4096"):
        completions.answer(small_run(tmp_path / "run"), None, tmp_path / "out.jsonl", num_generations=num_generations)


@pytest.mark.parametrize("num_generations", [1, 2])
def test_a_stopped_call_resumes_and_gives_the_same_result(tmp_path, monkeypatch, num_generations):
    run, real = small_run(tmp_path / "run"), engine.generate
    mesh = sharding.make_mesh(run.mesh, jax.local_devices()[:1])
    answer = lambda out, run=run: completions.answer(
        run, mesh, out, num_generations=num_generations, say=lambda text: None
    )
    answer(tmp_path / "whole.jsonl")
    assert len((tmp_path / "whole.jsonl").read_text().splitlines()) == 12 * num_generations

    def stops(*arguments, on_finished, **more):
        def keep_and_stop(responses):
            on_finished(responses)
            raise KeyboardInterrupt

        return real(*arguments, on_finished=keep_and_stop, **more)

    resumed = {}

    def watched(*arguments, finished, **more):
        resumed.update(finished)
        return real(*arguments, finished=finished, **more)

    out = tmp_path / "stopped.jsonl"
    monkeypatch.setattr(engine, "generate", stops)
    with pytest.raises(KeyboardInterrupt):
        answer(out)
    assert not out.exists()
    assert len(list(tmp_path.glob("stopped.jsonl.*.sampled"))) == 1
    monkeypatch.setattr(engine, "generate", watched)
    for other in ({"seed": 1}, {"sampling.temperature": 0.5}, {"policy.path": changed_model(tmp_path / "model")}):
        answer(out, small_run(tmp_path / "run", **other))
        assert not resumed  # the kept responses are from another random stream, other settings or other weights
    answer(out, small_run(tmp_path / "run", **{"sampling.slots": 4}))
    assert 0 < len(resumed) < 12 * num_generations
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not list(tmp_path.glob("*.sampled"))


def test_prompts_from_a_file_get_the_same_responses_as_those_from_the_configuration(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
    configuration = written(tmp_path / "run.yaml", to_dict(small_run(tmp_path / "run")))
    of = lambda command, out, *more: cli.main([command, "--config", str(configuration), "--out", str(out), *more])
    asked, own, given = tmp_path / "prompts.jsonl", tmp_path / "own.jsonl", tmp_path / "given.jsonl"
    assert of("prompts", asked) == of("generate", own) == of("generate", given, "--prompts", str(asked)) == 0
    assert given.read_bytes() == own.read_bytes()
    records = [json.loads(line) for line in own.read_text().splitlines()]
    assert set(records[0]) == {"prompt_id", "prompt", "prompt_token_ids", "response", "token_ids", "log_probs"}
    assert of("generate", given, "--prompts", str(asked), "--num-generations", "0") == 2
    assert "--num-generations is 0" in capsys.readouterr().err

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(completions, "answer", interrupted)
    assert of("generate", given) == 130
    assert "the same command resumes from the finished responses" in capsys.readouterr().err
