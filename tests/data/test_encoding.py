"""Chunks of a source are encoded in several processes, of a host and of a pod, with the result of one."""

import json
import socket

import datasets
import forked
import numpy as np
import pod_run
import pytest
from conftest import STORIES

from tpaw_jax.config import DataConfig, SourceConfig
from tpaw_jax.data import dataset, encoding, sources, templates
from tpaw_jax.models import hub

CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"


def conversation(i):
    turns = [{"role": role, "content": f"{role} {i} {n}" * (1 + i % 3)} for n in range(1 + i % 2) for role in ROLES]
    return {"messages": turns} if i % 7 else {"messages": turns[:-1]} if i % 2 else {"nothing": i}


ROLES = ("user", "assistant")


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Two sources with malformed records, one of them weighted and in Arrow, in chunks of three records."""
    monkeypatch.setattr(sources, "CHUNK", 3)
    monkeypatch.setattr(encoding, "RECORDS_PER_PROCESS", 4)
    lines = [json.dumps(conversation(i)) + "\n" for i in range(23)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{not json\n"]))
    datasets.Dataset.from_list([{"prompt": f"b {i}", "completion": f"c {i}"} for i in range(10)]).save_to_disk(
        tmp_path / "b"
    )
    given = SourceConfig(str(tmp_path / "a.jsonl")), SourceConfig(str(tmp_path / "b"), weight=1.5)
    return DataConfig(sources=given, chat_template=CHAT, skip_bad_records=True, train_on="all", holdout_prompts=2)


def load(settings, **changes):
    settings = settings.__class__(**{**settings.__dict__, **changes})
    return dataset.load(settings, templates.make_template(hub.load_tokenizer(str(STORIES)), settings), 3)


def assert_same(one, other):
    for a, b in zip(one[:2], other[:2], strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_array_equal(a.conversations, b.conversations)
        for x, y in zip((*a.prompt_tokens, *a.target_tokens), (*b.prompt_tokens, *b.target_tokens), strict=True):
            np.testing.assert_array_equal(x, y)
    assert one[2] == other[2]


def test_several_processes_of_a_host_encode_what_one_does(settings, monkeypatch):
    started, pool = [], encoding._pool
    monkeypatch.setattr(encoding, "_pool", lambda count, *rest: started.append(count) or pool(count, *rest))
    alone = load(settings, processes=1)
    assert not started
    assert len(alone[2].skipped) > 2
    assert_same(load(settings, processes=2), alone)
    assert started == [2]


def test_the_first_malformed_record_is_named_by_any_process(settings):
    for processes in (1, 2):
        with pytest.raises(ValueError, match=r"a.jsonl, line 1: the fields 'nothing' match no known record format"):
            load(settings, processes=processes, skip_bad_records=False)


def test_two_processes_of_a_pod_share_the_work(settings, tmp_path):
    alone = load(settings, processes=1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "run").mkdir()
    running = [
        forked.start(pod_run.load_data, tmp_path / "run", port, 2, p, settings, output=tmp_path / f"{p}.log")
        for p in range(2)
    ]
    codes, _, errors = zip(*[child.finish() for child in running], strict=True)
    assert not any(codes), errors
    found = [np.load(tmp_path / "run" / f"of_{p}.npz") for p in range(2)]
    for one in found:
        assert str(one["report"]) == repr(alone[2])
        np.testing.assert_array_equal(one["tokens"], np.concatenate(alone[0].prompt_tokens))
        assert 0 < one["encoded"] < len(alone[2].skipped) + alone[2].records
    assert sum(int(one["encoded"]) for one in found) == 34  # each record once, by one of the two
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["of_0.npz", "of_1.npz"]
