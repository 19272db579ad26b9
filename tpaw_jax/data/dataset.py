"""Load a run's data: mix the sources, tokenize, truncate, hold prompts out, and fingerprint the result."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tpaw_jax.config import DataConfig, SourceConfig
from tpaw_jax.data.conversations import has_reasoning
from tpaw_jax.data.records import Record, parse_record
from tpaw_jax.data.sources import read_source
from tpaw_jax.data.templates import Template
from tpaw_jax.types import Prompts


@dataclasses.dataclass(frozen=True)
class DataReport:
    """How many records were read, truncated and skipped."""

    records: int
    prompts_cut: int
    targets_cut: int
    starts_cut: int  # truncated prompts that lost a system turn or the BOS token
    turns_behind: int  # conversations with turns behind the last answer, which are left out
    with_tools: int  # conversations with descriptions or calls of tools
    with_reasoning: int  # conversations whose answer has reasoning
    skipped: tuple[str, ...]  # one error message per malformed record
    fingerprint: str  # hash of all tokens, so that a resumed run notices changed data


def load(config: DataConfig, template: Template, seed: int) -> tuple[Prompts, Prompts, DataReport]:
    """The training prompts, the held-out prompts, and a report.

    Raises:
        ValueError: a source cannot be read, a record is malformed (names file, line and field), or no prompt to train
            on is left.
    """
    skipped: list[str] = []
    records = [r for i, source in enumerate(config.sources) for r in _read(source, i, config, skipped, seed)]
    order = np.random.default_rng(seed).permutation(len(records))
    held_out = min(config.holdout_prompts, len(records))
    wanted = len(records) if config.max_prompts == 0 else min(len(records), held_out + config.max_prompts)
    conversations = _encode_all([records[i] for i in order[:wanted]], template, config, skipped)
    if len(conversations) <= held_out:
        raise ValueError(
            f"data.sources: {len(records)} usable records leave no prompt to train on after {held_out} are held out "
            f"({len(skipped)} records were skipped). Add data, or lower data.holdout_prompts."
        )
    encoded = [one for turns in conversations for one in turns]
    sizes = [len(turns) for turns in conversations]
    prompts = Prompts(
        np.arange(len(encoded), dtype=np.int32),
        tuple(np.asarray(one.prompt, np.int32) for one in encoded),
        tuple(np.asarray(one.target, np.int32) for one in encoded),
        tuple(np.asarray(one.rejected, np.int32) for one in encoded if one.rejected is not None),
        None if max(sizes) == 1 else np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
    )
    report = DataReport(
        records=len(records),
        prompts_cut=sum(one.prompt_cut for one in encoded),
        targets_cut=sum(one.target_cut for one in encoded),
        starts_cut=sum(one.start_cut for one in encoded),
        turns_behind=sum(record.turns_behind > 0 for record in records),
        with_tools=sum(record.uses_tools for record in records),
        with_reasoning=sum(has_reasoning(record.answer) for record in records),
        skipped=tuple(skipped),
        fingerprint=_fingerprint(prompts),
    )
    first = sum(sizes[:held_out])
    held_out_tokens = {prompts.prompt_tokens[i].tobytes() for i in range(first)}
    train = [i for i in range(first, len(prompts)) if prompts.prompt_tokens[i].tobytes() not in held_out_tokens]
    if not train:
        raise ValueError(
            "data.sources: every prompt to train on is also a held-out prompt. Add data, or lower data.holdout_prompts."
        )
    return prompts.take(train), prompts.take(range(first)), report


def _read(source: SourceConfig, number: int, config: DataConfig, skipped: list[str], seed: int) -> list[Record]:
    """The records of one source, sampled by its weight; errors are raised, or appended to `skipped`."""
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
    """The tokens of a prompt and its responses, and whether they were truncated."""

    prompt: list[int]
    target: list[int]
    rejected: list[int] | None
    prompt_cut: bool
    start_cut: bool
    target_cut: bool


def _encode_all(
    records: Sequence[Record], template: Template, config: DataConfig, skipped: list[str]
) -> list[list[_Encoded]]:
    """Tokenize the turns of records that are trained on; errors are raised, or appended to `skipped`."""
    encoded = []
    for record in records:
        turns = record.turns() if config.train_on == "all" else [record]
        try:
            encoded.append([_encode(turn, template, config) for turn in turns])
        except ValueError as error:
            message = f"{record.where}: {error}"
            if not config.skip_bad_records:
                raise ValueError(message) from error
            skipped.append(message)
    return encoded


def _encode(record: Record, template: Template, config: DataConfig) -> _Encoded:
    """Tokenize a prompt and its responses and truncate them to the configured lengths.

    As in SPIN, prompts lose their beginning and targets their end. Unlike SPIN, a prompt above its limit is truncated
    even if prompt and target together would fit, because sampling needs the room after the prompt.
    """
    prompt, target, rejected = template.encode(record)
    prompt_cut = len(prompt) > config.max_prompt_length
    has_start = record.messages[0]["role"] == "system" or prompt[0] == template.tokenizer.bos_token_id
    if prompt_cut:
        prompt = prompt[-config.max_prompt_length :]
    room = config.max_length - len(prompt)
    return _Encoded(
        prompt, target[:room], rejected and rejected[:room], prompt_cut, prompt_cut and has_start, len(target) > room
    )


def _fingerprint(prompts: Prompts) -> str:
    digest = hashlib.sha256()
    for tokens in (*prompts.prompt_tokens, *prompts.target_tokens, *prompts.rejected_tokens):
        digest.update(len(tokens).to_bytes(4, "little") + tokens.tobytes())
    return digest.hexdigest()[:16]
