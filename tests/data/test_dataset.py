"""Record shapes, templates, limits, mixes, and sentences for records that cannot be used."""

import dataclasses
import json

import datasets
import numpy as np
import pytest
from conftest import DEMO, STORIES

from tpaw_jax.config import DataConfig, PackingConfig, SourceConfig
from tpaw_jax.data import dataset, prefix_trees, segments, templates
from tpaw_jax.data.records import Record, parse_record
from tpaw_jax.models import hub

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
USER = {"role": "user", "content": "Why?"}
ASSISTANT = {"role": "assistant", "content": "Because."}
EXPECTED = Record((USER,), ASSISTANT)


@pytest.fixture
def smollm2_tokenizer(smollm2_path):
    return hub.load_tokenizer(smollm2_path)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Why?", "completion": "Because."},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"prompt": [USER], "completion": "Because."},
        {"messages": [USER, ASSISTANT]},
        {"messages": [USER, ASSISTANT, {"role": "user", "content": "Thanks."}]},
        {"real": [USER, ASSISTANT], "generated": [USER, {"role": "assistant", "content": "No idea."}]},
        {"instruction": "Why?", "input": "", "output": "Because."},
        {"question": "Why?", "answer": "Because."},
    ],
)
def test_record_shapes_that_people_have(record):
    parsed = parse_record(record, "here")
    assert dataclasses.replace(parsed, turns_behind=0) == EXPECTED


