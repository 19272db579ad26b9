"""Responses in files: another engine's, those that a round has sampled so far, and those that processes exchange.

Another engine's file has one line per response: {"prompt_id": 7, "token_ids": [12, 9, 2], "log_probs": [-0.3, -1.2,
-0.1]}. It may omit `log_probs`, may give the text `response` instead of `token_ids`, and may add `prompt_token_ids`, by
which a different tokenizer or template is detected. A run's own responses are blocks of arrays (`storage.block_log`).
"""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tpaw_jax.data.templates import Template
from tpaw_jax.generation.engine import Response, generations_of
from tpaw_jax.storage import array_files, block_log, bucket, exchange, files
from tpaw_jax.types import Generations, Prompts, Ragged

SECONDS_BETWEEN_APPENDS = 2.0
"""A bucket mounted as a file system accepts about one write per file and second, and each write blocks."""

SHARE_BETWEEN_APPENDS = 0.02
"""An hour of sampling then makes some 200 objects in a bucket."""


class ExternalResponses(NamedTuple):
    """The contents of another engine's file."""

    generations: Generations
    retokenized: int  # responses given as text
    without_log_probs: int  # responses


def read(
    path: Path, prompts: Prompts, template: Template, vocabulary: int, longest: int, round_number: int
) -> ExternalResponses:
    """Read another engine's responses, one per prompt, and check every line.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a line cannot be used (the message names line and field), or a prompt has no or two responses.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file of generations.")
    index_of = _index_by_id(prompts)
    responses: dict[int, Response] = {}
    lines: dict[int, int] = {}
    retokenized = 0
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        record = _record(line, where)
        i = _prompt_index(record, index_of, where)
        if i in lines:
            raise ValueError(f"{where}: prompt_id {record['prompt_id']} was already answered in line {lines[i]}.")
        _check_prompt_tokens(record, prompts.prompt_tokens[i], where)
        retokenized += record.get("token_ids") is None
        responses[i], lines[i] = _response(record, template, vocabulary, longest, where), number
    missing = [int(prompts.ids[i]) for i in range(len(prompts)) if i not in responses]
    if missing:
        first = ", ".join(map(str, missing[:5])) + (" and others" if len(missing) > 5 else "")
        raise ValueError(f"{path}: {len(missing)} of {len(prompts)} prompts are not answered: prompt_id {first}.")
    ordered = [responses[i] for i in range(len(prompts))]
    without = sum(bool(np.isnan(log_probs).any()) for _, log_probs in ordered)
    return ExternalResponses(generations_of(round_number, ordered), retokenized, without)


@contextlib.contextmanager
def appender(
    path: Path, prompts: Prompts, seconds: float = SECONDS_BETWEEN_APPENDS, num_generations: int = 1
) -> Iterator[Callable[[Mapping[int, Response]], None]]:
    """Yields a function that takes finished responses and appends them to the file, at most every `seconds`.

    In a bucket, where every append is an object, the time between appends grows to `SHARE_BETWEEN_APPENDS` of the time
    since the first. The first call writes at once. What is left is written on exit, also after an exception or a
    preemption notice; a kill can lose the responses since the last append.
    """
    waiting: dict[int, Response] = {}
    written, begun = -math.inf, time.monotonic()
    share = SHARE_BETWEEN_APPENDS if bucket.is_remote(path) else 0.0

    def write() -> None:
        nonlocal written
        append(path, prompts, waiting, num_generations)
        waiting.clear()
        written = time.monotonic()

    def keep(responses: Mapping[int, Response]) -> None:
        waiting.update(responses)
        now = time.monotonic()
        if now - written >= max(seconds, share * (now - begun)):
            write()

    try:
        yield keep
    finally:
        if waiting:
            write()


def append(path: Path, prompts: Prompts, responses: Mapping[int, Response], num_generations: int = 1) -> None:
    """Append finished responses, by request as in `engine.generate`, and flush them to disk.

    In a bucket, every call writes an object of its own, whose name begins as the path's.
    """
    if not responses:
        return
    index, sample = np.divmod(np.array(list(responses), np.int64), num_generations)
    tokens, log_probs = zip(*responses.values(), strict=True)
    block = block_log.block(
        prompt_id=prompts.ids[index],
        sample=sample,
        lengths=np.array([len(one) for one in tokens], np.int32),
        tokens=np.concatenate(tokens),
        log_probs=np.concatenate(log_probs),
    )
    if bucket.is_remote(path):
        files.replace(path.with_name(f"{path.stem}_{time.time_ns():x}{path.suffix}"), block)
    else:
        files.append(path, block)


def repair(path: Path, say: Callable[[str], None] = lambda text: None) -> None:
    """Remove truncated and corrupted blocks from a file that `append` wrote."""
    if not path.exists():
        return
    content = path.read_bytes()
    spans = list(block_log.intact_spans(content))
    damaged = len(content) - sum(end - start for start, end in spans)
    if damaged:
        say(
            f"{path}: {damaged} of {len(content)} bytes are corrupted or truncated; the prompts that they answered are "
            "answered again."
        )
        files.replace(path, b"".join(content[start:end] for start, end in spans))


def read_partial(
    paths: Iterable[Path], prompts: Prompts, wanted: np.ndarray | None = None, num_generations: int = 1
) -> dict[int, Response]:
    """The responses that `append` wrote to several files, by request; with `wanted`, only those to these prompts.

    Damaged blocks, and responses to prompts that `prompts` does not have, are left out.
    """
    responses: dict[int, Response] = {}
    by_id = np.argsort(prompts.ids, kind="stable")
    asked = np.zeros(len(prompts), bool)
    asked[slice(None) if wanted is None else wanted] = True
    for block in itertools.chain.from_iterable(block_log.intact_blocks(p.read_bytes()) for p in paths if p.exists()):
        index = by_id[np.searchsorted(prompts.ids, block["prompt_id"], sorter=by_id).clip(max=len(prompts) - 1)]
        tokens, log_probs = (Ragged.split(block[name], block["lengths"]) for name in ("tokens", "log_probs"))
        for n in np.flatnonzero((prompts.ids[index] == block["prompt_id"]) & asked[index]).tolist():
            request = int(index[n]) * num_generations + int(block["sample"][n])
            responses[request] = tokens[n].copy(), log_probs[n].copy()  # not views, which would keep the whole block
    return responses


def gather_from_processes(
    generations: Generations, indices: np.ndarray, round_number: int, directory: Path | None = None
) -> Generations:
    """The responses to all prompts, one each, given this process's own to the prompts at `indices`.

    They go through a `directory` that all processes share, or through the devices.
    """
    own = {"tokens": generations.tokens.flat(), "log_probs": generations.log_probs.flat()}
    parts, joined = exchange.all_gather_joined(
        directory, "responses", own, index=indices, lengths=generations.tokens.lengths
    )
    of_all = lambda name: np.concatenate([part[name] for part in parts])
    in_order, lengths = np.argsort(of_all("index")), of_all("lengths")

    def ordered(name: str, dtype: Any) -> Ragged:
        values = Ragged.split(joined.pop(name), lengths).take(in_order)
        return Ragged.split(array_files.join(values, dtype), values.lengths)

    return Generations(round_number, ordered("tokens", np.int32), ordered("log_probs", np.float32))


def _index_by_id(prompts: Prompts) -> dict[int, int]:
    return {int(prompt_id): i for i, prompt_id in enumerate(prompts.ids)}


def _record(line: bytes, where: str) -> dict[str, Any]:
    record = files.parse_json(line, where)
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with prompt_id and token_ids, got {type(record).__name__}.")
    return record


def _prompt_index(record: dict[str, Any], index_of: Mapping[int, int], where: str) -> int:
    prompt_id = record.get("prompt_id")
    if type(prompt_id) is not int or prompt_id not in index_of:
        raise ValueError(f"{where}: prompt_id is {prompt_id!r}; it must be the id of one of {len(index_of)} prompts.")
    return index_of[prompt_id]


def _check_prompt_tokens(record: dict[str, Any], tokens: np.ndarray, where: str) -> None:
    given = record.get("prompt_token_ids")
    if given is not None and given != tokens.tolist():
        raise ValueError(
            f"{where}: prompt_token_ids are not those of this run's prompt; the other engine used another tokenizer, "
            "chat template or length limit."
        )


def _response(record: dict[str, Any], template: Template, vocabulary: int, longest: int, where: str) -> Response:
    ids = record.get("token_ids")
    if ids is None:
        text = record.get("response")
        if not isinstance(text, str):
            raise ValueError(f"{where}: token_ids is missing, and response is not a string.")
        ids = [*template.tokenizer.encode(text, add_special_tokens=False), template.end_of_turn][:longest]
    if not isinstance(ids, list) or not ids or not all(type(t) is int and 0 <= t < vocabulary for t in ids):
        raise ValueError(f"{where}: token_ids must be a non-empty list of ids from 0 to {vocabulary - 1}.")
    if len(ids) > longest:
        raise ValueError(f"{where}: token_ids has {len(ids)} tokens; sampling.max_new_tokens allows {longest}.")
    log_probs = record.get("log_probs")
    if log_probs is None:
        return np.array(ids, np.int32), np.full(len(ids), np.nan, np.float32)
    numbers = isinstance(log_probs, list) and all(type(p) in (int, float) and -1e30 < p <= 1e-3 for p in log_probs)
    if not numbers or len(log_probs) != len(ids):
        raise ValueError(f"{where}: log_probs must be a list of {len(ids)} numbers of at most 0, one per token.")
    return np.array(ids, np.int32), np.array(log_probs, np.float32)
