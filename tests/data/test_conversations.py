"""Turns of several formats as messages, and sentences for those that cannot be read."""

import json

import pytest

from tpaw_jax.data.conversations import messages_of, tools_of
from tpaw_jax.data.records import parse_record

USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
}
RESULT = {"role": "tool", "content": "3"}
SHAREGPT = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "Why?"},
    {"from": "function_call", "value": '{"name": "f", "arguments": "{}"}'},
    {"from": "observation", "value": "3"},
    {"from": "gpt", "value": "So."},
]


def test_sharegpt_turns_are_read():
    assert messages_of(SHAREGPT, "here") == [SYSTEM, USER, CALL, RESULT, ANSWER]
    record = parse_record({"conversations": SHAREGPT[1:], "system": "Be brief."}, "here")
    assert [*record.messages, record.answer] == [SYSTEM, USER, CALL, RESULT, ANSWER]


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]
    assert messages_of([{"role": "user", "content": parts}], "here") == [USER]
    assert parse_record({"prompt": parts, "completion": "So."}, "here").messages == (USER,)


def test_a_system_text_and_earlier_exchanges_become_turns():
    record = parse_record({"instruction": "Why?", "output": "So.", "system": "Be brief.", "history": [["a", "b"]]}, "f")
    assert [(m["role"], m["content"]) for m in record.messages] == [
        ("system", "Be brief."),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "Why?"),
    ]


def test_tools_are_a_list_or_json_of_one():
    tool = {"type": "function", "function": {"name": "f"}}
    for tools in ([tool], json.dumps([tool]), [json.dumps(tool)]):
        assert tools_of(tools, "here") == (tool,)
    for none in (None, "", []):
        assert tools_of(none, "here") == ()


def test_other_fields_of_a_turn_are_kept_and_empty_ones_are_not():
    turn = {**RESULT, "tool_call_id": "1", "name": None}
    assert messages_of([USER, CALL, turn], "here")[2] == {**RESULT, "tool_call_id": "1"}
    assert messages_of([{**CALL, "content": None}], "here") == [CALL]


def test_turns_behind_the_last_answer_are_counted():
    assert parse_record({"messages": [USER, ANSWER, USER, USER]}, "here").turns_behind == 2


@pytest.mark.parametrize(
    ("turn", "sentence"),
    [
        ({"role": "user", "content": [{"type": "image", "image": "x"}]}, "part 0, is of type 'image'; only parts"),
        ({"role": "user", "content": None}, "turn 1: the field 'content' is missing"),
        ({"from": "narrator", "value": "x"}, "turn 1: the speaker 'narrator' is not known"),
        ({"from": "gpt"}, "turn 1: the field 'value' is missing"),
        (
            {"role": "assistant", "tool_calls": [{"name": 3}]},
            "turn 1, tool call 0: a call needs a function with a name",
        ),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]},
            "tool call 0, arguments: not valid JSON",
        ),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}, r"must be an object, got \[1\]"),
        ({"from": "function_call", "value": "f()"}, "turn 1: not valid JSON"),
    ],
)
def test_turns_that_cannot_be_read_are_told(turn, sentence):
    with pytest.raises(ValueError, match=f"f, line 7, field 'messages', .*{sentence}"):
        parse_record({"messages": [USER, turn]}, "f, line 7")


def test_tools_that_cannot_be_read_are_told():
    for tools, sentence in (
        (3, "expected a list of tools, got int"),
        (["x"], "not valid JSON"),
        ([3], "tool 0: expected"),
    ):
        with pytest.raises(ValueError, match=f"f, line 7, field 'tools'.*{sentence}"):
            parse_record({"messages": [USER, ANSWER], "tools": tools}, "f, line 7")
