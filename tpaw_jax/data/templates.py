"""Chat templates: from a conversation to the tokens of its prompt and of its target.

The template renders the whole conversation. The prompt is its generation prompt for the turns before the answer, so
that the policy is trained on the prompts that it samples from. The target is the rest of the text, up to and with the
token that ends the turn.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tpaw_jax.config import DataConfig
from tpaw_jax.data.conversations import Message, reasoning_of
from tpaw_jax.data.records import Record

THINKING = ("enable_thinking", "thinking")
"""Variables that switch reasoning on and off in templates: Qwen3's and SmolLM3's, DeepSeek's and Granite's."""

QUOTED = 40
"""Characters on each side of where two texts part that an error message quotes."""

MARKER = "assistant's words"


class Mode(NamedTuple):
    """One way of rendering, with reasoning or without."""

    arguments: dict[str, Any]  # of the template
    lead: str  # what the template writes between its generation prompt and an answer, see `_modes`


class Encoded(NamedTuple):
    """The tokens of a record."""

    prompt: list[int]
    target: list[int]
    rejected: list[int] | None


@dataclasses.dataclass(frozen=True)
class Template:
    """A tokenizer, its chat template, and the token that ends a turn."""

    tokenizer: Any
    chat: str | None  # Jinja; None: plain text without turns
    name: str  # of the template, for error messages
    system_prompt: str
    end_of_turn: int
    after_answer: str = ""  # what the template writes behind an assistant's text
    modes: tuple[Mode, ...] = ()  # in the order in which they are tried
    anchor: str = ""  # text to encode before a target, see `_anchor`
    vocabulary: int | None = None  # number of the model's tokens; None: unknown

    def encode(self, record: Record) -> Encoded:
        """The tokens of a record.

        Raises:
            ValueError: the chat template rejects the conversation, leaves a part of it out, or does not continue its
                own generation prompt; or the tokenizer has a token for it that the model lacks.
        """
        prompt, texts = self.split(record)
        targets = [self._end_turn(text) for text in texts]
        return Encoded(self._encode_prompt(prompt), targets[0], targets[1] if record.rejected else None)

    def split(self, record: Record) -> tuple[str, list[str]]:
        """The text of the prompt, and what follows it in the conversation: with the answer, and with the rejected one.

        Raises:
            ValueError: as `encode`.
        """
        answers = [answer for answer in (record.answer, record.rejected) if answer]
        self._check_is_used(record, answers)
        if self.chat is None:
            return _plain_text(record.messages), [_plain_text([answer]) for answer in answers]
        for mode in self.modes:
            prompt = self._prompt(record.messages, record.tools, mode)
            wholes = [self._render([*record.messages, answer], record.tools, mode.arguments) for answer in answers]
            if all(whole.startswith(prompt) for whole in wholes):
                texts = [whole[len(prompt) :] for whole in wholes]
                for text, answer in zip(texts, answers, strict=True):
                    self._check_is_rendered(text, answer)
                return prompt, texts
        raise ValueError(self._parted(prompt, next(whole for whole in wholes if not whole.startswith(prompt))))

    def prompt_tokens(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """The tokens from which the response to a conversation is sampled, with one BOS token if the model has one.

        Raises:
            ValueError: the chat template rejects the conversation.
        """
        return self._encode_prompt(_plain_text(messages) if self.chat is None else self.render(messages, tools))

    def render(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text, by the chat template and with the system prompt.

        Args:
            messages: the turns.
            tools: descriptions of the tools that the assistant may call.
            add_generation_prompt: end with the text that an assistant turn starts with; if False, end with the open
                last turn, for the model to continue.

        Raises:
            ValueError: the chat template rejects the conversation.
        """
        mode = self.modes[0]
        if add_generation_prompt:
            return self._prompt(messages, tools, mode)
        return self._render(messages, tools, mode.arguments | {"continue_final_message": True})

    def with_defaults(self) -> str:
        """The Jinja text, with the arguments of this run as defaults: for others, who render without them."""
        first, *others = (mode.arguments for mode in self.modes)
        fixed = {name: value for name, value in first.items() if all(o[name] == value for o in others)}
        lines = [
            f"{{%- if {name} is not defined %}}{{%- set {name} = {json.dumps(value)} %}}{{%- endif %}}"
            for name, value in fixed.items()
        ]
        return "".join([*lines, self.chat or ""])

    def target_tokens(self, text: str) -> list[int]:
        """The tokens of a response's text, followed by the end-of-turn token."""
        return [*self._encode_rest(text), self.end_of_turn]

    def _prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], mode: Mode) -> str:
        return self._render(messages, tools, mode.arguments | {"add_generation_prompt": True}) + mode.lead

    def _render(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], arguments: dict[str, Any]) -> str:
        if self.system_prompt and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        return _apply(self.tokenizer, self.chat, messages, tools=list(tools) or None, **arguments)

    def _end_turn(self, text: str) -> list[int]:
        """The tokens of what the template writes for an answer, up to and with the token that ends the turn."""
        if self.chat is None or text.endswith(self.after_answer):
            return self.target_tokens(text.removesuffix(self.after_answer))
        ids = self._encode_rest(text)  # the turn ends in another way than most: as a call of a tool, for example
        ends = [i for i, token in enumerate(ids) if token in _special_tokens(self.tokenizer)]
        return ids[: ends[-1] + 1] if ends else [*ids, self.end_of_turn]

    def _encode_prompt(self, text: str) -> list[int]:
        """A template writes its own BOS; plain text gets one."""
        bos = self.tokenizer.bos_token_id
        return ([bos] if self.chat is None and bos is not None else []) + self._encode(text)

    def _encode_rest(self, text: str) -> list[int]:
        return self._encode(self.anchor + text)[len(self._encode(self.anchor)) :]

    def _encode(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        _check_vocabulary(ids, self.tokenizer, self.vocabulary)
        return ids

    def _check_is_used(self, record: Record, answers: Sequence[Message]) -> None:
        """Refuse what the template does not read at all: nothing is to be left out without a word."""
        turns = [*record.messages, *answers]
        parts = {"tools": record.tools, "tool_calls": any("tool_calls" in turn for turn in turns)}
        if self.chat is None:
            parts["reasoning_content"] = any(map(reasoning_of, turns))
        for name, present in parts.items():
            if present and (self.chat is None or name not in self.chat):
                raise ValueError(f"the conversation has '{name}', which {self.name} does not use.")

    def _check_is_rendered(self, text: str, answer: Message) -> None:
        parts = [("reasoning_content", reasoning_of(answer).strip())]
        parts += [("tool_calls", call["function"]["name"]) for call in answer.get("tool_calls", ())]
        for name, part in parts:
            if part not in text:
                raise ValueError(f"{self.name} leaves out the field '{name}' of the answer: it renders {text!r}.")

    def _parted(self, prompt: str, whole: str) -> str:
        """Say that a conversation does not continue its generation prompt."""
        at = next(
            (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), min(len(prompt), len(whole))
        )
        quote = lambda text: repr(text[max(0, at - QUOTED) : at + QUOTED])
        return (
            f"{self.name} does not continue its own generation prompt with the answer, so training prompts would "
            f"differ from sampling prompts. The generation prompt has {quote(prompt)} where the conversation has "
            f"{quote(whole)}. Set data.thinking, or another template in data.chat_template."
        )


def make_template(tokenizer: Any, config: DataConfig, vocabulary: int | None = None) -> Template:
    """The template for both training and sampling: the tokenizer's own, the configured one, or plain text.

    Args:
        tokenizer: of the model.
        config: names the template.
        vocabulary: the number of the model's tokens; None: not checked.

    Raises:
        ValueError: there is no template or no end-of-turn token, the model lacks that token, or the template leaves out
            the assistant's text.
    """
    template = _make_template(tokenizer, config)
    _check_vocabulary([template.end_of_turn], tokenizer, vocabulary)
    return dataclasses.replace(template, vocabulary=vocabulary)


def _make_template(tokenizer: Any, config: DataConfig) -> Template:
    if config.chat_template == "none":
        if tokenizer.eos_token_id is None:
            raise ValueError("data.chat_template 'none' ends responses with the EOS token, but the tokenizer has none.")
        return Template(tokenizer, None, "data.chat_template 'none'", config.system_prompt, tokenizer.eos_token_id)
    chat, name = _chat_template(tokenizer, config)
    modes = tuple(_modes(tokenizer, chat, config))
    end_of_turn, after_answer = _end_of_turn(tokenizer, chat, modes[0])
    return Template(tokenizer, chat, name, config.system_prompt, end_of_turn, after_answer, modes, _anchor(tokenizer))


def _chat_template(tokenizer: Any, config: DataConfig) -> tuple[str, str]:
    """The Jinja text, and how to call it."""
    given = config.chat_template
    if given == "auto":
        if not isinstance(tokenizer.chat_template, str):
            raise ValueError(
                "The tokenizer has no chat template, or several; "
                "set data.chat_template to a Jinja template, a template file, or 'none'."
            )
        return tokenizer.chat_template, "the tokenizer's chat template"
    if "{" in given:
        return given, "the template in data.chat_template"
    path = Path(given).expanduser()
    if not path.is_file():
        raise ValueError(f"data.chat_template '{given}' is not 'auto', 'none', a Jinja template or a file.")
    return path.read_text(), f"the chat template {given}"


def _modes(tokenizer: Any, chat: str, config: DataConfig) -> list[Mode]:
    """The ways of rendering that `data.thinking` allows.

    What a template writes between its generation prompt and the assistant's text ends the prompt: the start of the
    turn, if it writes no generation prompt; or an empty block of reasoning, as Qwen3's does, unless reasoning is on.
    """
    used = [name for name in THINKING if re.search(rf"\b{name}\b", chat)]
    modes: list[Mode] = []
    for on in {"off": (False,), "on": (True,), "auto": (False, True)}[config.thinking]:
        arguments = {**dict.fromkeys(used, on), **config.template_arguments}
        render = lambda turns, **options: _apply(tokenizer, chat, turns, **options)
        opening = render(_example()[:1], add_generation_prompt=True, **arguments)
        before = render(_example(), **arguments).rpartition(MARKER)[0]
        lead = before[len(opening) :] if before.startswith(opening) else ""
        starts_turn = opening == render(_example()[:1], **arguments)
        reasons = arguments[used[0]] if used else on
        mode = Mode(arguments, lead if lead.strip() and (starts_turn or not reasons) else "")
        modes += [] if mode in modes else [mode]
    return modes


def _end_of_turn(tokenizer: Any, chat: str, mode: Mode) -> tuple[int, str]:
    """The token that ends an assistant turn, and the text that the template writes behind the assistant's."""
    _, marker, after = _apply(tokenizer, chat, _example(), **mode.arguments).rpartition(MARKER)
    if not marker:
        raise ValueError("The chat template leaves out the assistant's text; set another one in data.chat_template.")
    ids = tokenizer.encode(after, add_special_tokens=False)
    if ids and ids[0] in _special_tokens(tokenizer):
        return ids[0], after
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The chat template does not end turns with a special token, and the tokenizer has no EOS token; set "
            "another template in data.chat_template."
        )
    return tokenizer.eos_token_id, after


