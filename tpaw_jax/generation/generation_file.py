"""Responses as JSON lines: what other engines write for a round, and what a round has sampled so far.

One line a response: {"prompt_id": 7, "token_ids": [12, 9, 2], "log_probs": [-0.3, -1.2, -0.1]}. Another engine may
leave out `log_probs`, may give `response`, a text, instead of `token_ids`, and may add `prompt_token_ids`, so that a
tokenizer or template other than the run's is found out. A run's own lines end with `check`, the CRC-32 of the rest;
where a prompt has several responses, `sample` numbers them.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tpaw_jax.data.dataset import Template
from tpaw_jax.generation.engine import Response
from tpaw_jax.storage import files
from tpaw_jax.types import Generations, Prompts

SECONDS_BETWEEN_APPENDS = 2.0
"""A bucket that is mounted as a file system takes one write of a file a second, and each is awaited."""


class Given(NamedTuple):
    """What a file of another engine holds."""

    generations: Generations
    retokenised: int  # responses that came as text
    without_log_probs: int


def read(path: Path, prompts: Prompts, template: Template, vocabulary: int, longest: int, round_number: int) -> Given:
    """The responses of another engine, one a prompt, checked line by line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line cannot be used, a prompt is answered twice or not at all; names the line and the field.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file of generations.")
    place = {int(prompt_id): i for i, prompt_id in enumerate(prompts.ids)}
    found: dict[int, Response] = {}
    lines: dict[int, int] = {}
    retokenised = 0
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        record = _record(line, where)
        i = _prompt(record, place, where)
        if i in lines:
            raise ValueError(f"{where}: prompt_id {record['prompt_id']} is answered in line {lines[i]} already.")
        _check_prompt_tokens(record, prompts.prompt_tokens[i], where)
        retokenised += record.get("token_ids") is None
        found[i], lines[i] = _response(record, template, vocabulary, longest, where), number
    missing = [int(prompts.ids[i]) for i in range(len(prompts)) if i not in found]
    if missing:
        first = ", ".join(map(str, missing[:5]))
        raise ValueError(f"{path}: {len(missing)} of {len(prompts)} prompts are not answered; prompt_id {first} ...")
    ordered = [found[i] for i in range(len(prompts))]
    without = sum(bool(np.isnan(log_probs).any()) for _, log_probs in ordered)
    generations = Generations(round_number, tuple(t for t, _ in ordered), tuple(p for _, p in ordered))
    return Given(generations, retokenised, without)


@contextlib.contextmanager
def appending(
    path: Path, prompts: Prompts, seconds: float = SECONDS_BETWEEN_APPENDS, num_generations: int = 1
) -> Iterator[Callable[[Mapping[int, Response]], None]]:
    """Within it, what it gives adds finished responses: the first at once, later ones when `seconds` have passed.

    The last are added at the end, also where an error or a notice to stop ends it; a kill can lose those of `seconds`.
    """
    waiting: dict[int, Response] = {}
    written = -math.inf

    def write() -> None:
        nonlocal written
        append(path, prompts, waiting, num_generations)
        waiting.clear()
        written = time.monotonic()

    def keep(responses: Mapping[int, Response]) -> None:
        waiting.update(responses)
        if time.monotonic() - written >= seconds:
            write()

    try:
        yield keep
    finally:
        if waiting:
            write()


def append(path: Path, prompts: Prompts, responses: Mapping[int, Response], num_generations: int = 1) -> None:
    """Add finished responses, by their places as `sampling.generate` has them, and see them to the disk."""
    lines = []
    for n, (tokens, log_probs) in responses.items():
        i, sample = divmod(n, num_generations)
        record = {"prompt_id": int(prompts.ids[i]), "token_ids": tokens.tolist(), "log_probs": log_probs.tolist()}
        record |= {"sample": sample} if num_generations > 1 else {}
        lines.append(json.dumps(record | {"check": _check(record)}))
    files.append_lines(path, lines)


def resume(
    path: Path, prompts: Prompts, say: Callable[[str], None] = lambda text: None, num_generations: int = 1
) -> dict[int, Response]:
    """What `append` wrote, by place. A line that a kill cut short, or that is damaged, is removed."""
    found, whole = _appended(path, prompts, num_generations)
    if path.exists() and len(content := b"".join(whole)) < path.stat().st_size:
        lines = len(path.read_bytes().splitlines())
        say(
            f"{path}: {lines - len(whole)} of {lines} lines are damaged or cut short; those prompts are answered again."
        )
        files.replace(path, content)
    return found


def of_all(paths: Iterable[Path], prompts: Prompts) -> dict[int, Response]:
    """What `append` wrote into any of several files."""
    together: dict[int, Response] = {}
    for path in paths:
        together |= _appended(path, prompts)[0]
    return together


def _appended(path: Path, prompts: Prompts, num_generations: int = 1) -> tuple[dict[int, Response], list[bytes]]:
    """The responses in a file, of its whole lines, and those lines."""
    found: dict[int, Response] = {}
    whole: list[bytes] = []
    if not path.exists():
        return found, whole
    place = {int(prompt_id): i for i, prompt_id in enumerate(prompts.ids)}
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            record = files.parse_json(line, path)
            if record.pop("check") != _check(record) or not line.endswith(b"\n"):
                continue
            tokens, log_probs = np.array(record["token_ids"], np.int32), np.array(record["log_probs"], np.float32)
            found[place[record["prompt_id"]] * num_generations + record.get("sample", 0)] = tokens, log_probs
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        whole.append(line)
    return found, whole


def _check(record: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(record).encode())


def _record(line: bytes, where: str) -> dict[str, Any]:
    record = files.parse_json(line, where)
    if not isinstance(record, dict):
        raise ValueError(f"{where}: an object with prompt_id and token_ids was expected, not {type(record).__name__}.")
    return record


def _prompt(record: dict[str, Any], place: Mapping[int, int], where: str) -> int:
    prompt_id = record.get("prompt_id")
    if type(prompt_id) is not int or prompt_id not in place:
        raise ValueError(f"{where}: prompt_id is {prompt_id!r}; it must be the id of one of the {len(place)} prompts.")
    return place[prompt_id]


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
            raise ValueError(f"{where}: token_ids is missing, and response is no text either.")
        ids = [*template.tokenizer.encode(text, add_special_tokens=False), template.end_of_turn][:longest]
    if not isinstance(ids, list) or not ids or not all(type(t) is int and 0 <= t < vocabulary for t in ids):
        raise ValueError(f"{where}: token_ids must be a list of at least one id from 0 to {vocabulary - 1}.")
    if len(ids) > longest:
        raise ValueError(f"{where}: {len(ids)} token_ids exceed sampling.max_new_tokens, {longest}.")
    log_probs = record.get("log_probs")
    if log_probs is None:
        return np.array(ids, np.int32), np.full(len(ids), np.nan, np.float32)
    numbers = isinstance(log_probs, list) and all(type(p) in (int, float) and -1e30 < p <= 1e-3 for p in log_probs)
    if not numbers or len(log_probs) != len(ids):
        raise ValueError(f"{where}: log_probs must be {len(ids)} numbers of at most 0, one for each of token_ids.")
    return np.array(ids, np.int32), np.array(log_probs, np.float32)