def test_multi_turn_conversations_and_inputs_become_the_prompt():
    more = [USER, ASSISTANT, {"role": "user", "content": "Really?"}, {"role": "assistant", "content": "Yes."}]
    record = parse_record({"messages": more}, "here")
    assert record == Record(tuple(more[:3]), more[3])
    record = parse_record({"instruction": "Add.", "input": "1 2", "output": "3"}, "here")
    assert record.messages[0]["content"] == "Add.\n\n1 2"


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        (3, "f, line 7: expected a record with named fields, got int"),
        ({"text": "hm"}, "f, line 7: the fields 'text' match no known record format"),
        ({"prompt": "Why?", "completion": ""}, "f, line 7: the field 'completion' is empty"),
        ({"prompt": 3, "completion": "x"}, "f, line 7: the field 'prompt' must be a string, got int"),
        ({"question": "Why?"}, "f, line 7: the field 'answer' is missing"),
        ({"messages": [USER]}, "f, line 7, field 'messages': the conversation has no assistant turn"),
        ({"messages": [ASSISTANT]}, "f, line 7, field 'messages': the conversation has no turn before the target"),
        ({"messages": "Why?"}, "f, line 7, field 'messages': expected a list of turns, got str"),
        ({"messages": [{"content": "x"}]}, "f, line 7, field 'messages', turn 0: a turn needs"),
        ({"real": [USER, {"role": "assistant"}]}, "f, line 7, field 'real', turn 1: the field 'content' is missing"),
    ],
)
def test_malformed_records_name_file_line_and_field(record, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse_record(record, "f, line 7")


def load(sources, tokenizer, seed=0, **config):
    settings = DataConfig(sources=tuple(SourceConfig(*s) for s in sources), **{"chat_template": "none", **config})
    return dataset.load(settings, templates.make_template(tokenizer, settings), seed)


def write_lines(path, records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return str(path)


def records(count, name="x"):
    return [{"prompt": f"{name} {i} says", "completion": f"the number {i}"} for i in range(count)]


def test_every_kind_of_file_gives_the_same_prompts(tmp_path, stories_tokenizer):
    made = datasets.Dataset.from_list(records(6))
    made.to_parquet(tmp_path / "a.parquet")
    made.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=made).save_to_disk(tmp_path / "dict")
    (tmp_path / "a.json").write_text(json.dumps(records(6)))
    write_lines(tmp_path / "a.jsonl", records(6))
    fingerprints = {
        load([(str(tmp_path / name),)], stories_tokenizer)[2].fingerprint
        for name in ("a.parquet", "saved", "dict", "a.json", "a.jsonl")
    }
    assert len(fingerprints) == 1


def test_bad_lines_stop_the_load_or_are_counted_and_listed(tmp_path, stories_tokenizer):
    path = write_lines(tmp_path / "a.jsonl", [*records(3), "{not json", {"prompt": "x"}, "", *records(1, "y")])
    with pytest.raises(ValueError, match=r"a.jsonl, line 4: not valid JSON"):
        load([(path,)], stories_tokenizer)
    prompts, _, report = load([(path,)], stories_tokenizer, skip_bad_records=True)
    assert len(prompts) == 4
    assert [s.split(": ")[0].split("/")[-1] for s in report.skipped] == ["a.jsonl, line 4", "a.jsonl, line 5"]


def test_what_cannot_be_read_is_told(tmp_path, stories_tokenizer):
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(
        ValueError, match=r"a.txt.*the file extension is not one of .jsonl, .json, .csv, .tsv, .parquet"
    ):
        load([(str(tmp_path / "a.txt"),)], stories_tokenizer)
    with pytest.raises(ValueError, match=r"data source 'nobody/nothing' .* could not be read"):
        load([("nobody/nothing",)], stories_tokenizer)
    with pytest.raises(ValueError, match="leave no prompt to train on"):
        load([(write_lines(tmp_path / "b.jsonl", records(2)),)], stories_tokenizer, holdout_prompts=2)


def test_sources_are_mixed_by_weight_and_chosen_by_the_seed(tmp_path, stories_tokenizer):
    a, b = write_lines(tmp_path / "a.jsonl", records(10)), write_lines(tmp_path / "b.jsonl", records(10, "zebra"))
    sources = [(a, "train", 0.5), (b, "train", 1.2)]
    prompts, _, report = load(sources, stories_tokenizer)
    assert report.records == 5 + 12
    again, other = load(sources, stories_tokenizer), load(sources, stories_tokenizer, seed=1)
    assert again[2].fingerprint == report.fingerprint != other[2].fingerprint
    held = load(sources, stories_tokenizer, holdout_prompts=4, max_prompts=6)
    assert (len(held[0]), len(held[1])) == (6, 4)
    assert not set(held[0].ids) & set(held[1].ids)
    assert len(set(prompts.ids)) == len(prompts)


def test_plain_text_has_one_bos_and_one_end_of_turn(tmp_path, stories_tokenizer):
    prompts, _, _ = load([(write_lines(tmp_path / "a.jsonl", records(2)),)], stories_tokenizer)
    for x, y in zip(prompts.prompt_tokens, prompts.target_tokens, strict=True):
        assert x[0] == 1
        assert (x[1:] != 1).all()
        assert y[-1] == 1
        assert (y[:-1] != 1).all()
    text = stories_tokenizer.decode(np.concatenate([prompts.prompt_tokens[0], prompts.target_tokens[0]])[1:-1])
    assert " says the number " in text


def test_prompts_lose_their_beginning_and_targets_their_end(tmp_path, stories_tokenizer):
    path = write_lines(tmp_path / "a.jsonl", records(1))
    (x,), (y,) = (lambda p: (p.prompt_tokens, p.target_tokens))(load([(path,)], stories_tokenizer)[0])
    cut, _, report = load([(path,)], stories_tokenizer, max_prompt_length=4, max_length=7)
    np.testing.assert_array_equal(cut.prompt_tokens[0], x[-4:])
    np.testing.assert_array_equal(cut.target_tokens[0], y[:3])
    assert (report.prompts_cut, report.targets_cut) == (1, 1)


def say(*contents, system=None):
    roles = ("user", "assistant") * len(contents)
    turns = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    return {"messages": [{"role": "system", "content": system}, *turns] if system else turns}


def test_every_assistant_turn_can_be_a_target(tmp_path, smollm2_tokenizer):
    greeted = {"messages": [ASSISTANT, *say("More?", "No.")["messages"]]}  # nothing asked for the first answer
    path = write_lines(tmp_path / "a.jsonl", [say("One?", "1", "Two?", "2", "Three?", "3", system="Count."), greeted])
    prompts, _, report = load([(path,)], smollm2_tokenizer, chat_template="auto", train_on="all")
    text = lambda tokens: smollm2_tokenizer.decode(tokens)
    by_target = {text(y)[:1]: i for i, y in enumerate(prompts.target_tokens)}
    assert sorted(by_target) == ["1", "2", "3", "N"]
    assert report.records == 2
    assert len({prompts.conversations[by_target[name]] for name in "123"}) == 1
    assert prompts.conversations[by_target["N"]] != prompts.conversations[by_target["1"]]
    second = (
        "<|im_start|>system\nCount.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n1<|im_end|>"
    )
    assert text(prompts.prompt_tokens[by_target["2"]]).startswith(second)
    found = segments.segments_of(prefix_trees.trees_of_targets(prompts), PackingConfig(row_length=256))
    whole = max(len(x) + len(y) for x, y in zip(prompts.prompt_tokens, prompts.target_tokens, strict=True))
    assert max(segment.length for segment in found) == whole - 1


def test_conversations_are_held_out_whole(tmp_path, smollm2_tokenizer):
    path = write_lines(tmp_path / "a.jsonl", [say(f"{i}?", "a", f"{i}!", "b") for i in range(8)])
    prompts, held_out, _ = load(
        [(path,)], smollm2_tokenizer, chat_template="auto", train_on="all", holdout_prompts=3, max_prompts=4
    )
    assert (len(prompts), len(held_out)) == (8, 6)
    assert not set(prompts.conversations) & set(held_out.conversations)
    assert load([(path,)], smollm2_tokenizer, chat_template="auto")[0].conversations is None


def test_a_turn_that_the_template_refuses_skips_its_conversation(tmp_path, smollm2_tokenizer):
    chat = CHATML.replace("{{ m.content }}", "{% if m.content == 'bad' %}{{ no.such }}{% endif %}{{ m.content }}")
    path = write_lines(tmp_path / "a.jsonl", [say("One?", "1", "Two?", "2"), say("One?", "bad", "Two?", "2")])
    config = {"chat_template": chat, "train_on": "all"}
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: The chat template rejects .* user, assistant"):
        load([(path,)], smollm2_tokenizer, **config)
    prompts, _, report = load([(path,)], smollm2_tokenizer, skip_bad_records=True, **config)
    assert (len(prompts), len(report.skipped)) == (2, 1)


def test_the_template_that_generates_is_the_one_that_trains(smollm2_tokenizer):
    template = templates.make_template(smollm2_tokenizer, DataConfig())
    prompt, target = template.prompt_tokens([USER]), template.target_tokens("Because.")
    whole = smollm2_tokenizer.apply_chat_template([USER, ASSISTANT], tokenize=False)
    assert smollm2_tokenizer.decode(prompt + target) + "\n" == whole
    assert target.count(template.end_of_turn) == 1


def test_a_given_template_and_a_system_prompt_are_used(tmp_path, smollm2_tokenizer):
    file = tmp_path / "chatml.jinja"
    file.write_text(CHATML)
    for given in (CHATML, str(file)):
        template = templates.make_template(
            smollm2_tokenizer, DataConfig(chat_template=given, system_prompt="Be brief.")
        )
        text = smollm2_tokenizer.decode(template.prompt_tokens([USER]))
        assert (
            text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
        )


def test_a_template_that_writes_its_own_bos_gets_no_second_one(stories_tokenizer):
    chat = "<s>{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    template = templates.make_template(stories_tokenizer, DataConfig(chat_template=chat))
    assert template.prompt_tokens([USER]).count(1) == 1
    assert template.end_of_turn == 2


def test_unusable_templates_are_told(stories_tokenizer):
    cases = {
        "auto": "has no chat template, or several",
        "no/such/file": "is not 'auto', 'none', a Jinja template or a file",
        "{{ messages[0].content }}{% if not add_generation_prompt %}{{ messages[1].content }}{% endif %}{{ x.y.z }}": (
            "The chat template rejects a conversation"
        ),
    }
    for given, sentence in cases.items():
        with pytest.raises(ValueError, match=sentence):
            templates.make_template(stories_tokenizer, DataConfig(chat_template=given))


def test_the_embedded_demo_data_reads(stories_tokenizer):
    prompts, _, report = load([(str(DEMO / "tinystories.jsonl"),)], stories_tokenizer)
    assert len(prompts) == 400
    assert report.skipped == ()
    assert STORIES.is_dir()


def test_what_a_template_leads_in_with_ends_the_prompt(smollm2_tokenizer):
    """Qwen3's template writes an empty block of thought before an assistant's last words."""
    thinking = CHATML.replace(
        "{{ m.content }}", "{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}"
    )
    template = templates.make_template(smollm2_tokenizer, DataConfig(chat_template=thinking))
    whole = smollm2_tokenizer.apply_chat_template([USER, ASSISTANT], chat_template=thinking, tokenize=False)
    ids = template.prompt_tokens([USER]) + template.target_tokens("Because.")
    assert smollm2_tokenizer.decode(ids) + "\n" == whole
    assert smollm2_tokenizer.decode(template.prompt_tokens([USER])).endswith("<think></think>")


def test_a_conversation_that_the_template_rejects_names_its_record(tmp_path, smollm2_tokenizer):
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + CHATML
    system = {"messages": [{"role": "system", "content": "Hm."}, USER, ASSISTANT]}
    path = write_lines(tmp_path / "a.jsonl", [{"messages": [USER, ASSISTANT]}, system])
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: The chat template rejects .* no system turns"):
        load([(path,)], smollm2_tokenizer, chat_template=strict)
    prompts, _, report = load([(path,)], smollm2_tokenizer, chat_template=strict, skip_bad_records=True)
    assert (len(prompts), len(report.skipped)) == (1, 1)


def test_held_out_prompts_are_not_played(tmp_path, stories_tokenizer):
    path = write_lines(tmp_path / "a.jsonl", records(4))
    played, held, _ = load([(path, "train", 3.0)], stories_tokenizer, holdout_prompts=2)
    assert not {p.tobytes() for p in played.prompt_tokens} & {p.tobytes() for p in held.prompt_tokens}
    with pytest.raises(ValueError, match="is not valid Unicode"):
        parse_record({"prompt": "\ud83d", "completion": "x"}, "here")
