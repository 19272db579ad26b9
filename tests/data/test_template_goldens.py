"""The ids of whole tokenizers: fifty conversations of each of three, and of each template written for the tests.

`scripts/template_goldens.py` wrote them: the text of transformers' `apply_chat_template`, and the ids of its generation
prompt with reasoning and without.
"""

import gzip
import itertools
import json
import unicodedata

import pytest
from conftest import FIXTURES

from tpaw_jax.config import DataConfig
from tpaw_jax.data import templates
from tpaw_jax.data.records import parse_record
from tpaw_jax.models import hub

LINES = gzip.decompress((FIXTURES / "template_goldens.jsonl.gz").read_bytes()).decode().splitlines()
of_template = lambda golden: (golden["tokenizer"], golden["template"])
GOLDENS = {key: list(group) for key, group in itertools.groupby(map(json.loads, LINES), of_template)}


def encode_all(key, **config):
    """Each golden with the tokens of its record, and the template."""
    tokenizer = hub.load_tokenizer(str(FIXTURES / "tokenizers" / key[0]))
    given = "auto" if key[0] == key[1] else str(FIXTURES / "chat_templates" / f"{key[1]}.jinja")
    template = templates.make_template(tokenizer, DataConfig(chat_template=given, **config))
    for golden in GOLDENS[key]:
        record = parse_record({"messages": golden["messages"], "tools": golden["tools"]}, "golden")
        yield golden, record, template.encode(record), template


def test_there_are_fifty_conversations_of_each():
    assert [len(goldens) for goldens in GOLDENS.values()] == [50] * 7


@pytest.mark.parametrize("key", GOLDENS, ids="-".join)
def test_prompt_and_target_are_the_text_of_transformers(key):
    for golden, _, found, template in encode_all(key):
        end = template.tokenizer.eos_token if key[1] == "no_generation_prompt" else ""
        text = golden["text"].removesuffix("\n") + end
        if key[0].startswith("qwen"):
            text = unicodedata.normalize("NFC", text)
        assert template.tokenizer.decode(found.prompt + found.target) == text


@pytest.mark.parametrize("key", [key for key in GOLDENS if key[1] != "no_generation_prompt"], ids="-".join)
def test_prompt_ids_are_those_of_the_generation_prompt(key):
    reasons = 0
    for golden, record, found, template in encode_all(key):
        with_reasoning, without = golden["prompts"]
        assert found.prompt in (with_reasoning, without)
        assert template.prompt_tokens(record.messages, record.tools) == without
        reasons += found.prompt != without
    assert (reasons > 5) == (key[1] == "qwen3")


@pytest.mark.parametrize("thinking", ["on", "off"])
def test_reasoning_that_is_switched_decides_the_prompt(thinking):
    key = ("qwen3", "qwen3")
    switched, refused = 0, 0
    tokenizer = hub.load_tokenizer(str(FIXTURES / "tokenizers" / "qwen3"))
    template = templates.make_template(tokenizer, DataConfig(thinking=thinking))
    for golden in GOLDENS[key]:
        record = parse_record({"messages": golden["messages"], "tools": golden["tools"]}, "golden")
        try:
            found = template.encode(record)
        except ValueError:
            refused += 1
            continue
        switched += found.prompt == golden["prompts"][thinking == "off"]
    assert switched + refused == len(GOLDENS[key])
    assert (refused > 5) == (thinking == "off")
