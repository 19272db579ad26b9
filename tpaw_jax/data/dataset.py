"""Load a run's data: mix the sources, tokenize, truncate, hold prompts out, and fingerprint the result.

The processes of a pod share the work: each checks and encodes its chunks of the sources, then all have all tokens, in
temporary files if there are many. The result does not depend on the number of processes.
"""

import dataclasses
import hashlib
import itertools
import json
from pathlib import Path
from typing import NamedTuple, Self

import jax
import numpy as np

from tpaw_jax.config import DataConfig
from tpaw_jax.data import encoding
from tpaw_jax.data.encoding import Mapper, Task
from tpaw_jax.data.sources import Rows, split_source
from tpaw_jax.data.templates import Template
from tpaw_jax.runtime import processes
from tpaw_jax.storage import exchange
from tpaw_jax.storage.array_files import Spool
from tpaw_jax.types import NOTHING, Prompts, Ragged


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


def load(
    config: DataConfig, template: Template, seed: int, directory: Path | None = None
) -> tuple[Prompts, Prompts, DataReport]:
    """The training prompts, the held-out prompts, and a report.

    Args:
        config: names the sources.
        template: turns records into tokens.
        seed: of the order, and of the sampling of weighted sources.
        directory: one that all processes share, for tokens on their way; without it, every process does all the work.

    Raises:
        ValueError: a source cannot be read, a record is malformed (names file, line and field), or no prompt to train
            on is left.
    """
    tasks = [Task(i, chunk) for i, source in enumerate(config.sources) for chunk in split_source(source)]
    share = _Share.of(tasks, directory)
    if share.hosts > 1:
        processes.check_same(_facts(tasks, template))
    tables = list({id(t.chunk.table): t.chunk.table for t in share.tasks if isinstance(t.chunk, Rows)}.values())
    with encoding.workers(template, config, sum(task.chunk.records for task in share.tasks), tables) as mapper:
        facts, skipped = _check(share, mapper, config)
        records = _mix(share, facts, config, seed)
        held_out = min(config.holdout_prompts, len(records))
        wanted = records if config.max_prompts == 0 else records[: held_out + config.max_prompts]
        tokens = _encode(share, wanted, mapper, config)
    skipped += [tokens.errors[record] for record in wanted.tolist() if record in tokens.errors]
    kept = wanted[tokens.turns[wanted] > 0]
    if len(kept) <= held_out:
        raise ValueError(
            f"data.sources: {len(records)} usable records leave no prompt to train on after {held_out} are held out "
            f"({len(skipped)} records were skipped). Add data, or lower data.holdout_prompts."
        )
    prompts, cuts = _prompts(tokens, kept, config)
    report = DataReport(
        records=len(records),
        prompts_cut=_count(cuts, encoding.PROMPT_CUT),
        targets_cut=_count(cuts, encoding.TARGET_CUT),
        starts_cut=_count(cuts, encoding.START_CUT),
        turns_behind=_count(facts[records], encoding.TURNS_BEHIND),
        with_tools=_count(facts[records], encoding.TOOLS),
        with_reasoning=_count(facts[records], encoding.REASONING),
        skipped=tuple(skipped),
        fingerprint=_fingerprint(prompts),
    )
    return (*_hold_out(prompts, int(tokens.turns[kept[:held_out]].sum())), report)


def _hold_out(prompts: Prompts, count: int) -> tuple[Prompts, Prompts]:
    """The prompts to train on, which equal none of the first `count`, and those."""
    held_out = {tokens.tobytes() for tokens in prompts.prompt_tokens[:count]}
    train = np.arange(count, len(prompts))
    if held_out:
        differs = (tokens.tobytes() not in held_out for tokens in prompts.prompt_tokens[count:])
        train = train[np.fromiter(differs, bool, len(train))]
    if not len(train):
        raise ValueError(
            "data.sources: every prompt to train on is also a held-out prompt. Add data, or lower data.holdout_prompts."
        )
    return prompts.take(train), prompts.take(range(count))