def _anchor(tokenizer: Any) -> str:
    """Text that no token of a target merges with, if the tokenizer puts a space before the text that it begins with.

    A target is not the beginning of a text: it continues its prompt.
    """
    first = tokenizer.encode("a", add_special_tokens=False)[:1]
    return "\n" if "".join(tokenizer.convert_ids_to_tokens(first)).startswith("\u2581") else ""


def _special_tokens(tokenizer: Any) -> set[int]:
    return set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())


def _check_vocabulary(ids: Sequence[int], tokenizer: Any, vocabulary: int | None) -> None:
    if vocabulary is not None and ids and max(ids) >= vocabulary:
        token = tokenizer.convert_ids_to_tokens(max(ids))
        raise ValueError(
            f"the tokenizer has the id {max(ids)} for {token!r}, but the model's vocabulary has {vocabulary} tokens. "
            "Use the model's own tokenizer (policy.tokenizer), or resize the model's embeddings."
        )


def _example() -> list[Message]:
    return [{"role": "user", "content": "user's words"}, {"role": "assistant", "content": MARKER}]


def _plain_text(messages: Sequence[Message]) -> str:
    return "\n".join(m["content"] for m in messages)


def _apply(tokenizer: Any, chat: str | None, messages: Sequence[Message], **options: Any) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(list(messages), chat_template=chat, tokenize=False, **options)
    except (TemplateError, TypeError) as error:
        roles = ", ".join(m["role"] for m in messages)
        raise ValueError(f"The chat template rejects a conversation with the turns {roles}: {error}.") from error
