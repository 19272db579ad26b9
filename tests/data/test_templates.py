"""Conversations as tokens: what transformers' `apply_chat_template` renders, cut where generation begins."""

import copy
import os

import pytest
from conftest import FIXTURES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tpaw_jax.config import DataConfig
from tpaw_jax.data import templates
from tpaw_jax.data.records import parse_record
from tpaw_jax.generation.policy import stop_tokens
from tpaw_jax.models import hub

TEMPLATES = {path.stem: path.read_text() for path in sorted((FIXTURES / "chat_templates").glob("*.jinja"))}
TOOLS = ("qwen2.5", "qwen3")
"""Templates that render tools and their calls; all but `alternating` render any other role."""
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
ADDED = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
EXAMPLES = int(os.environ.get("TPAW_CONVERSATIONS", "10"))
"""Conversations of each template and setting."""

USER = {"role": "user", "content": "Why?"}
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}}}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "add", "arguments": {"a": [1, "x"]}}}],
}


def answer(content, **fields):
    return {"role": "assistant", "content": content, **fields}


@pytest.fixture(scope="module")
def tokenizer(smollm2_path):
    """SmolLM2's tokenizer with the special tokens of other families."""
    tokenizer = hub.load_tokenizer(smollm2_path)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.add_tokens(ADDED)
    return tokenizer


def template_of(tokenizer, name, thinking="auto", **config):
    return templates.make_template(tokenizer, DataConfig(chat_template=TEMPLATES[name], thinking=thinking, **config))


def encoded(tokenizer, name, record, thinking="auto"):
    """The prompt and the target of a raw record, as texts."""
    found = template_of(tokenizer, name, thinking).encode(parse_record(record, "here"))
    return tokenizer.decode(found.prompt), tokenizer.decode(found.target)


words = st.text(st.sampled_from("ab é\n\t.{}<>🙂\u200b"), max_size=12)
contents = st.builds("".join, st.tuples(words, st.sampled_from("xyz"), words))
thoughts = st.builds("<think>\n{}\n</think>\n\n{}".format, contents, contents)
calls = st.builds(
    lambda content, arguments: {**copy.deepcopy(CALL), "content": content} | {"tool_calls": arguments},
    st.one_of(st.just(""), contents),
    st.lists(
        st.builds(
            lambda name, arguments: {"type": "function", "function": {"name": name, "arguments": arguments}},
            st.sampled_from(["add", "look_up"]),
            st.dictionaries(st.sampled_from("ab"), st.one_of(st.integers(), contents, st.none()), max_size=2),
        ),
        min_size=1,
        max_size=2,
    ),
)


def conversations(name):
    """Conversations that the template has words for, as it reads them, and their tools."""
    reasoning = st.builds(lambda c, r: answer(c, reasoning_content=r), contents, contents)
    answers = st.builds(answer, st.one_of(contents, thoughts))
    users = st.builds(lambda c: {"role": "user", "content": c}, contents)
    exchange = st.tuples(users, answers)
    if name in TOOLS:
        results = st.builds(lambda c: {"role": "tool", "content": c}, contents)
        exchange = st.one_of(exchange, st.tuples(users, calls, results, answers))
    last = st.one_of(answers, reasoning) if name == "qwen3" else answers
    last = st.one_of(last, calls) if name in TOOLS else last
    system = st.builds(lambda c: [{"role": "system", "content": c}], contents)
    start = st.just([]) if name == "alternating" else st.one_of(st.just([]), system)
    turns = st.builds(
        lambda start, earlier, user, last: [*start, *(turn for some in earlier for turn in some), user, last],
        start,
        st.lists(exchange, max_size=2),
        users,
        last,
    )
    return st.tuples(turns, st.sampled_from([[], [ADD]]) if name in TOOLS else st.just([]))


