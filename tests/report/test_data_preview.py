"""`tpaw data`: the report's numbers, and tokens that together are the text."""

import json
import re

import numpy as np
import pytest
from conftest import STORIES

from tpaw_jax import cli
from tpaw_jax.config import DataConfig, SourceConfig
from tpaw_jax.data import dataset, templates
from tpaw_jax.models import hub
from tpaw_jax.report import data_preview
from tpaw_jax.types import Prompts

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def conversation(question, answer, *behind):
    turns = [("user", question), ("assistant", answer), *behind]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.fixture(scope="module")
def tokenizer(smollm2_path):
    return hub.load_tokenizer(smollm2_path)


@pytest.fixture
def loaded(tmp_path, tokenizer):
    lines = [
        conversation("Why?", "Because 🙂."),
        conversation("Why?", "\n\nBecause 🙂."),
        conversation("Why?", "\n\nBecause 🙂."),
        conversation("Who?", "<think>\nhm\n</think>\n\nMe.", ("user", "Thanks.")),
        conversation("What?", ""),
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = DataConfig(sources=(SourceConfig(str(path)),), chat_template=CHATML, skip_bad_records=True)
    template = templates.make_template(tokenizer, config)
    return (*dataset.load(config, template, 0), template)


def test_the_report_counts(loaded):
    found = dict(
        re.match(r"(\S.*?|  \S.*?)  +(\S.*)", line).groups() for line in data_preview.report(*loaded).splitlines()[:13]
    )
    assert found["records"] == "4"
    assert found["prompts for training"] == "4"
    assert found["skipped records"] == "1"
    assert found["with turns behind the answer"] == "1 (25.0%)"
    assert found["with reasoning in the answer"] == "1 (25.0%)"
    assert found["with tools"] == "0 (0.0%)"
    assert (found["repeated prompts"], found["repeated prompts with target"]) == ("2", "1")
    assert found["boundary within a token"] == "2"  # "assistant\n" before "\n\nBecause"
    assert "a.jsonl, line 5, field 'messages', turn 1: the field 'content' is empty" in data_preview.report(*loaded)


@pytest.mark.parametrize("width", [20, 80, 160])
@pytest.mark.parametrize("color", [True, False])
def test_the_tokens_shown_are_the_text_in_lines_that_fit(loaded, width, color):
    prompts, _, _, template = loaded
    for number in range(len(prompts)):
        first, *lines = data_preview.show(prompts, number, template, width, color).split("\n")
        assert first.startswith(f"prompt {prompts.ids[number]}: ")
        plain = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in lines]
        assert all(len(line) <= width for line in plain)
        shown = re.sub(r"\[(prompt|target|end of turn)\]", "", "".join(plain)).replace("⏎", "\n")
        ids = np.concatenate([prompts.prompt_tokens[number], prompts.target_tokens[number]])
        assert shown == template.tokenizer.decode(ids)


def test_a_truncated_target_shows_no_end_of_turn(loaded):
    prompts, _, _, template = loaded
    cut = Prompts(prompts.ids, prompts.prompt_tokens, tuple(y[:-1] for y in prompts.target_tokens))
    assert "[end of turn]" in data_preview.show(prompts, 0, template, 80, False)
    assert "[end of turn]" not in data_preview.show(cut, 0, template, 80, False)


def test_the_command_reports_and_shows(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"prompt": "Once", "completion": "upon a time"}\n' * 3)
    (tmp_path / "run.yaml").write_text(
        f"policy: {{path: {STORIES}}}\ndata: {{chat_template: none, sources: [{{path: {tmp_path}/a.jsonl}}]}}\n"
    )
    assert cli.main(["data", "--config", str(tmp_path / "run.yaml"), "--show", "1"]) == 0
    printed = capsys.readouterr().out
    assert "repeated prompts                2" in printed
    assert "[prompt], [target], [end of turn]" in printed
    assert "[prompt]<s> Once[target] upon a time[end of turn]" in printed
