"""Tasks with exact answers: greedy responses by the sampler, the answer extracted, its share right with an interval.

A task's problems are records of any shape that training takes; the target text holds the right answer.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, PyTree

from tpaw_jax.config import EvaluationConfig, RunConfig, SamplingConfig, SourceConfig, TaskConfig
from tpaw_jax.data import dataset
from tpaw_jax.data.dataset import Template
from tpaw_jax.generation import engine
from tpaw_jax.generation.policy import Policy
from tpaw_jax.generation.slots import Sampler
from tpaw_jax.types import Prompts

CONFIDENCE = 1.959963984540054
"""Standard deviations of a normal distribution that 95 % lie within."""


class Task(NamedTuple):
    """A task's prompts, and the right answer to each."""

    config: TaskConfig
    prompts: Prompts
    answers: tuple[str, ...]


class Result(NamedTuple):
    """How a policy did on a task."""

    name: str
    correct: int
    problems: int
    low: float  # of the share that is right, 95 % interval
    high: float
    tokens: int  # of all responses
    seconds: float
    records: list[dict[str, Any]]  # one a problem: prompt, answer, response, extracted, correct, token_ids

    @property
    def accuracy(self) -> float:
        """The share that is right."""
        return self.correct / self.problems

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.accuracy:.1%} ({self.correct} of {self.problems}; 95 % interval {self.low:.1%} to "
            f"{self.high:.1%}), {self.tokens / self.seconds:.0f} tokens/s"
        )


def load_task(config: TaskConfig, template: Template) -> Task:
    """The problems of a task, in their order.

    Raises:
        ValueError: a record is malformed, or its target holds no answer; names file, line and field.
    """
    source = SourceConfig(config.path, config.split, subset=config.subset)
    prompts, targets = [], []
    answers: list[str] = []
    for where, raw in dataset.read_source(source):
        if config.limit and len(answers) == config.limit:
            break
        if isinstance(raw, ValueError):
            raise raw
        record = dataset.parse_record(raw, where)
        answer = extract(config.answer, record.target)
        if answer is None:
            raise ValueError(
                f"{where}: the target holds no answer; the answer of '{config.name}' is {config.answer!r}."
            )
        prompts.append(np.asarray(template.prompt_tokens(record.messages), np.int32))
        targets.append(np.asarray(template.target_tokens(record.target), np.int32))
        answers.append(answer)
    if not answers:
        raise ValueError(f"evaluation.tasks, '{config.name}': {config.path} has no problems.")
    return Task(
        config, Prompts(np.arange(len(prompts), dtype=np.int32), tuple(prompts), tuple(targets)), tuple(answers)
    )


def evaluate(
    sampler: Sampler,
    params: PyTree[Array],
    task: Task,
    template: Template,
    stop_fn: engine.StopFn | None = None,
    progress: Callable[[int, int], None] = lambda requests, tokens: None,
) -> Result:
    """Answer a task's problems and count the right ones. All processes call it alike, each answers its share.

    `sampler` is greedy and gives at least the task's `max_new_tokens`.
    """
    prompts, begun = task.prompts, time.perf_counter()
    mine, together = engine.local_share(sampler, len(prompts))
    made = engine.generate(
        sampler,
        params,
        prompts.take(mine),
        seed=0,
        round_number=0,
        limits=[task.config.max_new_tokens] * len(mine),
        stop_fn=stop_fn,
        progress=progress,
    )
    tokens = (made if together else engine.gather_from_processes(made, mine, 0)).tokens
    seconds = time.perf_counter() - begun
    decode = lambda ids: template.tokenizer.decode(ids, skip_special_tokens=True)
    records = []
    for i, (response, answer) in enumerate(zip(map(decode, tokens), task.answers, strict=True)):
        extracted = extract(task.config.response, response)
        record = {"prompt": decode(prompts.prompt_tokens[i]), "answer": answer, "response": response}
        right = extracted is not None and same_answer(extracted, answer)
        records.append({**record, "extracted": extracted, "correct": right, "token_ids": tokens[i].tolist()})
    correct = sum(record["correct"] for record in records)
    low, high = interval(correct, len(records))
    return Result(task.config.name, correct, len(records), low, high, sum(map(len, tokens)), seconds, records)


def extract(pattern: str, text: str) -> str | None:
    """The last match of a regular expression, its first group where it has one; all of the text without a pattern."""
    if not pattern:
        return text.strip()
    found = [match.group(1) if match.re.groups else match.group() for match in re.finditer(pattern, text)]
    return found[-1].strip() if found and found[-1] is not None else None


def same_answer(one: str, other: str) -> bool:
    """Whether two answers are the same number, thousands marked or not, or else the same text."""
    numbers = [_number(text) for text in (one, other)]
    if None not in numbers:
        return numbers[0] == numbers[1]
    return one.strip() == other.strip()


def interval(correct: int, problems: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    share, z = correct / problems, CONFIDENCE**2
    middle = (share + z / (2 * problems)) / (1 + z / problems)
    half = CONFIDENCE * math.sqrt(share * (1 - share) / problems + z / (4 * problems**2)) / (1 + z / problems)
    return max(0.0, middle - half), min(1.0, middle + half)


def greedy(sampling: SamplingConfig, tasks: Sequence[TaskConfig]) -> SamplingConfig:
    """How all of the tasks are answered: as the run samples, but greedily and as long as the tasks allow."""
    longest = max(task.max_new_tokens for task in tasks)
    return dataclasses.replace(sampling, temperature=0.0, top_p=1.0, top_k=0, min_new_tokens=0, max_new_tokens=longest)


def chosen(config: EvaluationConfig, names: Sequence[str]) -> list[TaskConfig]:
    """The tasks of these names, or all of them where there are none.

    Raises:
        ValueError: there is no such task, or none at all.
    """
    if not config.tasks:
        raise ValueError("evaluation.tasks: the configuration has no task to evaluate on.")
    known = {task.name: task for task in config.tasks}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--tasks: there is no task '{unknown[0]}'; evaluation.tasks has {', '.join(known)}.")
    return [known[name] for name in names or known]


def _number(text: str) -> float | None:
    try:
        return float(text.strip().strip("$").rstrip(".").replace(",", ""))
    except ValueError:
        return None


class Evaluator(NamedTuple):
    """Tasks, and the sampler that answers them greedily."""

    tasks: list[Task]
    sampler: Sampler
    template: Template
    stop_fn: engine.StopFn | None

    def results(
        self,
        params: PyTree[Array],
        progress: Callable[[int, int], None] = lambda requests, tokens: None,
    ) -> list[Result]:
        """How a policy does on each task; `progress` as in `sampling.generate`."""
        answer = lambda task: evaluate(self.sampler, params, task, self.template, self.stop_fn, progress)
        return [answer(task) for task in self.tasks]


def make_evaluator(config: RunConfig, policy: Policy, tasks: Sequence[TaskConfig]) -> Evaluator:
    """Load the problems of some tasks and build the sampler for them.

    Raises:
        ValueError: a problem cannot be used.
    """
    loaded = [load_task(task, policy.template) for task in tasks]
    return Evaluator(loaded, policy.sampler_with(greedy(config.sampling, tasks)), policy.template, policy.stop_fn)