@pytest.mark.parametrize("thinking", ["auto", "on"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_and_target_are_the_whole_conversation_cut_where_generation_begins(tokenizer, name, thinking):
    template = template_of(tokenizer, name, thinking)
    apply = lambda turns, tools, **options: tokenizer.apply_chat_template(
        turns, chat_template=TEMPLATES[name], tools=tools or None, tokenize=False, **options
    )

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(conversations(name))
    def check(conversation):
        turns, tools = conversation
        record = parse_record({"messages": turns, "tools": tools}, "here")
        found, whole = template.encode(record), apply(turns, tools)
        prompt, target = tokenizer.decode(found.prompt), tokenizer.decode(found.target)
        appended = tokenizer.eos_token if name == "no_generation_prompt" else ""
        assert prompt + target == whole.removesuffix("\n") + appended
        openings = [apply(turns[:-1], tools, add_generation_prompt=True, enable_thinking=on) for on in (True, False)]
        if name == "no_generation_prompt":
            openings = [f"{openings[0]}### assistant: "]
        assert prompt in openings if thinking == "auto" else prompt == openings[0]
        assert found.prompt == tokenizer.encode(prompt, add_special_tokens=False)
        without_thinking = thinking == "on" or prompt == openings[-1]
        assert not without_thinking or found.prompt == template.prompt_tokens(record.messages, record.tools)

    check()


THOUGHT = "<think>\nhm\n</think>\n\nBecause."
EMPTY = "<think>\n\n</think>\n\n"
CALLED = '<tool_call>\n{"name": "add", "arguments": {"a": [1, "x"]}}\n</tool_call>'


@pytest.mark.parametrize(
    ("name", "thinking", "last", "block", "target"),
    [
        ("qwen3", "auto", answer(THOUGHT), "", THOUGHT),  # in the text
        ("qwen3", "auto", answer("Because.", reasoning_content="hm"), "", THOUGHT),  # in a field
        ("qwen3", "auto", answer("Because.", reasoning="hm"), "", THOUGHT),  # in a field of another name
        ("qwen3", "auto", answer("Because."), EMPTY, "Because."),
        ("qwen3", "on", answer("Because."), "", EMPTY + "Because."),
        ("qwen3", "off", answer("Because."), EMPTY, "Because."),
        ("qwen3", "auto", CALL, EMPTY, CALLED),
        ("qwen2.5", "auto", answer(THOUGHT), "", THOUGHT),
        ("qwen2.5", "auto", CALL, "", CALLED),
        ("qwen2.5", "auto", answer("\nBecause."), "", "\nBecause."),  # the ids part where a tokenizer would merge
        ("trims", "auto", answer("  Because. \n"), "", "Because."),
    ],
)
def test_targets_are_what_the_template_renders(tokenizer, name, thinking, last, block, target):
    prompt, found = encoded(
        tokenizer, name, {"messages": [USER, last], "tools": [ADD] * ("tool_calls" in last)}, thinking
    )
    assert prompt.endswith(f"Why?<|im_end|>\n<|im_start|>assistant\n{block}")
    assert found == f"{target}<|im_end|>"


def test_llamas_template_trims_and_ends_turns_with_its_own_token(tokenizer):
    prompt, target = encoded(tokenizer, "llama-3.1", {"messages": [USER, answer("  Because. \n")]})
    assert prompt.count(tokenizer.bos_token) == 1
    assert target == "Because.<|eot_id|>"


def test_arguments_as_text_are_rendered_as_the_object_that_they_are(tokenizer):
    call = copy.deepcopy(CALL)
    call["tool_calls"][0]["function"]["arguments"] = '{"a": [1, "x"]}'
    for name in TOOLS:
        as_text, as_object = ({"messages": [USER, last], "tools": [ADD]} for last in (call, CALL))
        assert encoded(tokenizer, name, as_text) == encoded(tokenizer, name, as_object)


def test_earlier_reasoning_is_rendered_as_the_template_does(tokenizer):
    turns = [USER, answer(THOUGHT), USER, answer("So.")]
    for name in ("qwen3", "rewrites_thinking"):
        prompt, _ = encoded(tokenizer, name, {"messages": turns})
        assert "hm" not in prompt
        assert "assistant\nBecause.<|im_end|>" in prompt


def test_template_arguments_reach_the_template(tokenizer):
    template = template_of(tokenizer, "qwen3", template_arguments={"enable_thinking": True})
    assert tokenizer.decode(template.prompt_tokens([USER])).endswith("assistant\n")


@pytest.mark.parametrize("thinking", ["auto", "on", "off"])
def test_an_exported_template_renders_by_default_as_the_run_did(tokenizer, thinking):
    template = template_of(tokenizer, "qwen3", thinking, template_arguments={"unused": "x"})
    apply = lambda chat, **options: tokenizer.apply_chat_template(
        [USER], chat_template=chat, tokenize=False, add_generation_prompt=True, **options
    )
    exported = template.with_defaults()
    default = {"auto": {}, "on": {"enable_thinking": True}, "off": {"enable_thinking": False}}[thinking]
    assert apply(exported) == apply(TEMPLATES["qwen3"], **default)
    for choice in (True, False):
        assert apply(exported, enable_thinking=choice) == apply(TEMPLATES["qwen3"], enable_thinking=choice)


def test_what_a_template_would_leave_out_is_refused(tokenizer):
    cases = [
        ("trims", {"messages": [USER, CALL], "tools": [ADD]}, "has 'tools', which the template in data.chat_template"),
        ("trims", {"messages": [USER, CALL]}, "has 'tool_calls', which the template in data.chat_template does not"),
        (
            "trims",
            {"messages": [USER, answer("x", reasoning_content="hm")]},
            "leaves out the field 'reasoning_content'",
        ),
        ("alternating", {"messages": [{"role": "system", "content": "s"}, USER, answer("x")]}, "must alternate"),
    ]
    for name, record, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            encoded(tokenizer, name, record)
    plain = templates.make_template(tokenizer, DataConfig(chat_template="none"))
    with pytest.raises(ValueError, match=r"has 'tool_calls', which data\.chat_template 'none' does not use"):
        plain.encode(parse_record({"messages": [USER, CALL]}, "here"))


def test_a_template_that_cannot_be_reconciled_is_quoted_where_the_texts_part(tokenizer):
    with pytest.raises(
        ValueError, match=r"generation prompt has .*<think>\\n\\n</think>.* conversation has .*\\nhm\\n"
    ):
        encoded(tokenizer, "qwen3", {"messages": [USER, answer(THOUGHT)]}, "off")
    opens = TEMPLATES["trims"].replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>\\n'")
    template = templates.make_template(tokenizer, DataConfig(chat_template=opens))
    with pytest.raises(ValueError, match="does not continue its own generation prompt with the answer"):
        template.encode(parse_record({"messages": [USER, answer("Because.")]}, "here"))


def test_tokens_that_the_model_lacks_are_refused_by_name(tokenizer):
    known = tokenizer.convert_tokens_to_ids("<|eot_id|>")  # the last of the special tokens; `ADDED` follow
    fits = templates.make_template(tokenizer, DataConfig(chat_template=TEMPLATES["trims"]), len(tokenizer))
    fits.encode(parse_record({"messages": [USER, answer("<think>")]}, "here"))
    small = templates.make_template(tokenizer, DataConfig(chat_template=TEMPLATES["trims"]), known + 1)
    small.encode(parse_record({"messages": [USER, answer("think")]}, "here"))
    with pytest.raises(ValueError, match=rf"id {known + 1} for '<think>', but the model's vocabulary has {known + 1} "):
        small.encode(parse_record({"messages": [USER, answer("<think>")]}, "here"))
    with pytest.raises(ValueError, match=rf"id {known} for '<\|eot_id\|>', but the model's vocabulary has {known} tok"):
        templates.make_template(tokenizer, DataConfig(chat_template=TEMPLATES["llama-3.1"]), known)


def test_every_end_token_that_the_tokenizer_or_the_model_names_ends_a_response(tokenizer):
    template = template_of(tokenizer, "llama-3.1")
    eos, eot = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert eos != eot == template.end_of_turn
    assert stop_tokens(template, {}) == sorted({eos, eot})
    assert stop_tokens(template, {"eos_token_id": 0}) == sorted({0, eos, eot})
    assert stop_tokens(template, {"eos_token_id": [0, 7, eot]}) == sorted({0, 7, eos, eot})


def test_texts_that_begin_with_a_space_for_the_tokenizer_are_not_given_one_in_the_middle(stories_tokenizer):
    """A SentencePiece tokenizer puts a space before the text that it begins with."""
    template = templates.make_template(stories_tokenizer, DataConfig(chat_template=TEMPLATES["alternating"]))
    found = template.encode(parse_record({"messages": [USER, answer("Because.")]}, "here"))
    turns = [USER, answer("Because.")]
    whole = stories_tokenizer.apply_chat_template(turns, chat_template=TEMPLATES["alternating"], tokenize=False)
    assert found.prompt + found.target == stories_tokenizer.encode(whole, add_special_tokens=False)
