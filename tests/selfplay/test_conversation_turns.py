"""A run that trains on every assistant turn: its packed conversations get the scores of single sequences."""

import json

import jax
import numpy as np
import torch
import transformers
from conftest import STORIES, small_run

from tpaw_jax.data import dataset, templates
from tpaw_jax.selfplay import loop
from tpaw_jax.storage import array_files
from tpaw_jax.types import TARGET

CHAT = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
WORDS = ("Tom", "had", "a red", "ball", "and", "ran to", "the", "park", "with", "Sue")


def test_every_score_of_a_conversations_turns_is_that_of_transformers(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    say = lambda role: {"role": role, "content": " ".join(rng.choice(WORDS, rng.integers(3, 7)))}
    dialogs = [[say(role) for _ in range(rng.integers(1, 4)) for role in ("user", "assistant")] for _ in range(9)]
    path = tmp_path / "dialogs.jsonl"
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in dialogs))
    settings = {"data.sources": f"[{{path: {path}}}]", "data.train_on": "all", "data.chat_template": f"'{CHAT}'"}
    settings |= {"data.max_prompt_length": 90, "data.max_length": 110, "data.holdout_prompts": 1, "rounds": 1}
    run = small_run(tmp_path / "run", **settings, **{"data.max_prompts": 0, "packing.row_length": 256})
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
    (line,) = loop.play(run, lambda _: None)
    assert line["skipped"] == 0

    template = templates.make_template(transformers.AutoTokenizer.from_pretrained(STORIES), run.data)
    prompts, held_out, _ = dataset.load(run.data, template, run.seed)
    assert len(prompts) == line["triplets"] == sum(len(turns) // 2 for turns in dialogs) - len(held_out)
    generated = array_files.read(tmp_path / "run/round_0000/generations.npz")
    responses = np.split(generated["tokens"], np.cumsum(generated["lengths"])[:-1])
    model = transformers.LlamaForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    scores = array_files.read(tmp_path / "run/round_0000/scores_of_player_0000.npz")
    assert len(scores["log_probs"]) > 1.5 * len(prompts)
    for i, source, score in zip(scores["prompt_index"], scores["source"], scores["log_probs"], strict=True):
        x, y = prompts.prompt_tokens[i], prompts.target_tokens[i] if source == TARGET else responses[i]
        with torch.no_grad():
            logits = model(torch.tensor(np.concatenate([x, y]))[None].long()).logits[0, len(x) - 1 : -1]
        expected = -torch.nn.functional.cross_entropy(logits, torch.tensor(y).long(), reduction="sum")
        np.testing.assert_allclose(score, float(expected), atol=1e-3)