def _facts(tasks: list[Task], template: Template) -> dict[str, str]:
    """Digests of what all hosts must have alike, since each encodes a part."""
    digest = lambda parts: hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    tokenizer = template.tokenizer
    fast = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = fast.to_str() if fast else repr((type(tokenizer), sorted(tokenizer.get_vocab().items())))
    return {
        "the digest of the records": digest([f"{task.source} {task.chunk.facts}" for task in tasks]),
        "the digest of the tokenizer": digest([vocabulary]),
        "the digest of the chat template": digest([repr((template.chat, template.modes, template.system_prompt))]),
    }


class _Share(NamedTuple):
    """The tasks of all processes, those of this process, and where to exchange results."""

    all_tasks: list[Task]
    starts: np.ndarray  # [tasks + 1] int64: the number of each task's first record among all records
    process: int  # this one
    hosts: int  # processes that share the work
    directory: Path

    @classmethod
    def of(cls, tasks: list[Task], directory: Path | None) -> Self:
        """Every `hosts`-th task; all of them without a directory."""
        starts = np.cumsum([0, *(task.chunk.records for task in tasks)])
        process, hosts = (0, 1) if directory is None else (jax.process_index(), jax.process_count())
        return cls(tasks, starts, process, hosts, directory or Path())

    @property
    def numbers(self) -> range:
        """The numbers of this process's tasks."""
        return range(self.process, len(self.all_tasks), self.hosts)

    @property
    def tasks(self) -> list[Task]:
        """The tasks of this process."""
        return [self.all_tasks[number] for number in self.numbers]

    def gather(
        self, name: str, errors: dict[int, str], joined: dict[str, np.ndarray], **arrays: np.ndarray
    ) -> tuple[list[dict[str, np.ndarray]], dict[str, np.ndarray]]:
        """As `exchange.all_gather_joined`; and in `errors` the errors of all processes, by record."""
        if self.hosts == 1:
            return [arrays], joined
        encoded = np.frombuffer(json.dumps(list(errors.items())).encode(), np.uint8)
        parts, joined = exchange.all_gather_joined(self.directory, name, joined, errors=encoded, **arrays)
        for part in parts:
            errors |= {int(record): message for record, message in json.loads(part.pop("errors").tobytes())}
        return parts, joined


def _check(share: _Share, mapper: Mapper, config: DataConfig) -> tuple[np.ndarray, list[str]]:
    """The facts of all records, [records] uint8, and the errors of those that are not usable, in order.

    Raises:
        ValueError: the first malformed record, unless they are to be skipped.
    """
    parts: list[np.ndarray] = []
    errors: dict[int, str] = {}
    for number, found in zip(share.numbers, mapper(encoding.check, share.tasks), strict=True):
        parts.append(found.facts)
        errors |= {int(share.starts[number]) + place: message for place, message in found.errors}
        if errors and not config.skip_bad_records:
            break
    gathered, _ = share.gather("facts", errors, {}, facts=np.concatenate([np.zeros(0, np.uint8), *parts]))
    if errors and not config.skip_bad_records:
        raise ValueError(errors[min(errors)])
    facts = np.zeros(share.starts[-1], np.uint8)
    for process, part in enumerate(gathered):
        first = 0
        for number in share._replace(process=process).numbers:
            low, high = share.starts[number : number + 2]
            facts[low:high] = part["facts"][first : first + high - low]
            first += high - low
    return facts, [errors[record] for record in sorted(errors)]


def _mix(share: _Share, facts: np.ndarray, config: DataConfig, seed: int) -> np.ndarray:
    """The numbers of the usable records, each source's sampled by its weight, in random order."""
    source_of = np.repeat([task.source for task in share.all_tasks], np.diff(share.starts))
    mixed = [np.zeros(0, np.int64)]
    for i, source in enumerate(config.sources):
        usable = np.flatnonzero((source_of == i) & (facts & encoding.USABLE > 0))
        if source.weight != 1.0 and len(usable):
            order = np.random.default_rng((seed, i)).permutation(len(usable))
            usable = usable[order[np.arange(round(source.weight * len(usable))) % len(usable)]]
        mixed.append(usable)
    records = np.concatenate(mixed)
    return records[np.random.default_rng(seed).permutation(len(records))]


