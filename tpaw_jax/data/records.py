"""Turn raw records of several formats into conversations whose last assistant turn is the target.

Error messages name the file, the line or the record number (from 1), the field, and the turn (from 0).
"""

import dataclasses
from typing import Any

from tpaw_jax.data.conversations import Message, messages_of, text_of, tools_of

FORMATS = (
    "prompt/completion, messages, conversations, real/generated, instruction/input/output, question/answer, chosen"
)
PROMPTS = ("prompt", "instruction", "input", "question", "system", "history", "tools")
"""Fields that a preference shares between its two responses."""


@dataclasses.dataclass(frozen=True)
class Record:
    """A conversation up to an assistant turn, that turn, and a rejected one where one was asked for."""

    messages: tuple[Message, ...]
    answer: Message
    rejected: Message | None = None
    tools: tuple[dict[str, Any], ...] = ()
    turns_behind: int = 0  # turns behind the last assistant turn, which nothing uses
    where: str = dataclasses.field(default="", compare=False)  # file and line or record number, for error messages

    @property
    def target(self) -> str:
        """The text of the answer."""
        return self.answer["content"]

    def turns(self) -> "list[Record]":
        """A record for each assistant turn that answers something: the turns before it are its messages."""
        answers = [i for i, turn in enumerate(self.messages) if turn["role"] == "assistant"]
        asked = [i for i in answers if i and self.messages[i - 1]["role"] != "system"]
        earlier = [dataclasses.replace(self, messages=self.messages[:i], answer=self.messages[i]) for i in asked]
        return [*earlier, self]

    @property
    def uses_tools(self) -> bool:
        """Whether tools are described or called."""
        return bool(self.tools) or any("tool_calls" in turn for turn in (*self.messages, self.answer))


def parse_record(fields: Any, where: str, rejected: bool = False) -> Record:
    """Check a raw record of any supported format and turn it into a `Record`.

    Formats: `prompt`/`completion` (text or messages); `messages` or `conversations`, whose last assistant turn is the
    target; SPIN's `real`/`generated`; `instruction`/`input`/`output`; `question`/`answer`; and preferences, whose
    target is `chosen`: either two whole conversations, or two responses beside a prompt, an instruction or a question.
    `tools` belong to all of them. `system`, a text, and Alpaca's `history` belong to all but whole conversations with
    a system turn.

    Args:
        fields: the raw record.
        where: file and line or record number, for error messages.
        rejected: also require and return the rejected response: `rejected`, or SPIN's `generated`.

    Raises:
        ValueError: the record is malformed.
    """
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: expected a record with named fields, got {type(fields).__name__}.")
    if fields.get("chosen") is not None or rejected:
        return _preference(fields, where, rejected)
    if "prompt" in fields and "completion" in fields:
        return _record(fields, _exchange(fields, "prompt", "completion", where), where)
    for name in ("real", "messages", "conversations"):
        if fields.get(name) is not None:
            return _conversation(fields, name, where)
    for prompt, response in (("instruction", "output"), ("question", "answer")):
        if prompt in fields:
            return _record(fields, _exchange(fields, prompt, response, where), where)
    names = ", ".join(map(repr, fields)) or "(none)"
    raise ValueError(f"{where}: the fields {names} match no known record format ({FORMATS}).")


def _exchange(fields: dict[str, Any], prompt: str, response: str, where: str) -> list[Message]:
    """The turns of a prompt and its response, each a text or a list of turns."""
    asked = _turns(fields, prompt, "user", where)
    if prompt == "instruction" and (context := text_of(fields, "input", where, may_be_empty=True)):
        asked[-1]["content"] += f"\n\n{context}"
    return [*_history(fields, where), *asked, *_turns(fields, response, "assistant", where)]


def _turns(fields: dict[str, Any], name: str, role: str, where: str) -> list[Message]:
    value = fields.get(name)
    if isinstance(value, list) and any(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in value):
        return messages_of(value, f"{where}, field '{name}'")
    return [{"role": role, "content": text_of(fields, name, where)}]


def _history(fields: dict[str, Any], where: str) -> list[Message]:
    """Alpaca's earlier exchanges: a list of pairs of an instruction and its output."""
    turns = []
    for i, pair in enumerate(fields.get("history") or ()):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(f"{where}: the field 'history', entry {i}, is not an instruction and its output.")
        turns += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
    return messages_of(turns, f"{where}, field 'history'")


def _conversation(fields: dict[str, Any], name: str, where: str) -> Record:
    """The record of a field that holds a whole conversation."""
    place = f"{where}, field '{name}'"
    return _record(fields, messages_of(fields[name], place), where, place)


def _record(fields: dict[str, Any], messages: list[Message], where: str, place: str = "") -> Record:
    """The record of some turns; `place` is where they are, if not all over the record."""
    place = place or where
    system = text_of(fields, "system", where, may_be_empty=True)
    if system and messages and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=None)
    if last is None:
        raise ValueError(f"{place}: the conversation has no assistant turn to use as the target.")
    if last == 0:
        raise ValueError(f"{place}: the conversation has no turn before the target.")
    tools = tools_of(fields.get("tools"), f"{where}, field 'tools'")
    return Record(tuple(messages[:last]), messages[last], tools=tools, turns_behind=len(messages) - last - 1)


def _preference(fields: dict[str, Any], where: str, rejected: bool) -> Record:
    """Parse a record with two responses; the rejected one is parsed only if it is asked for."""
    names = ("real", "generated") if "real" in fields else ("chosen", "rejected")
    parsed = []
    for name in names[: 2 if rejected else 1]:
        value, field = fields.get(name), f"{where}, field '{name}'"
        if isinstance(value, list) and any(isinstance(turn, dict) and _is_users(turn) for turn in value):
            parsed.append(_conversation(fields, name, where))
            continue
        if not isinstance(value, list):
            text_of(fields, name, where)
        prompt = {key: fields[key] for key in PROMPTS if key in fields}
        response = "output" if "instruction" in prompt else "completion" if "prompt" in prompt else "answer"
        parsed.append(parse_record({**prompt, response: value}, field))
    if any(record.messages != parsed[0].messages for record in parsed):
        raise ValueError(f"{where}: '{names[0]}' and '{names[1]}' answer different prompts.")
    return dataclasses.replace(parsed[0], rejected=parsed[1].answer if rejected else None)


def _is_users(turn: dict[str, Any]) -> bool:
    return turn.get("role") == "user" or turn.get("from") in ("human", "user")
