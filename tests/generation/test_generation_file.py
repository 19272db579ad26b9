"""Responses in files: another engine's, checked line by line, and those of an unfinished round."""

import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT, STORIES, small_run

from tpaw_jax import cli
from tpaw_jax.config import DataConfig, SamplingConfig
from tpaw_jax.config.config_file import to_dict
from tpaw_jax.data import templates
from tpaw_jax.generation import engine, generation_file
from tpaw_jax.generation.decoder import decoder_of
from tpaw_jax.generation.slots import make_sampler
from tpaw_jax.models import Transformer, hub
from tpaw_jax.selfplay import loop, round_summary
from tpaw_jax.types import Prompts


@pytest.fixture(scope="module")
def template():
    return templates.make_template(hub.load_tokenizer(STORIES), DataConfig(chat_template="none"))


@pytest.fixture
def prompts():
    ids = lambda *values: np.array(values, np.int32)
    return Prompts(ids(4, 7, 9), (ids(1, 5), ids(1, 6, 7), ids(1, 8)), (ids(3), ids(4), ids(5)))


GOOD = [
    {"prompt_id": 9, "token_ids": [11, 12], "log_probs": [-0.25, -1.5]},
    {"prompt_id": 4, "response": "Once upon a time", "token_ids": None, "prompt_token_ids": [1, 5]},
    {"prompt_id": 7, "token_ids": [511]},
]


def write(path, records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def read(path, prompts, template):
    return generation_file.read(path, prompts, template, vocabulary=512, longest=16, round_number=3)


def test_responses_come_in_the_order_of_the_prompts(tmp_path, prompts, template):
    given = read(write(tmp_path / "g.jsonl", [*GOOD[:1], "", *GOOD[1:]]), prompts, template)
    text, alone, first = given.generations.tokens
    assert template.tokenizer.decode(text[:-1]) == "Once upon a time"
    assert text[-1] == template.end_of_turn
    assert (alone.tolist(), first.tolist()) == ([511], [11, 12])
    np.testing.assert_array_equal(given.generations.log_probs[2], np.float32([-0.25, -1.5]))
    assert np.isnan(given.generations.log_probs[0]).all()
    assert (given.generations.round, given.retokenized, given.without_log_probs) == (3, 1, 2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3: not valid JSON"),
        ("[1]", "line 3: expected an object with prompt_id and token_ids, got list"),
        ({"token_ids": [1]}, "line 3: prompt_id is None; it must be the id of one of 3 prompts"),
        ({"prompt_id": 5, "token_ids": [1]}, "line 3: prompt_id is 5; it must be the id"),
        ({"prompt_id": True, "token_ids": [1]}, "line 3: prompt_id is True"),
        ({"prompt_id": 9, "token_ids": [1]}, "line 3: prompt_id 9 was already answered in line 1"),
        ({"prompt_id": 7}, "line 3: token_ids is missing, and response is not a string"),
        ({"prompt_id": 7, "token_ids": []}, "line 3: token_ids must be a non-empty list of ids from 0 to 511"),
        ({"prompt_id": 7, "token_ids": [512]}, "line 3: token_ids must be a non-empty list of ids from 0 to 511"),
        ({"prompt_id": 7, "token_ids": [-1]}, "line 3: token_ids must be"),
        ({"prompt_id": 7, "token_ids": [1.5]}, "line 3: token_ids must be"),
        ({"prompt_id": 7, "token_ids": "12"}, "line 3: token_ids must be"),
        ({"prompt_id": 7, "token_ids": [1] * 17}, "line 3: token_ids has 17 tokens; sampling.max_new_tokens allows 16"),
        (
            {"prompt_id": 7, "token_ids": [1, 2], "log_probs": [-1]},
            "line 3: log_probs must be a list of 2 numbers of at most 0",
        ),
        (
            {"prompt_id": 7, "token_ids": [1], "log_probs": [2.0]},
            "line 3: log_probs must be a list of 1 numbers of at most 0",
        ),
        ({"prompt_id": 7, "token_ids": [1], "log_probs": ["a"]}, "line 3: log_probs must be"),
        ({"prompt_id": 7, "token_ids": [1], "prompt_token_ids": [1, 6]}, "line 3: prompt_token_ids are not those"),
    ],
)
def test_an_unusable_line_is_reported(tmp_path, prompts, template, line, message):
    with pytest.raises(ValueError, match=r"g\.jsonl, line 3") as caught:
        read(write(tmp_path / "g.jsonl", [*GOOD[:2], line]), prompts, template)
    assert message in str(caught.value)


