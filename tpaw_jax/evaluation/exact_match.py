"""Tasks with exact answers: sample greedily, extract the answers, and report accuracy with a 95 % interval.

A task's problems are records in any format that training reads; the right answer is extracted from the target text.
"""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, PyTree

from tpaw_jax.config import EvaluationConfig, RunConfig, SamplingConfig, SourceConfig, TaskConfig
from tpaw_jax.data.records import parse_record
from tpaw_jax.data.sources import read_source
from tpaw_jax.data.templates import Template
from tpaw_jax.generation import engine, generation_file
from tpaw_jax.generation.policy import Policy
from tpaw_jax.generation.slots import Sampler
from tpaw_jax.types import Prompts, Ragged

Z = 1.959963984540054
"""95 % of a normal distribution lies within this many standard deviations of its mean."""


class Task(NamedTuple):
    """A task's prompts, and the right answer to each."""

    config: TaskConfig
    prompts: Prompts
    answers: tuple[str, ...]


class Result(NamedTuple):
    """A policy's result on a task."""

    name: str
    correct: int
    problems: int
    low: float  # lower end of the accuracy's 95 % interval
    high: float
    tokens: int  # of all responses
    seconds: float
    records: list[dict[str, Any]]  # one per problem: prompt, answer, response, extracted, correct, token_ids

    @property
    def accuracy(self) -> float:
        """Share of the problems that are answered correctly."""
        return self.correct / self.problems

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.accuracy:.1%} ({self.correct} of {self.problems}; 95 % interval {self.low:.1%} to "
            f"{self.high:.1%}), {self.tokens / self.seconds:.0f} tokens/s"
        )


def load_task(config: TaskConfig, template: Template) -> Task:
    """Read and tokenize the problems of a task, in file order.

    Raises:
        ValueError: a record is malformed, its target contains no answer (names file and line), or there are none.
    """
    source = SourceConfig(config.path, config.split, subset=config.subset)
    prompts, targets = [], []
    answers: list[str] = []
    for where, raw in read_source(source):
        if config.limit and len(answers) == config.limit:
            break
        if isinstance(raw, ValueError):
            raise raw
        record = parse_record(raw, where)
        answer = extract(config.answer, record.target)
        if answer is None:
            raise ValueError(
                f"{where}: the target contains no answer; task '{config.name}' extracts it with {config.answer!r}."
            )
        try:
            encoded = template.encode(record)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        prompts.append(np.asarray(encoded.prompt, np.int32))
        targets.append(np.asarray(encoded.target, np.int32))
        answers.append(answer)
    if not answers:
        raise ValueError(f"evaluation.tasks, '{config.name}': {config.path} contains no problems.")
    ids = np.arange(len(prompts), dtype=np.int32)
    return Task(config, Prompts(ids, Ragged.of(prompts), Ragged.of(targets)), tuple(answers))


def evaluate(
    sampler: Sampler,
    params: PyTree[Array],
    task: Task,
    template: Template,
    stop_fn: engine.StopFn | None = None,
    progress: Callable[[int, int], None] = lambda requests, tokens: None,
) -> Result:
    """Answer a task's problems and count the correct answers.

    All processes must call this together; each answers its share of the problems. `sampler` must be greedy and allow
    at least the task's `max_new_tokens`.
    """
    prompts, start = task.prompts, time.perf_counter()
    indices, together = engine.local_share(sampler, len(prompts))
    generations = engine.generate(
        sampler,
        params,
        prompts.take(indices),
        seed=0,
        round_number=0,
        limits=[task.config.max_new_tokens] * len(indices),
        stop_fn=stop_fn,
        progress=progress,
    )
    if not together:
        generations = generation_file.gather_from_processes(generations, indices, 0)
    tokens = generations.tokens
    seconds = time.perf_counter() - start
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
    """The last match of `pattern` in `text` (its first group, if it has one); None if nothing matches.

    An empty pattern gives the whole text, stripped.
    """
    if not pattern:
        return text.strip()
    matches = [match.group(1) if match.re.groups else match.group() for match in re.finditer(pattern, text)]
    return matches[-1].strip() if matches and matches[-1] is not None else None


def same_answer(one: str, other: str) -> bool:
    """Whether two answers are the same number, with or without thousands separators, or else the same text."""
    numbers = [_number(text) for text in (one, other)]
    if None not in numbers:
        return numbers[0] == numbers[1]
    return one.strip() == other.strip()


def interval(correct: int, problems: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of the accuracy."""
    share, squared = correct / problems, Z**2
    middle = (share + squared / (2 * problems)) / (1 + squared / problems)
    root = math.sqrt(share * (1 - share) / problems + squared / (4 * problems**2))
    half = Z * root / (1 + squared / problems)
    return max(0.0, middle - half), min(1.0, middle + half)


def greedy_sampling_config(sampling: SamplingConfig, tasks: Sequence[TaskConfig]) -> SamplingConfig:
    """The run's sampling settings, but greedy, and with the largest `max_new_tokens` of the tasks."""
    longest = max(task.max_new_tokens for task in tasks)
    return dataclasses.replace(sampling, temperature=0.0, top_p=1.0, top_k=0, min_new_tokens=0, max_new_tokens=longest)


def select_tasks(config: EvaluationConfig, names: Sequence[str]) -> list[TaskConfig]:
    """The configured tasks with these names, or all of them if `names` is empty.

    Raises:
        ValueError: no task is configured, or a name is not among them.
    """
    if not config.tasks:
        raise ValueError("evaluation.tasks is empty; the configuration has no task to evaluate on.")
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
    """Loaded tasks and a greedy sampler."""

    tasks: list[Task]
    sampler: Sampler
    template: Template
    stop_fn: engine.StopFn | None

    def results(
        self,
        params: PyTree[Array],
        progress: Callable[[int, int], None] = lambda requests, tokens: None,
    ) -> list[Result]:
        """A policy's result on each task; `progress` is called as in `engine.generate`."""
        return [evaluate(self.sampler, params, task, self.template, self.stop_fn, progress) for task in self.tasks]


def make_evaluator(config: RunConfig, policy: Policy, tasks: Sequence[TaskConfig]) -> Evaluator:
    """Load the problems of `tasks` and build a greedy sampler for them.

    Raises:
        ValueError: a problem is malformed or has no answer, or is longer than the rope of the model is set for.
    """
    loaded = [load_task(task, policy.template) for task in tasks]
    model = policy.model.config
    for task in loaded:
        longest = int(task.prompts.prompt_tokens.lengths.max()) + task.config.max_new_tokens
        if model.rope_length and longest > model.positions:
            raise ValueError(
                f"evaluation.tasks, '{task.config.name}': a prompt and its response may have {longest} tokens, but the "
                f"model's rope is set for {model.positions}, the longest sequence of the run; raise data.max_length."
            )
    return Evaluator(
        loaded, policy.sampler_with(greedy_sampling_config(config.sampling, tasks)), policy.template, policy.stop_fn
    )