class _Tokens(NamedTuple):
    """The tokens of all records that are used; records are counted over all sources, turns over all records."""

    turns: np.ndarray  # [records] int32; 0 if it is not used
    first: np.ndarray  # [records] int64: the number of its first turn
    parts: Ragged  # prompt, target and rejected response of turn 0, then of turn 1, ...
    cuts: np.ndarray  # [turns] uint8
    errors: dict[int, str]  # by record


def _encode(share: _Share, wanted: np.ndarray, mapper: Mapper, config: DataConfig) -> _Tokens:
    """The tokens of the records whose numbers are `wanted`.

    Raises:
        ValueError: a record cannot be encoded, unless such are to be skipped.
    """
    needed = np.unique(wanted)
    bounds = np.searchsorted(needed, share.starts)
    records = [needed[low:high] for low, high in itertools.pairwise(bounds)]  # of each task
    errors: dict[int, str] = {}
    empty = {"turns": np.zeros(0, np.int32), "lengths": np.zeros((0, 3), np.int32), "cuts": np.zeros(0, np.uint8)}
    parts, tokens = {name: [values] for name, values in empty.items()}, Spool(np.int32)
    places = [records[number] - share.starts[number] for number in share.numbers]
    for number, found in zip(share.numbers, mapper(encoding.encode, share.tasks, places), strict=True):
        for name, some in parts.items():
            some.append(getattr(found, name))
        tokens.append(found.tokens)
        errors |= {int(records[number][place]): message for place, message in found.errors}
        if errors and not config.skip_bad_records:
            break
    of_own = {name: np.concatenate(some) for name, some in parts.items()}
    gathered, of_all = share.gather("tokens", errors, {"tokens": tokens.array()}, **of_own)
    if errors and not config.skip_bad_records:
        raise ValueError(errors[min(errors)])
    in_order = [record for process in range(share.hosts) for record in records[process :: share.hosts]]
    return _join(np.concatenate([needed[:0], *in_order]), gathered, of_all["tokens"], share.starts[-1], errors)


def _join(
    records: np.ndarray, parts: list[dict[str, np.ndarray]], tokens: np.ndarray, total: int, errors: dict[int, str]
) -> _Tokens:
    """The results of all processes, which lie in the order of `records`."""
    joined = lambda name: np.concatenate([part[name] for part in parts])
    of_records = joined("turns")
    turns, first = np.zeros(total, np.int32), np.zeros(total, np.int64)
    turns[records], first[records] = of_records, np.cumsum(of_records, dtype=np.int64) - of_records
    return _Tokens(turns, first, Ragged.split(tokens, joined("lengths").ravel()), joined("cuts"), errors)


def _prompts(tokens: _Tokens, kept: np.ndarray, config: DataConfig) -> tuple[Prompts, np.ndarray]:
    """The prompts of the turns of the records `kept`, and what was cut of each."""
    sizes = tokens.turns[kept]
    turns = np.repeat(tokens.first[kept] - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
    prompt, target, rejected = (tokens.parts.take(3 * turns + i) for i in range(3))
    ids = np.arange(len(turns), dtype=np.int32)
    conversations = None if max(sizes) == 1 else np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    rejected = rejected if config.responses == "rejected" else NOTHING
    return Prompts(ids, prompt, target, rejected, conversations), tokens.cuts[turns]


def _count(flags: np.ndarray, bit: int) -> int:
    return int(np.count_nonzero(flags & bit))


def _fingerprint(prompts: Prompts) -> str:
    digest = hashlib.sha256()
    for tokens in itertools.chain(prompts.prompt_tokens, prompts.target_tokens, prompts.rejected_tokens):
        digest.update(len(tokens).to_bytes(4, "little") + tokens.tobytes())
    return digest.hexdigest()[:16]