def test_unanswered_prompts_and_a_missing_file_are_reported(tmp_path, prompts, template):
    with pytest.raises(ValueError, match=r"2 of 3 prompts are not answered: prompt_id 4, 7\."):
        read(write(tmp_path / "g.jsonl", GOOD[:1]), prompts, template)
    with pytest.raises(FileNotFoundError, match="there is no such file of generations"):
        read(tmp_path / "none.jsonl", prompts, template)


def test_appended_responses_are_read_back_and_a_truncated_block_is_removed(tmp_path, prompts):
    path = tmp_path / "sampled.part"
    generation_file.append(path, prompts, {})
    assert generation_file.read_partial([path], prompts) == {}
    made = {i: (np.arange(i + 1, dtype=np.int32), np.float32([-1 / 3] * (i + 1))) for i in range(3)}
    for some in ((2, 0), (1,)):
        generation_file.append(path, prompts, {i: made[i] for i in some})
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    said = []
    generation_file.repair(path, said.append)
    found = generation_file.read_partial([path], prompts)
    assert list(found) == [2, 0]
    assert re.match(r".*sampled\.part: \d+ of \d+ bytes are corrupted or truncated; the prompts that", said[0])
    for i, (tokens, log_probs) in found.items():
        np.testing.assert_array_equal(tokens, made[i][0])
        np.testing.assert_array_equal(log_probs, made[i][1])  # bit for bit
    generation_file.append(path, prompts, {1: made[1]})
    assert path.read_bytes() == whole


def test_only_the_responses_asked_for_are_read(tmp_path, prompts):
    path = tmp_path / "sampled.part"
    made = {i: (np.full(i + 1, i, np.int32), np.zeros(i + 1, np.float32)) for i in range(6)}
    generation_file.append(path, prompts, made, num_generations=2)
    read = lambda prompts, **more: list(generation_file.read_partial([path], prompts, **more))
    assert read(prompts, num_generations=2) == list(range(6))
    assert read(prompts, num_generations=2, wanted=np.array([2, 0])) == [0, 1, 4, 5]
    assert read(prompts.take([1, 0]), num_generations=2) == [2, 3, 0, 1]  # requests are numbered anew


def test_appends_are_rate_limited_and_lose_nothing(tmp_path, prompts, monkeypatch):
    path, now = tmp_path / "sampled.part", iter([0.0, 0.0, 0.0, 1.0, 3.0, 3.0, 3.5, 9.0])
    monkeypatch.setattr(generation_file.time, "monotonic", lambda: next(now))
    made = {i: (np.arange(1, dtype=np.int32), np.zeros(1, np.float32)) for i in range(3)}
    there = lambda: list(generation_file.read_partial([path], prompts))

    def sample():
        with generation_file.appender(path, prompts, seconds=2.0) as keep:
            keep({2: made[2]})
            assert there() == [2]  # the first at once
            keep({0: made[0]})
            assert there() == [2]
            keep({1: made[1]})
            assert there() == [2, 0, 1]
            path.unlink()
            keep({0: made[0]})
            assert not path.exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample()
    assert there() == [0]  # the rest is written on exit


def test_appends_to_a_bucket_are_objects_that_come_ever_more_rarely(in_bucket, prompts, monkeypatch):
    path, now = in_bucket / "sampled_0000.part", [0.0]
    monkeypatch.setattr(generation_file.time, "monotonic", lambda: now[0])
    response = np.arange(1, dtype=np.int32), np.zeros(1, np.float32)
    counts = []
    with generation_file.appender(path, prompts, seconds=2.0) as keep:
        for i, now[0] in enumerate([0.0, 1.0, 3.0, 1000.0, 1010.0, 1025.0]):
            keep({i % len(prompts): response})
            counts.append(len(list(in_bucket.glob("sampled_0000*.part"))))
        keep({0: response})
    assert counts == [1, 1, 2, 3, 3, 4]
    parts = list(in_bucket.glob("sampled_*.part"))
    assert len(parts) == 5
    assert set(generation_file.read_partial(parts, prompts)) == set(range(min(6, len(prompts))))


