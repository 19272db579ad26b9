"""Check the turns of a conversation, and write those of several formats the way chat templates read them.

Templates read a `role`, a `content` of text, `tool_calls` whose arguments are objects, and `reasoning_content`. All
other fields of a turn are passed to them as they are.
"""

import json
from typing import Any

from tpaw_jax.storage import files

Message = dict[str, Any]
"""One turn of a conversation: `role`, `content` and what else the chat template reads."""

SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "function_call"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}
"""The `from` of a ShareGPT turn, and its role."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Fields that hold the reasoning before an answer. Templates read the first; the others are copied to it."""


def messages_of(turns: Any, where: str) -> list[Message]:
    """The turns of a conversation as messages. Empty system turns are dropped.

    Args:
        turns: a list of OpenAI's turns (`role` and `content`) or of ShareGPT's (`from` and `value`).
        where: the place of the conversation, for error messages.

    Raises:
        ValueError: `turns` is not a list, or a turn cannot be read; names `where` and the turn, counted from 0.
    """
    if not isinstance(turns, list | tuple):
        raise ValueError(f"{where}: expected a list of turns, got {type(turns).__name__}.")
    messages = [_message(turn, f"{where}, turn {i}") for i, turn in enumerate(turns)]
    return [m for m in messages if m["role"] != "system" or m["content"]]


def tools_of(tools: Any, where: str) -> tuple[dict[str, Any], ...]:
    """The descriptions of the tools that a conversation may call: a list of objects, or JSON of one.

    Raises:
        ValueError: they are something else.
    """
    tools = files.parse_json(tools, where) if isinstance(tools, str) and tools.strip() else tools
    if not isinstance(tools or [], list | tuple):
        raise ValueError(f"{where}: expected a list of tools, got {type(tools).__name__}.")
    tools = [files.parse_json(tool, where) if isinstance(tool, str) else tool for tool in tools or ()]
    for i, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise ValueError(f"{where}, tool {i}: expected an object that describes the tool, got {tool!r}.")
    return tuple(tools)


def text_of(fields: dict[str, Any], name: str, where: str, may_be_empty: bool = False) -> str:
    """The text of a field: a string, or a list of parts of type text, which are joined.

    Raises:
        ValueError: the field is missing, empty, of another type, or not valid Unicode.
    """
    value = fields.get(name)
    if isinstance(value, list):
        value = "".join(_part(part, f"{where}: the field '{name}', part {i},") for i, part in enumerate(value))
    if value is None and not may_be_empty:
        raise ValueError(f"{where}: the field '{name}' is missing.")
    value = "" if value is None else value
    if not isinstance(value, str):
        raise ValueError(f"{where}: the field '{name}' must be a string, got {type(value).__name__}.")
    if not value.strip() and not may_be_empty:
        raise ValueError(f"{where}: the field '{name}' is empty.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: the field '{name}' is not valid Unicode ({error}).") from error
    return value


def reasoning_of(message: Message) -> str:
    """The reasoning that a message states in a field of its own; empty without one."""
    return message.get(REASONING[0], "")


def has_reasoning(message: Message) -> bool:
    """Tell whether a message has reasoning, in a field of its own or in its text."""
    return bool(reasoning_of(message)) or "</think>" in message["content"]


def _message(turn: Any, where: str) -> Message:
    if isinstance(turn, dict) and "from" in turn and "role" not in turn:
        turn = _from_sharegpt(turn, where)
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        raise ValueError(f"{where}: a turn needs the string fields 'role' and 'content'.")
    message = {key: value for key, value in turn.items() if value is not None}
    role, calls = message["role"], message.pop("tool_calls", None)
    if calls:
        message["tool_calls"] = _tool_calls(calls, where)
    reasoning = next((message[key] for key in REASONING if isinstance(message.get(key), str)), "")
    if reasoning:
        message[REASONING[0]] = reasoning
    may_be_empty = role in ("system", "developer", "tool") or bool(calls)
    return {**message, "content": text_of(turn, "content", where, may_be_empty)}


def _from_sharegpt(turn: dict[str, Any], where: str) -> Message:
    speaker = turn["from"]
    if speaker not in SHAREGPT_ROLES:
        raise ValueError(f"{where}: the speaker {speaker!r} is not known; known are {', '.join(SHAREGPT_ROLES)}.")
    message = {"role": SHAREGPT_ROLES[speaker], "content": turn.get("value")}
    if speaker == "function_call":
        return {**message, "content": None, "tool_calls": files.parse_json(text_of(turn, "value", where), where)}
    if message["content"] is None:
        raise ValueError(f"{where}: the field 'value' is missing.")
    return message


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise ValueError(f"{where} is of type '{kind}'; only parts of type 'text' can be read.")
    return part["text"]


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Calls as templates read them: a function's name, and its arguments as an object."""
    checked = []
    for i, call in enumerate(calls if isinstance(calls, list | tuple) else [calls]):
        place = f"{where}, tool call {i}"
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"{place}: a call needs a function with a name and arguments.")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = files.parse_json(arguments, f"{place}, arguments")
        if not isinstance(arguments, dict):
            raise ValueError(f"{place}: the arguments must be an object, got {json.dumps(arguments)}.")
        outside = {key: value for key, value in call.items() if value is not None} if "function" in call else {}
        called = {"name": function["name"], "arguments": arguments}
        checked.append({"type": "function", **outside, "function": called})
    return checked
