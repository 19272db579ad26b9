"""Read sources into records, and records into conversations whose last assistant turn is the target.

Reading has two steps: `read_source` yields raw records from files, saved datasets or the Hugging Face hub, and
`parse_record` checks one and turns it into a `Record`. Error messages name the file, the line or the record number
(from 1), the field, and the turn (from 0).
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tpaw_jax.config import SourceConfig
from tpaw_jax.storage import files

Message = dict[str, str]
"""One turn of a conversation: its `role` and its `content`."""

FORMATS = "prompt/completion, messages, real/generated, instruction/input/output, question/answer, chosen"


@dataclasses.dataclass(frozen=True)
class Record:
    """A prompt as a conversation, the target response as text, and a rejected response where one was asked for."""

    messages: tuple[Message, ...]
    target: str
    rejected: str | None = None
    where: str = dataclasses.field(default="", compare=False)  # file and line or record number, for error messages


def read_source(source: SourceConfig) -> Iterator[tuple[str, Any]]:
    """Yield (where, raw record) for each record of a source; `where` is 'file, line n' or 'file, record n'.

    A JSONL line that is not JSON is yielded as a `ValueError` in place of the record, so that the caller can raise or
    skip it.

    Raises:
        ValueError: the source cannot be read, or a .json file is not an array.
    """
    path = Path(source.path).expanduser()
    if path.suffix == ".jsonl" and path.is_file():
        yield from _read_lines(path)
    elif path.suffix == ".json" and path.is_file():
        records = files.parse_json(path.read_bytes(), path)
        if not isinstance(records, list):
            raise ValueError(f"{path}: expected a JSON array of records, got {type(records).__name__}.")
        yield from ((f"{path}, record {i}", r) for i, r in enumerate(records, start=1))
    else:
        yield from ((f"{source.path}, record {i}", r) for i, r in enumerate(_load_dataset(source, path), start=1))


def parse_record(fields: Any, where: str, rejected: bool = False) -> Record:
    """Check a raw record of any supported format and turn it into a `Record`.

    Formats: `prompt`/`completion` (text or messages); `messages`, whose last assistant turn is the target; SPIN's
    `real`/`generated`; `instruction`/`input`/`output`; `question`/`answer`; and preferences, whose target is `chosen`:
    either two whole conversations, or two responses beside a prompt, an instruction or a question.

    Args:
        fields: the raw record.
        where: file and line or record number, for error messages.
        rejected: also require and return the rejected response: `rejected`, or SPIN's `generated`.

    Raises:
        ValueError: the record is malformed.
    """
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: expected a record with named fields, got {type(fields).__name__}.")
    user = lambda text: ({"role": "user", "content": text},)
    if "chosen" in fields or rejected:
        return _preference(fields, where, rejected)
    if "real" in fields:
        return _conversation(fields["real"], f"{where}, field 'real'")
    if "prompt" in fields and "completion" in fields:
        prompt, completion = fields["prompt"], fields["completion"]
        if isinstance(prompt, list) or isinstance(completion, list):
            turns = [
                *messages_of(_as_turns(prompt, "user"), f"{where}, field 'prompt'"),
                *messages_of(_as_turns(completion, "assistant"), f"{where}, field 'completion'"),
            ]
            return _conversation(turns, where)
        return Record(user(_text(fields, "prompt", where)), _text(fields, "completion", where))
    if "messages" in fields:
        return _conversation(fields["messages"], f"{where}, field 'messages'")
    if "instruction" in fields:
        instruction = _text(fields, "instruction", where)
        context = _text(fields, "input", where, optional=True)
        return Record(user(f"{instruction}\n\n{context}" if context else instruction), _text(fields, "output", where))
    if "question" in fields:
        return Record(user(_text(fields, "question", where)), _text(fields, "answer", where))
    names = ", ".join(map(repr, fields)) or "(none)"
    raise ValueError(f"{where}: the fields {names} match no known record format ({FORMATS}).")


def messages_of(turns: Any, where: str) -> list[Message]:
    """Check the turns of a conversation and copy their role and content; empty system turns are dropped.

    Raises:
        ValueError: `turns` is not a list, or a turn has no role or no text; names `where` and the turn.
    """
    if not isinstance(turns, list | tuple):
        raise ValueError(f"{where}: expected a list of turns, got {type(turns).__name__}.")
    empty_system = lambda turn: isinstance(turn, dict) and turn.get("role") == "system" and turn.get("content") == ""
    turns = [turn for turn in turns if not empty_system(turn)]
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise ValueError(f"{where}, turn {i}: a turn needs the string fields 'role' and 'content'.")
        _text(turn, "content", f"{where}, turn {i}")
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _preference(fields: dict[str, Any], where: str, rejected: bool) -> Record:
    """Parse a record with two responses; the rejected one is parsed only if it is asked for."""
    names = ("real", "generated") if "real" in fields else ("chosen", "rejected")
    parsed = []
    for name in names[: 2 if rejected else 1]:
        value, field = fields.get(name), f"{where}, field '{name}'"
        if isinstance(value, list) and any(isinstance(turn, dict) and turn.get("role") == "user" for turn in value):
            parsed.append(_conversation(value, field))
            continue
        if not isinstance(value, list):
            _text(fields, name, where)
        prompt = {key: fields[key] for key in ("prompt", "instruction", "input", "question") if key in fields}
        response = "output" if "instruction" in prompt else "completion" if "prompt" in prompt else "answer"
        parsed.append(parse_record({**prompt, response: value}, field))
    if any(record.messages != parsed[0].messages for record in parsed):
        raise ValueError(f"{where}: '{names[0]}' and '{names[1]}' answer different prompts.")
    return dataclasses.replace(parsed[0], rejected=parsed[1].target if rejected else None)


def _conversation(turns: Any, where: str) -> Record:
    messages = messages_of(turns, where)
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=None)
    if last is None:
        raise ValueError(f"{where}: the conversation has no assistant turn to use as the target.")
    if last == 0:
        raise ValueError(f"{where}: the conversation has no turn before the target.")
    return Record(tuple(messages[:last]), messages[last]["content"])


def _as_turns(value: Any, role: str) -> Any:
    """Plain text as one turn; everything else unchanged."""
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _text(fields: dict[str, Any], name: str, where: str, optional: bool = False) -> str:
    value = fields.get(name)
    if optional and value in (None, ""):
        return ""
    if value is None:
        raise ValueError(f"{where}: the field '{name}' is missing.")
    if not isinstance(value, str):
        raise ValueError(f"{where}: the field '{name}' must be a string, got {type(value).__name__}.")
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


def _load_dataset(source: SourceConfig, path: Path) -> Any:
    """Read a parquet file, a saved dataset or a hub dataset with the datasets library."""
    import datasets

    try:
        if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
            loaded = datasets.load_from_disk(str(path))
            return loaded[source.split] if isinstance(loaded, datasets.DatasetDict) else loaded
        if path.suffix == ".parquet" and path.is_file():
            return datasets.Dataset.from_parquet(str(path))
        if path.is_file():
            raise ValueError("the file extension is not .jsonl, .json or .parquet")
        return datasets.load_dataset(source.path, source.subset or None, split=source.split)
    except Exception as error:  # the library raises dozens of types; the user needs one sentence
        raise ValueError(
            f"data source '{source.path}' (split '{source.split}') could not be read: {type(error).__name__}: {error}"
        ) from error
