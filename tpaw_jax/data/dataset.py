"""Files or hub ids -> records -> tokenised prompts and targets.

A record becomes a conversation whose last turn is the target. The prompt is rendered with the model's chat template up
to where the assistant speaks; the target is its text and one end-of-turn token, the one that the template ends a turn
with. Lengths decide the masks downstream; padding does not exist here.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tpaw_jax.config import DataConfig, SourceConfig
from tpaw_jax.storage import files
from tpaw_jax.types import Prompts

Message = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Record:
    """A prompt as a conversation, the target response as text, and a response that was liked less, if there is one."""

    messages: tuple[Message, ...]
    target: str
    rejected: str | None = None
    where: str = dataclasses.field(default="", compare=False)


@dataclasses.dataclass(frozen=True)
class Template:
    """How conversations become tokens, and what ends a turn."""

    tokenizer: Any
    chat: str | None  # None: plain text without turns
    system_prompt: str
    end_of_turn: int
    lead: str = ""  # what the template writes between its generation prompt and the assistant's words

    def prompt_tokens(self, messages: Sequence[Message]) -> list[int]:
        """The tokens up to where the assistant speaks, with one BOS where the model has one."""
        if self.chat is None:
            text = "\n".join(m["content"] for m in messages)
            bos = self.tokenizer.bos_token_id
            return ([] if bos is None else [bos]) + self._encode(text)
        if self.system_prompt and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        # The template writes its own BOS, so the tokenizer must not add a second one.
        return self._encode(_render(self.tokenizer, self.chat, messages, add_generation_prompt=True) + self.lead)

    def target_tokens(self, text: str) -> list[int]:
        """The tokens of a response, the end-of-turn token last."""
        return [*self._encode(text), self.end_of_turn]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


@dataclasses.dataclass(frozen=True)
class DataReport:
    """What was read, cut and skipped."""

    records: int
    prompts_cut: int
    targets_cut: int
    skipped: tuple[str, ...]  # one sentence a malformed record
    fingerprint: str  # of every token, so that a run can tell its data from other data


def load(config: DataConfig, template: Template, seed: int) -> tuple[Prompts, Prompts, DataReport]:
    """The prompts to play on, the prompts held out, and the report.

    Raises:
        FileNotFoundError: a source is neither there nor on the hub.
        ValueError: a malformed record, named by file, line and field; or nothing is left.
    """
    skipped: list[str] = []
    records = [r for i, source in enumerate(config.sources) for r in _mixed(source, i, config, skipped, seed)]
    order = np.random.default_rng(seed).permutation(len(records))
    held_out = min(config.holdout_prompts, len(records))
    wanted = len(records) if config.max_prompts == 0 else min(len(records), held_out + config.max_prompts)
    encoded = []
    for i in order[:wanted]:
        try:
            encoded.append(_encode(records[i], template, config))
        except ValueError as error:
            sentence = f"{records[i].where}: {error}"
            if not config.skip_bad_records:
                raise ValueError(sentence) from error
            skipped.append(sentence)
    if len(encoded) <= held_out:
        raise ValueError(
            f"data.sources: {len(records)} usable records leave no prompt to train on "
            f"after {held_out} are held out ({len(skipped)} records were skipped)."
        )
    prompts = Prompts(
        np.arange(len(encoded), dtype=np.int32),
        tuple(np.asarray(one.prompt, np.int32) for one in encoded),
        tuple(np.asarray(one.target, np.int32) for one in encoded),
        tuple(np.asarray(one.rejected, np.int32) for one in encoded if one.rejected is not None),
    )
    report = DataReport(
        records=len(records),
        prompts_cut=sum(one.prompt_cut for one in encoded),
        targets_cut=sum(one.target_cut for one in encoded),
        skipped=tuple(skipped),
        fingerprint=_fingerprint(prompts),
    )
    kept_out = {prompts.prompt_tokens[i].tobytes() for i in range(held_out)}
    played = [i for i in range(held_out, len(prompts)) if prompts.prompt_tokens[i].tobytes() not in kept_out]
    if not played:
        raise ValueError("data.sources: every prompt to train on also stands among the held-out ones.")
    return prompts.take(played), prompts.take(range(held_out)), report


def make_template(tokenizer: Any, config: DataConfig) -> Template:
    """The template that trains and generates: the tokenizer's own, one given, or none.

    Raises:
        ValueError: there is no template or end-of-turn token, or the template is inconsistent.
    """
    if config.chat_template == "none":
        if tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer has no EOS token, which data.chat_template 'none' ends responses with.")
        return Template(tokenizer, None, config.system_prompt, tokenizer.eos_token_id)
    if config.chat_template == "auto":
        chat = tokenizer.chat_template
        if not isinstance(chat, str):
            raise ValueError(
                "The tokenizer has no chat template of its own (or several); "
                "set data.chat_template to a Jinja template, its file, or 'none'."
            )
    else:
        chat = _template_text(config.chat_template)
    return Template(tokenizer, chat, config.system_prompt, *_turn_marks(tokenizer, chat))


def read_source(source: SourceConfig) -> Iterator[tuple[str, Any]]:
    """The raw records of a source with their place, 'file, line n' or 'file, record n'.

    Lines that are not JSON come as the `ValueError` that says so, for the caller to raise or count.
    """
    path = Path(source.path).expanduser()
    if path.suffix == ".jsonl" and path.is_file():
        yield from _read_lines(path)
    elif path.suffix == ".json" and path.is_file():
        records = files.parse_json(path.read_bytes(), path)
        if not isinstance(records, list):
            raise ValueError(f"{path}: a JSON array of records was expected, not {type(records).__name__}.")
        yield from ((f"{path}, record {i}", r) for i, r in enumerate(records, start=1))
    else:
        yield from ((f"{source.path}, record {i}", r) for i, r in enumerate(_datasets(source, path), start=1))


def parse_record(fields: Any, where: str, rejected: bool = False) -> Record:
    """A record of any of the shapes that people have.

    `prompt`/`completion` (text or messages); `messages`, the last assistant turn being the target; SPIN's
    `real`/`generated`; `instruction`/`input`/`output`; `question`/`answer`; and preferences, whose target is `chosen`:
    two conversations, or two answers beside a prompt, an instruction or a question. With `rejected`, the record must
    have a response that was liked less: `rejected`, or SPIN's `generated`.

    Raises:
        ValueError: names `where` and the field.
    """
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: a record of named fields was expected, not {type(fields).__name__}.")
    user = lambda text: ({"role": "user", "content": text},)
    if "chosen" in fields or rejected:
        return _preference(fields, where, rejected)
    if "real" in fields:
        return _conversation(fields["real"], f"{where}, field 'real'")
    if "prompt" in fields and "completion" in fields:
        prompt, completion = fields["prompt"], fields["completion"]
        if isinstance(prompt, list) or isinstance(completion, list):
            turns = [messages_of(part, f"{where}, field '{name}'") for name, part in _parts(prompt, completion)]
            return _conversation([*turns[0], *turns[1]], where)
        return Record(user(_text(fields, "prompt", where)), _text(fields, "completion", where))
    if "messages" in fields:
        return _conversation(fields["messages"], f"{where}, field 'messages'")
    if "instruction" in fields:
        instruction = _text(fields, "instruction", where)
        context = _text(fields, "input", where, optional=True)
        return Record(user(f"{instruction}\n\n{context}" if context else instruction), _text(fields, "output", where))
    if "question" in fields:
        return Record(user(_text(fields, "question", where)), _text(fields, "answer", where))
    shapes = "prompt/completion, messages, real/generated, instruction/input/output, question/answer, chosen"
    raise ValueError(f"{where}: the fields {', '.join(map(repr, fields)) or '(none)'} fit no known shape ({shapes}).")


def _preference(fields: dict[str, Any], where: str, rejected: bool) -> Record:
    """A record with two responses; the one liked less is left out where it is not asked for."""
    names = ("real", "generated") if "real" in fields else ("chosen", "rejected")
    found = []
    for name in names[: 2 if rejected else 1]:
        value, place = fields.get(name), f"{where}, field '{name}'"
        if isinstance(value, list) and any(isinstance(turn, dict) and turn.get("role") == "user" for turn in value):
            found.append(_conversation(value, place))
            continue
        if not isinstance(value, list):
            _text(fields, name, where)
        asked = {key: fields[key] for key in ("prompt", "instruction", "input", "question") if key in fields}
        answer = "output" if "instruction" in asked else "completion" if "prompt" in asked else "answer"
        found.append(parse_record({**asked, answer: value}, place))
    if any(one.messages != found[0].messages for one in found):
        raise ValueError(f"{where}: '{names[0]}' and '{names[1]}' answer different prompts.")
    return dataclasses.replace(found[0], rejected=found[1].target if rejected else None)


def _mixed(source: SourceConfig, number: int, config: DataConfig, skipped: list[str], seed: int) -> list[Record]:
    """The records of one source, as many as its weight says, chosen by the seed."""
    records = []
    for where, raw in read_source(source):
        try:
            if isinstance(raw, ValueError):
                raise raw
            record = parse_record(raw, where, config.responses == "rejected")
            records.append(dataclasses.replace(record, where=where))
        except ValueError as error:
            if not config.skip_bad_records:
                raise
            skipped.append(str(error))
    if source.weight == 1.0:
        return records
    count = round(source.weight * len(records))
    order = np.random.default_rng((seed, number)).permutation(len(records))
    return [records[order[i % len(records)]] for i in range(count)]


class _Encoded(NamedTuple):
    """The tokens of a record, and what was cut."""

    prompt: list[int]
    target: list[int]
    rejected: list[int] | None
    prompt_cut: bool
    target_cut: bool


def _encode(record: Record, template: Template, config: DataConfig) -> _Encoded:
    """Prompt and response tokens within SPIN's limits.

    As in SPIN, prompts lose their beginning and targets their end. Unlike SPIN, a prompt above its limit is cut even
    where prompt and target together would fit, since sampling needs the room behind it.
    """
    prompt, target = template.prompt_tokens(record.messages), template.target_tokens(record.target)
    prompt_cut = len(prompt) > config.max_prompt_length
    if prompt_cut:
        prompt = prompt[-config.max_prompt_length :]
    room = config.max_length - len(prompt)
    rejected = None if record.rejected is None else template.target_tokens(record.rejected)[:room]
    return _Encoded(prompt, target[:room], rejected, prompt_cut, len(target) > room)


def _conversation(turns: Any, where: str) -> Record:
    messages = messages_of(turns, where)
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=None)
    if last is None:
        raise ValueError(f"{where}: there is no assistant turn to be the target.")
    if last == 0:
        raise ValueError(f"{where}: nothing comes before the target's turn.")
    return Record(tuple(messages[:last]), messages[last]["content"])


def messages_of(turns: Any, where: str) -> list[Message]:
    """Turns as they stand in a record, checked, without empty system turns.

    Raises:
        ValueError: they are no list of turns; says `where` and which turn.
    """
    if not isinstance(turns, list | tuple):
        raise ValueError(f"{where}: a list of turns was expected, not {type(turns).__name__}.")
    empty_system = lambda turn: isinstance(turn, dict) and turn.get("role") == "system" and turn.get("content") == ""
    turns = [turn for turn in turns if not empty_system(turn)]
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise ValueError(f"{where}, turn {i}: a turn needs the text fields 'role' and 'content'.")
        _text(turn, "content", f"{where}, turn {i}")
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _parts(prompt: Any, completion: Any) -> list[tuple[str, Any]]:
    """A conversation given as prompt and completion, one of which may be plain text."""
    as_turns = lambda value, role: [{"role": role, "content": value}] if isinstance(value, str) else value
    return [("prompt", as_turns(prompt, "user")), ("completion", as_turns(completion, "assistant"))]


def _text(fields: dict[str, Any], name: str, where: str, optional: bool = False) -> str:
    value = fields.get(name)
    if optional and value in (None, ""):
        return ""
    if value is None:
        raise ValueError(f"{where}: the field '{name}' is missing.")
    if not isinstance(value, str):
        raise ValueError(f"{where}: the field '{name}' is {type(value).__name__}, text was expected.")
    if not value.strip():
        raise ValueError(f"{where}: the field '{name}' is empty.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: the field '{name}' is not valid Unicode ({error}).") from error
    return value


def _read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                yield where, files.parse_json(line, where)
            except ValueError as error:
                yield where, error


def _datasets(source: SourceConfig, path: Path) -> Any:
    """A parquet file, a directory of `datasets`, or a hub id, through the datasets library."""
    import datasets

    try:
        if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
            loaded = datasets.load_from_disk(str(path))
            return loaded[source.split] if isinstance(loaded, datasets.DatasetDict) else loaded
        if path.suffix == ".parquet" and path.is_file():
            return datasets.Dataset.from_parquet(str(path))
        if path.is_file():
            raise ValueError("the file's ending is none of .jsonl, .json, .parquet")
        return datasets.load_dataset(source.path, source.subset or None, split=source.split)
    except Exception as error:  # the library raises dozens of types; the user needs one sentence
        raise ValueError(
            f"data source '{source.path}' (split '{source.split}') could not be read: {type(error).__name__}: {error}"
        ) from error


def _render(tokenizer: Any, chat: str, messages: Sequence[Message], **options: Any) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(list(messages), chat_template=chat, tokenize=False, **options)
    except TemplateError as error:
        roles = ", ".join(m["role"] for m in messages)
        raise ValueError(f"The chat template rejects a conversation with the turns {roles}: {error}.") from error


def _turn_marks(tokenizer: Any, chat: str) -> tuple[int, str]:
    """The token that the template writes right after an assistant's words, and the text it leads in with, if any.

    Qwen3, for one, leads in with an empty `<think>` block; it then stands at the end of every prompt, so that what is
    sampled and what is trained begin alike.
    """
    marker = "assistant's words"
    turns = [{"role": "user", "content": "user's words"}, {"role": "assistant", "content": marker}]
    before, found, after = _render(tokenizer, chat, turns).rpartition(marker)
    opening = _render(tokenizer, chat, turns[:1], add_generation_prompt=True)
    if not found or not before.startswith(opening):
        raise ValueError(
            "The chat template does not continue its own generation prompt with the assistant's words, so what trains "
            "would not be what generates; give another template in data.chat_template."
        )
    ids = tokenizer.encode(after, add_special_tokens=False)
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    if ids and ids[0] in special:
        return ids[0], before[len(opening) :]
    if tokenizer.eos_token_id is None:
        raise ValueError("The chat template ends no turn with a special token, and the tokenizer has no EOS token.")
    return tokenizer.eos_token_id, before[len(opening) :]


def _template_text(given: str) -> str:
    if "{" in given:
        return given
    path = Path(given).expanduser()
    if not path.is_file():
        raise ValueError(f"data.chat_template '{given}' is neither auto, none, a Jinja template, nor a file.")
    return path.read_text()


def _fingerprint(prompts: Prompts) -> str:
    digest = hashlib.sha256()
    for tokens in (*prompts.prompt_tokens, *prompts.target_tokens, *prompts.rejected_tokens):
        digest.update(len(tokens).to_bytes(4, "little") + tokens.tobytes())
    return digest.hexdigest()[:16]
