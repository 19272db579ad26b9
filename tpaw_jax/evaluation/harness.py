"""lm-eval's model interface for a policy: log-likelihoods in packed trees, generation with the sampler.

Continuations of one context are packed as responses of one prompt, so the context of a multiple-choice question is
computed once. Tokenization, truncation and stop strings follow lm-eval's own `hf` model.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import lm_eval
import numpy as np
from jaxtyping import Array, PyTree
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from tpaw_jax.config import RunConfig
from tpaw_jax.data import packing, prefix_trees
from tpaw_jax.data.packing import Rows
from tpaw_jax.generation import engine
from tpaw_jax.generation.policy import Policy
from tpaw_jax.runtime import sharding, tpu
from tpaw_jax.training import batch_shapes, logprobs, scoring
from tpaw_jax.types import Prompts, Ragged

DEFAULT_NEW_TOKENS = 256
"""The limit for tasks that state none, as in lm-eval's `hf` model."""


class PolicyLM(TemplateLM):
    """A policy as an lm-eval model.

    A context and its continuation together are truncated to `packing.row_length` and to the model's positions.
    """

    def __init__(self, policy: Policy, params: PyTree[Array], config: RunConfig, mesh: jax.sharding.Mesh) -> None:
        super().__init__()
        self.policy, self.params, self.config = policy, params, config
        self.tokenizer = policy.template.tokenizer
        self.packing = batch_shapes.resolve_packing(config, mesh)
        self.positions = policy.model.config.positions
        self.max_length = min(self.positions, self.packing.row_length)
        greedy_fn = logprobs.make_greedy_fn(policy.model, config.policy.head_chunk)
        options, context = tpu.options_of(mesh, config.mesh.compiler_options), config.mesh.context
        self._program = scoring.score_program(greedy_fn, mesh, options, context)
        self._rows = scoring.batch_sharding(mesh, context)
        self._samplers: dict[tuple[int, float, float, int], Any] = {}

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context: BOS, or EOS if there is no BOS."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for lm-eval's caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a text, with the special tokens that the tokenizer adds but without a second BOS."""
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            options = {"add_special_tokens": False}
        return self.tokenizer.encode(string, **options)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, with the chat template that the policy was trained with.

        Raises:
            ValueError: the policy was trained without a chat template.
        """
        template = self.policy.template
        if template.chat is None:
            raise ValueError(
                "--chat-template: data.chat_template is 'none', so the policy was trained without a chat template; "
                "omit the option."
            )
        return template.render(chat_history, add_generation_prompt=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The chat template, for lm-eval's records."""
        return self.policy.template.chat if chat_template else None

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-prob of each text in nats, computed in windows of `max_length` tokens that do not overlap."""
        scored, owners = [], []
        for number, (text,) in enumerate(request.args for request in requests):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in map(utils.make_disjoint_window, windows):
                scored.append((("", ""), *window))
                owners.append(number)
        totals = np.zeros(len(requests))
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(scored, disable_tqdm), strict=True):
            totals[owner] += value
        return totals.tolist()

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-prob of each continuation given its context, in nats, and whether greedy decoding would give it."""
        if not requests:
            return []
        by_context: dict[tuple[int, ...], dict[int, np.ndarray]] = {}
        for number, ((_, text), context, continuation) in enumerate(requests):
            if not continuation:
                raise ValueError(f"lm-eval's request {number} has no token to score after its context: {text!r}.")
            tokens = [*context, *continuation][-(self.max_length + 1) :]
            cut = max(1, len(tokens) - len(continuation))
            by_context.setdefault(tuple(tokens[:cut]), {})[number] = np.asarray(tokens[cut:], np.int32)
        rows, numbers = self._pack(by_context)
        results = {}
        size = self.packing.rows_per_batch
        for first in tqdm(range(0, len(rows), size), desc="scoring", disable=disable_tqdm):
            batch = packing.take(rows, np.arange(first, min(first + size, len(rows))), size)
            values = np.asarray(self._program(self.params, sharding.place(batch.batch, self._rows)))
            for row, response in np.argwhere(batch.prompt_index >= 0):
                number = numbers[batch.prompt_index[row, response]][batch.source[row, response]]
                results[number] = values[row, response]
        return [(float(results[n][0]), bool(results[n][1])) for n in range(len(requests))]

    def _pack(self, by_context: Mapping[tuple[int, ...], Mapping[int, np.ndarray]]) -> tuple[Rows, list[list[int]]]:
        """Rows of the continuations of each context, and their requests by prompt and source of the rows.

        A context with more continuations than a row may have is several prompts.
        """
        contexts, numbers, texts = [], [], []
        for context, continuations in by_context.items():
            requests = list(continuations)
            for first in range(0, len(requests), self.packing.max_responses_per_row):
                numbers.append(requests[first : first + self.packing.max_responses_per_row])
                contexts.append(np.array(context, np.int32))
                texts.append([continuations[number] for number in numbers[-1]])
        by_source = itertools.zip_longest(*texts, fillvalue=np.zeros(0, np.int32))
        ids = np.arange(len(contexts), dtype=np.int32)
        prompts = Prompts(ids, Ragged.of(contexts), Ragged.zeros(np.zeros(len(ids))))
        trees = prefix_trees.trees_of_responses(prompts, {k: Ragged.of(some) for k, some in enumerate(by_source)})
        return packing.pack(trees, self.packing), numbers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """A response to each context, truncated at the first of its stop strings."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        texts: dict[int, str] = {}
        for numbers in groups.values():
            contexts = [requests[n].args[0] for n in numbers]
            texts |= dict(zip(numbers, self._generate(contexts, requests[numbers[0]].args[1]), strict=True))
        return [texts[n] for n in range(len(requests))]

    def _generate(self, contexts: Sequence[str], stated: Mapping[str, Any]) -> list[str]:
        settings = normalize_gen_kwargs(dict(stated), DEFAULT_NEW_TOKENS)
        longest = settings["max_gen_toks"]
        if longest >= self.positions:
            raise ValueError(
                f"--harness: a task asks for {longest} new tokens, but the model has {self.positions} positions for "
                "context and response together; choose a model with more positions or a task with shorter responses."
            )
        decode = lambda tokens: self.tokenizer.decode(tokens, skip_special_tokens=True)
        eos = self.tokenizer.decode(self.eot_token_id)
        until = [text for text in handle_stop_sequences(settings.get("until"), eos=eos) if text and text != eos]
        tokens = Ragged.of(np.array(self.tok_encode(c)[-(self.positions - longest) :], np.int32) for c in contexts)
        prompts = Prompts(np.arange(len(tokens), dtype=np.int32), tokens, Ragged.zeros(np.ones(len(tokens))))
        temperature = float(settings.get("temperature") or 0.0)
        sampler = self._sampler(longest, temperature, float(settings.get("top_p", 1.0)), int(settings.get("top_k", 0)))
        stop_fn = engine.stop_at(decode, until) if until else None
        generations = engine.generate(
            sampler, self.params, prompts, seed=self.config.seed, round_number=0, stop_fn=stop_fn
        )
        texts = [decode(response) for response in generations.tokens]
        for stop in until:
            texts = [text.split(stop)[0] for text in texts]
        return texts

    def _sampler(self, longest: int, temperature: float, top_p: float, top_k: int) -> Any:
        key = (longest, temperature, top_p, top_k) if temperature else (longest, 0.0, 1.0, 0)
        if key not in self._samplers:
            longest, temperature, top_p, top_k = key
            settings = dataclasses.replace(
                self.config.sampling,
                min_new_tokens=0,
                max_new_tokens=longest,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
            )
            self._samplers[key] = self.policy.sampler_with(settings)
        return self._samplers[key]


def run(
    policy: PolicyLM,
    tasks: Sequence[str],
    directory: str | None = None,
    chat_template: bool = False,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Run lm-eval on `tasks` and return its results; with `directory`, only the YAML files there define tasks.

    Raises:
        ValueError: a task is unknown, or there are several processes.
    """
    if jax.process_count() > 1:
        raise ValueError("--harness runs in one process only; export the policy and evaluate it on one host.")
    manager = TaskManager(include_path=directory, include_defaults=directory is None)
    if unknown := [name for name in tasks if not manager.match_tasks([name])]:
        raise ValueError(f"--harness: lm-eval has no task '{unknown[0]}'{f' in {directory}' if directory else ''}.")
    results = lm_eval.simple_evaluate(
        model=policy,
        tasks=list(tasks),
        task_manager=manager,
        apply_chat_template=chat_template,
        fewshot_as_multiturn=chat_template,
        num_fewshot=num_fewshot,
        limit=limit,
        log_samples=True,
    )
    assert results is not None  # it is None only on ranks above 0
    return results