def test_another_engine_answers_the_prompts_of_an_exported_policy(tmp_path, capsys):
    """`tpaw export`, `tpaw prompts`, scripts/answer_prompts.py, `tpaw play --generations`."""
    settings = {"rounds": 1, "mesh.fsdp": -1, "data.max_prompts": 4}
    configuration = tmp_path / "run.yaml"
    run = small_run(tmp_path / "run", **settings)
    configuration.write_text(json.dumps(to_dict(run) | {"rounds": 2}))
    path = lambda name: str(tmp_path / name)
    with pytest.MonkeyPatch.context() as one_device:
        one_device.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
        assert cli.main(["play", "--config", str(configuration), "--rounds", "1"]) == 0
        assert cli.main(["export", "--run", path("run"), "--out", path("theta")]) == 0
        assert cli.main(["prompts", "--config", str(configuration), "--out", path("prompts.jsonl")]) == 0
        command = [sys.executable, ROOT / "scripts" / "answer_prompts.py", "--engine", "transformers"]
        command += ["--model", path("theta"), "--prompts", path("prompts.jsonl"), "--out", path("answers.jsonl")]
        subprocess.run([*command, "--max-new-tokens", "16"], check=True)
        capsys.readouterr()
        given = ["--generations", path("answers.jsonl")]
        assert cli.main(["play", "--config", str(configuration), *given]) == 0
    assert "4 responses from" in capsys.readouterr().out
    table = round_summary.read_all(tmp_path / "run", 2)
    assert len(table) == 2
    assert table[1]["largest gap"] < 1e-4  # the other engine's log-probs are the scorer's


def test_sampling_resumes_with_the_missing_responses(stories):
    ids = lambda n: np.arange(1, n + 1, dtype=np.int32)
    prompts = Prompts(np.arange(6, dtype=np.int32), tuple(ids(n) for n in range(2, 8)), tuple(ids(1) for _ in range(6)))
    settings = SamplingConfig(max_new_tokens=10, slots=2)
    sampler = make_sampler(decoder_of(Transformer(stories[0])), settings, (1,))
    generate = lambda **more: engine.generate(sampler, stories[1], prompts, seed=1, round_number=0, **more)
    kept = {}
    whole = generate(on_finished=kept.update)
    assert sorted(kept) == list(range(6))
    again, sampled = {i: kept[i] for i in (5, 0, 3)}, {}
    resumed = generate(finished=again, on_finished=sampled.update)
    assert sorted(sampled) == [1, 2, 4]
    for a, b in zip((*resumed.tokens, *resumed.log_probs), (*whole.tokens, *whole.log_probs), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_round_played_on_the_samplers_own_file_gives_the_same_result(tmp_path, monkeypatch, capsys):
    """`tpaw generate` writes D_0, `tpaw play --generations` plays round 0 with it, and stops before round 1."""
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
    run = small_run(tmp_path / "own", rounds=1)
    own = loop.play(run, lambda _: None)
    configuration = tmp_path / "run.yaml"
    configuration.write_text(json.dumps(to_dict(run) | {"directory": str(tmp_path / "given"), "rounds": 3}))
    made = str(tmp_path / "made.jsonl")
    assert cli.main(["generate", "--config", str(configuration), "--out", made]) == 0
    assert cli.main(["play", "--config", str(configuration), "--generations", made]) == 0
    assert "12 responses from" in capsys.readouterr().out
    table = round_summary.read_all(tmp_path / "given", 3)
    assert len(table) == 1
    for name in ("loss", "margin", "held-out after", "response tokens", "echoes"):
        assert table[0][name] == own[0][name], name
    assert 0 <= own[0]["sampler gap"] <= own[0]["largest gap"] < 1e-4
