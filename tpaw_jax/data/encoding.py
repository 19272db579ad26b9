"""Records -> tokens, a chunk of a source at a time, in several processes of a host.

Each chunk is first checked, so that the usable records are known and can be mixed, and then encoded. Both are functions
of a chunk alone, so results do not depend on which process computes them.
"""

import contextlib
import dataclasses
import functools
import os
import pickle
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tpaw_jax.config import DataConfig
from tpaw_jax.data.conversations import has_reasoning
from tpaw_jax.data.records import Record, parse_record
from tpaw_jax.data.sources import Chunk, Rows, read_chunk
from tpaw_jax.data.templates import Template

USABLE, TURNS_BEHIND, TOOLS, REASONING = 1, 2, 4, 8
"""Facts about a record, as bits."""

PROMPT_CUT, START_CUT, TARGET_CUT = 1, 2, 4
"""What was truncated of a prompt and its target, as bits."""

RECORDS_PER_PROCESS = 4000
"""A process starts in about the time that it takes to encode half as many."""

MOST_PROCESSES = 64
"""Each takes a few hundred MiB."""


class Task(NamedTuple):
    """A chunk of one of `data.sources`."""

    source: int
    chunk: Chunk


@dataclasses.dataclass(frozen=True)
class Checked:
    """The facts of each record of a chunk; the place and an error message of each record that is not usable."""

    facts: np.ndarray  # [records] uint8
    errors: tuple[tuple[int, str], ...]


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The tokens of some records of a chunk, end to end: of each turn the prompt, the target and the rejected response.

    `errors` has the place, among the records asked for, of each one that could not be encoded, and its message.
    """

    turns: np.ndarray  # [records] int32: turns that are trained on; 0: it could not be encoded
    lengths: np.ndarray  # [turns, 3] int32; 0 if there is no rejected response
    cuts: np.ndarray  # [turns] uint8
    tokens: np.ndarray  # int32
    errors: tuple[tuple[int, str], ...] = ()


def check(task: Task, template: Template, config: DataConfig) -> Checked:
    """Parse the records of a chunk. Stops at the first malformed one, unless they are to be skipped."""
    facts, errors = np.zeros(task.chunk.records, np.uint8), []
    for i, found in enumerate(_parsed(task, config)):
        if isinstance(found, ValueError):
            errors.append((i, str(found)))
            if not config.skip_bad_records:
                break
            continue
        facts[i] = USABLE | (TURNS_BEHIND if found.turns_behind else 0) | (TOOLS if found.uses_tools else 0)
        facts[i] |= REASONING if has_reasoning(found.answer) else 0
    return Checked(facts, tuple(errors))


def encode(task: Task, wanted: np.ndarray, template: Template, config: DataConfig) -> Encoded:
    """Tokenize and truncate the usable records at the places `wanted` of a chunk, in ascending order."""
    turns, errors = np.zeros(len(wanted), np.int32), []
    encoded: list[_Turn] = []
    for place, found in enumerate(_parsed(task, config, wanted)):
        assert isinstance(found, Record)
        all_turns = found.turns() if config.train_on == "all" else [found]
        try:
            of_record = [_encode(turn, template, config) for turn in all_turns]
        except ValueError as error:
            errors.append((place, f"{found.where}: {error}"))
            continue
        turns[place] = len(of_record)
        encoded += of_record
    parts = [part for one in encoded for part in one.parts]
    return Encoded(
        turns=turns,
        lengths=np.array([len(part) for part in parts], np.int32).reshape(-1, 3),
        cuts=np.array([one.cuts for one in encoded], np.uint8),
        tokens=np.concatenate([np.zeros(0, np.int32), *(np.asarray(part, np.int32) for part in parts)]),
        errors=tuple(errors),
    )


class _Turn(NamedTuple):
    parts: tuple[list[int], list[int], list[int]]  # prompt, target, rejected
    cuts: int


def _parsed(task: Task, config: DataConfig, wanted: np.ndarray | None = None) -> Iterator[Record | ValueError]:
    """The records at some places of a chunk, by default at all."""
    places = None if wanted is None else set(wanted.tolist())
    if places is not None and not places:
        return
    for place, (where, raw) in enumerate(read_chunk(task.chunk, config.sources[task.source])):
        if places is not None and place not in places:
            continue
        try:
            if isinstance(raw, ValueError):
                raise raw
            yield dataclasses.replace(parse_record(raw, where, config.responses == "rejected"), where=where)
        except ValueError as error:
            yield error


def _encode(record: Record, template: Template, config: DataConfig) -> _Turn:
    """Tokenize a prompt and its responses and truncate them to the configured lengths.

    As in SPIN, prompts lose their beginning and targets their end. Unlike SPIN, a prompt above its limit is truncated
    even if prompt and target together would fit, because sampling needs the room after the prompt.
    """
    prompt, target, rejected = template.encode(record)
    cuts = 0
    if len(prompt) > config.max_prompt_length:
        has_start = record.messages[0]["role"] == "system" or prompt[0] == template.tokenizer.bos_token_id
        cuts = PROMPT_CUT | (START_CUT if has_start else 0)
        prompt = prompt[-config.max_prompt_length :]
    room = config.max_length - len(prompt)
    cuts |= TARGET_CUT if len(target) > room else 0
    return _Turn((prompt, target[:room], (rejected or [])[:room]), cuts)


Mapper = Callable[..., Iterable[Any]]
"""`map` of a function of a task to tasks; the function also gets the template and the configuration."""


@contextlib.contextmanager
def workers(template: Template, config: DataConfig, records: int, tables: Sequence[Any] = ()) -> Iterator[Mapper]:
    """A `Mapper` that uses several processes if there are enough records. Results come in the order of the tasks.

    The `tables` of tasks are given to each process once, since opening one takes long.
    """
    count = min(config.processes or min(_cores(), MOST_PROCESSES), records // RECORDS_PER_PROCESS)
    if count < 2:
        yield lambda function, *tasks: map(functools.partial(function, template=template, config=config), *tasks)
        return
    with tempfile.TemporaryDirectory(prefix="tpaw-") as folder:
        # in a file: each process would start only after the one before it has read a large tokenizer from its pipe
        shared = Path(folder) / "shared.pickle"
        shared.write_bytes(pickle.dumps(({"template": template, "config": config}, list(tables))))
        pool = _pool(count, shared)
        number_of = {id(table): number for number, table in enumerate(tables)}

        def mapper(function: Callable[..., Any], tasks: Sequence[Task], *more: Sequence[Any]) -> Iterable[Any]:
            return pool.map(functools.partial(_call, function), [_without_table(t, number_of) for t in tasks], *more)

        try:
            yield mapper
        finally:
            pool.shutdown(kill_workers=True)


def _pool(count: int, shared: Path) -> Any:
    from loky import ProcessPoolExecutor  # its processes are not forked from one that has threads of JAX

    environment = {"JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    return ProcessPoolExecutor(count, initializer=_prepare, initargs=(shared, os.getpid()), env=environment)


def _without_table(task: Task, number_of: dict[int, int]) -> Task:
    chunk = task.chunk
    return task._replace(chunk=chunk._replace(table=number_of[id(chunk.table)])) if isinstance(chunk, Rows) else task


_SHARED: dict[str, Any] = {}
"""Of a worker: the template and the configuration, which all of its calls need."""

_TABLES: list[Any] = []
"""Of a worker: the tables of all tasks."""


def _prepare(shared: Path, parent: int) -> None:
    """Get a worker ready. It ends with the process that started it, and leaves signals to that."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    values, tables = pickle.loads(shared.read_bytes())
    _SHARED.update(values)
    _TABLES.extend(tables)


def _call(function: Callable[..., Any], task: Task, *more: Any) -> Any:
    if isinstance(task.chunk, Rows):
        task = task._replace(chunk=task.chunk._replace(table=_TABLES[task.chunk.table]))
    return function(task, *more, **_SHARED)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
