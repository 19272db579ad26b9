"""SPIN and DPO as configurations: what D_O holds, who judges, and DPO's own loss."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, STORIES, small_run

from tpaw_jax import objective
from tpaw_jax.data import records, templates
from tpaw_jax.models import hub
from tpaw_jax.selfplay import loop

USER = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "Because."}
WORSE = {"role": "assistant", "content": "No idea."}
EXPECTED = records.Record((USER,), ANSWER, WORSE)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])


def records_of(directory, t=0):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["round"] == t]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Why?", "chosen": "Because.", "rejected": "No idea."},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [WORSE]},
        {"prompt": "Why?", "chosen": [USER, ANSWER], "rejected": [USER, WORSE], "score_chosen": 8.0},
        {"chosen": [USER, ANSWER], "rejected": [USER, WORSE]},
        {"real": [USER, ANSWER], "generated": [USER, WORSE]},
        {"instruction": "Why?", "input": "", "output": "x", "chosen": "Because.", "rejected": "No idea."},
        {"question": "Why?", "chosen": "Because.", "rejected": "No idea."},
    ],
)
def test_preference_records_that_people_have(record):
    assert records.parse_record(record, "here", rejected=True) == EXPECTED
    assert records.parse_record(record, "here") == records.Record((USER,), ANSWER)


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"prompt": "Why?", "chosen": "Because."}, "f, line 7: the field 'rejected' is missing"),
        ({"prompt": "Why?", "completion": "Because."}, "f, line 7: the field 'chosen' is missing"),
        (
            {"chosen": "Because.", "rejected": "x"},
            "f, line 7, field 'chosen': the fields 'answer' match no known record format",
        ),
        (
            {"chosen": [USER, ANSWER], "rejected": [WORSE, USER, WORSE]},
            "f, line 7: 'chosen' and 'rejected' answer diff",
        ),
        ({"prompt": "Why?", "chosen": "Because.", "rejected": " "}, "f, line 7: the field 'rejected' is empty"),
    ],
)
def test_preferences_that_cannot_be_used_are_told(record, sentence):
    with pytest.raises(ValueError, match=sentence):
        records.parse_record(record, "f, line 7", rejected=True)


def test_dpo_tells_the_targets_from_the_rejected_responses_of_the_records(tmp_path):
    path = tmp_path / "preferences.jsonl"
    lines = [
        {"prompt": f"Once upon a time {i}", "chosen": f"there was a cat {i}.", "rejected": "No."} for i in range(9)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = small_run(
        tmp_path / "run",
        ROOT / "configs" / "baselines" / "dpo.yaml",
        **{
            "data.sources": f"[{{path: {path}}}]",
            "data.holdout_prompts": 1,
            "train.learning_rate": 1e-4,
            "train.batch_triplets": 1,
            "packing.rows_per_batch": 1,
            "packing.max_responses_per_row": 2,
        },
    )
    said = []
    (line,) = loop.play(run, said.append)
    steps, directory = records_of(tmp_path / "run"), tmp_path / "run"
    assert line["triplets"] == 8
    assert steps[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert steps[-1]["rewards/margins"] > 0.01
    (sample,) = map(json.loads, (directory / "round_0000" / "samples.jsonl").read_text().splitlines())
    assert "No." in sample["response"]
    kept = np.load(directory / "round_0000" / "generations.npz")
    template = templates.make_template(hub.load_tokenizer(STORIES), run.data)
    assert kept["tokens"].tolist() == 8 * template.target_tokens("No.")
    for step in steps:  # of one triplet each
        assert step["triplets"] == 1
        rewards = (jnp.array([step[name]]) for name in ("rewards/chosen", "rewards/rejected"))
        loss = objective.dpo_loss(*rewards, jnp.zeros(1), jnp.zeros(1), beta=1.0)
        assert step["loss"] == pytest.approx(float(loss), rel=1e-5)


def test_spin_plays_two_rounds_of_responses_against_one_player(tmp_path):
    said = []
    table = loop.play(small_run(tmp_path, ROOT / "configs" / "baselines" / "spin.yaml"), said.append)
    assert [line["players"] for line in table] == [1, 1, 1]
    assert [line["triplets"] for line in table] == [12, 24, 24]
    assert "opponents" in "\n".join(said)
    assert "D_2, D_1" in "\n".join(said)
    scored = [path.name for path in sorted(tmp_path.glob("round_0002/scores*"))]
    assert scored == ["scores_of_player_0002.npz"]
