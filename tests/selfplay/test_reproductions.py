"""The configurations of the paper's runs, with a shrunken model of their family, play their first round here."""

import json
import runpy

import jax
import pytest
from conftest import ROOT, STORIES

from tpaw_jax import models
from tpaw_jax.config import SourceConfig, config_file
from tpaw_jax.models import hub
from tpaw_jax.selfplay import loop

RUNS = {"llama31_8b_ultrachat": "llama", "qwen25_1b5_ultrachat": "qwen2", "qwen25_1b5_gsm8k": "qwen2"}


def small_model(directory, family):
    """A random model of two layers with the tokenizer of the stories."""
    config = models.ModelConfig(family, 512, 64, 96, 2, 4, 2, 16, 1e4, 1e-5, 256, True, qkv_bias=family == "qwen2")
    params = models.Transformer(config).init(jax.random.key(0), jax.numpy.zeros((1, 8), jax.numpy.int32))["params"]
    models.save_pretrained(directory, config, params, hub.load_tokenizer(STORIES))
    return directory


@pytest.mark.parametrize("name", RUNS)
def test_a_reproduction_plays_its_first_steps(name, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
    problems = tmp_path / "problems.jsonl"
    problems.write_text(
        "".join(json.dumps({"question": f"{i} + 1?", "answer": f"#### {i + 1}"}) + "\n" for i in range(9))
    )
    shrunk = {
        "directory": tmp_path / "run",
        "policy.path": small_model(tmp_path / "model", RUNS[name]),
        "data.sources": f"[{{path: {problems}}}]",
        "data.chat_template": "none",
        "data.holdout_prompts": 1,
        "data.max_prompt_length": 16,
        "data.max_length": 48,
        "sampling.max_new_tokens": 8,
        "sampling.slots": 8,
        "sampling.tensor": 1,
        "packing.row_length": 128,
        "mesh.preset": "''",
        "rounds": 1,
    }
    given = config_file.load(ROOT / "configs" / f"{name}.yaml")
    if given.evaluation.tasks:
        shrunk["evaluation.tasks"] = f"[{{name: gsm8k, path: {problems}, max_new_tokens: 8}}]"
    run = config_file.load(ROOT / "configs" / f"{name}.yaml", [f"{key}={value}" for key, value in shrunk.items()])
    assert (run.objective, run.train) == (given.objective, given.train)
    (line,) = loop.play(run, lambda _: None)
    assert line["triplets"] == 8
    assert line["steps"] >= 1
    assert line["skipped"] == 0
    assert ("eval/gsm8k" in line) == bool(given.evaluation.tasks)


def test_the_subset_is_of_first_exchanges_and_does_not_depend_on_its_size(tmp_path):
    subset = runpy.run_path(str(ROOT / "scripts" / "prepare_spin_subset.py"))["subset"]
    path = tmp_path / "conversations.jsonl"
    turns = lambda i: [
        {"role": "user", "content": f"question {i}"},
        {"role": "assistant", "content": f"answer {i}"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "no"},
    ]
    path.write_text("".join(json.dumps({"messages": turns(i)}) + "\n" for i in range(20)))
    source = SourceConfig(str(path))
    few, count = subset(source, 5, 42)
    more, _ = subset(source, 12, 42)
    assert count == 20
    assert more[:5] == few
    assert all(r["prompt"].removeprefix("question ") == r["completion"].removeprefix("answer ") for r in more)
    assert len({r["prompt"] for r in more}) == 12
    path.write_text(json.dumps({"messages": turns(0)[1:]}) + "\n")
    with pytest.raises(ValueError, match="line 1, field 'messages': the first two turns"):
        subset(source, 5, 42)
