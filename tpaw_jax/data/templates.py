"""Chat templates: conversations to prompt tokens, response texts to target tokens.

A prompt is rendered with the model's chat template up to the point where the assistant's text starts. A target is the
response text followed by one end-of-turn token, the one that the template writes after an assistant turn.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tpaw_jax.config import DataConfig
from tpaw_jax.data.records import Message


@dataclasses.dataclass(frozen=True)
class Template:
    """A tokenizer, its chat template, and the token that ends a turn."""

    tokenizer: Any
    chat: str | None  # Jinja; None: plain text without turns
    system_prompt: str
    end_of_turn: int
    lead: str = ""  # what the template writes between its generation prompt and the assistant's text

    def prompt_tokens(self, messages: Sequence[Message]) -> list[int]:
        """The tokens up to where the assistant's text starts, with one BOS token if the model has one.

        Raises:
            ValueError: the chat template rejects the conversation.
        """
        if self.chat is None:
            text = "\n".join(m["content"] for m in messages)
            bos = self.tokenizer.bos_token_id
            return ([] if bos is None else [bos]) + self._encode(text)
        # The template writes its own BOS, so the tokenizer must not add a second one.
        return self._encode(self.render(messages))

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """A conversation as text, by the chat template and with the system prompt.

        Args:
            messages: the turns.
            add_generation_prompt: end with the text that an assistant turn starts with; if False, end with the open
                last turn, for the model to continue.

        Raises:
            ValueError: the chat template rejects the conversation.
        """
        assert self.chat is not None
        if self.system_prompt and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        text = _render(self.tokenizer, self.chat, messages, **options)
        return text + self.lead if add_generation_prompt else text

    def target_tokens(self, text: str) -> list[int]:
        """The tokens of a response, followed by the end-of-turn token."""
        return [*self._encode(text), self.end_of_turn]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def make_template(tokenizer: Any, config: DataConfig) -> Template:
    """The template for both training and sampling: the tokenizer's own, the configured one, or plain text.

    Raises:
        ValueError: there is no template or no end-of-turn token, or the template would make sampling and training
            prompts differ.
    """
    if config.chat_template == "none":
        if tokenizer.eos_token_id is None:
            raise ValueError("data.chat_template 'none' ends responses with the EOS token, but the tokenizer has none.")
        return Template(tokenizer, None, config.system_prompt, tokenizer.eos_token_id)
    if config.chat_template == "auto":
        chat = tokenizer.chat_template
        if not isinstance(chat, str):
            raise ValueError(
                "The tokenizer has no chat template, or several; "
                "set data.chat_template to a Jinja template, a template file, or 'none'."
            )
    else:
        chat = _template_text(config.chat_template)
    return Template(tokenizer, chat, config.system_prompt, *_turn_marks(tokenizer, chat))


def _template_text(template: str) -> str:
    if "{" in template:
        return template
    path = Path(template).expanduser()
    if not path.is_file():
        raise ValueError(f"data.chat_template '{template}' is not 'auto', 'none', a Jinja template or a file.")
    return path.read_text()


def _turn_marks(tokenizer: Any, chat: str) -> tuple[int, str]:
    """The end-of-turn token, and the text (if any) between the generation prompt and the assistant's text.

    Qwen3, for example, writes an empty `<think>` block there. It becomes the end of every prompt, so that sampled and
    trained responses start at the same place.
    """
    marker = "assistant's words"
    turns = [{"role": "user", "content": "user's words"}, {"role": "assistant", "content": marker}]
    before, found_marker, after = _render(tokenizer, chat, turns).rpartition(marker)
    opening = _render(tokenizer, chat, turns[:1], add_generation_prompt=True)
    if not found_marker or not before.startswith(opening):
        raise ValueError(
            "The chat template does not continue its own generation prompt with the assistant's text, so training "
            "prompts would differ from sampling prompts; set another template in data.chat_template."
        )
    lead = before[len(opening) :]
    ids = tokenizer.encode(after, add_special_tokens=False)
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    if ids and ids[0] in special:
        return ids[0], lead
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The chat template does not end turns with a special token, and the tokenizer has no EOS token; set "
            "another template in data.chat_template."
        )
    return tokenizer.eos_token_id, lead


def _render(tokenizer: Any, chat: str, messages: Sequence[Message], **options: Any) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(list(messages), chat_template=chat, tokenize=False, **options)
    except TemplateError as error:
        roles = ", ".join(m["role"] for m in messages)
        raise ValueError(f"The chat template rejects a conversation with the turns {roles}: {error}.") from error
