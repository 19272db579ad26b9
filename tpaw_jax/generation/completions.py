"""`tpaw generate`: sample responses to prompts outside of a run, and resume where a stopped call left off."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tpaw_jax.config import RunConfig, config_file
from tpaw_jax.data import conversations, dataset
from tpaw_jax.data.templates import Template
from tpaw_jax.generation import engine, generation_file, token_sampling
from tpaw_jax.generation.policy import SPEED_ONLY_KEYS, Policy, open_policy, stop_tokens
from tpaw_jax.models import hub
from tpaw_jax.observe import tables
from tpaw_jax.storage import files, ring
from tpaw_jax.types import Generations, Prompts, Ragged


def answer(
    config: RunConfig,
    mesh: Mesh,
    out: Path,
    given: Path | None = None,
    round_number: int = 0,
    num_generations: int = 1,
    *,
    say: Callable[[str], None] = print,
) -> None:
    """Write `num_generations` responses to each prompt to `out`, one JSON line per response.

    The prompts are those of the configuration's data, or of the file `given` (see `read_prompts`). Finished responses
    are kept in a `.sampled` file beside `out`, named by a digest of all they depend on; the same call resumes from it.

    Raises:
        FileNotFoundError: the file `given` or the model does not exist.
        ValueError: `num_generations` is not from 1 to 4096, or a prompt cannot be used.
    """
    if not 1 <= num_generations <= token_sampling.MAX_SAMPLES:
        raise ValueError(f"--num-generations is {num_generations}; it must be from 1 to {token_sampling.MAX_SAMPLES}.")
    out.absolute().parent.mkdir(parents=True, exist_ok=True)  # fail before the work, not after it
    if given is not None and not given.is_file():
        raise FileNotFoundError(f"{given}: there is no such file of prompts.")
    policy = open_policy(config, mesh)
    prompts, skipped = _load_prompts(config, policy, given)
    digest, total = _digest(config, policy, prompts, round_number, num_generations), len(prompts) * num_generations
    unfinished = out.with_name(f"{out.name}.{digest}.sampled")
    generation_file.repair(unfinished, say)
    finished = generation_file.read_partial([unfinished], prompts, num_generations=num_generations)
    if finished:
        say(f"Resuming: {len(finished)} of {total} responses are already sampled.")
    keeping = generation_file.appender(unfinished, prompts, num_generations=num_generations)
    with tables.progress("generating", total, "response") as bar, keeping as keep:
        bar.update(len(finished))
        generations = engine.generate(
            policy.sampler,
            policy.params,
            prompts,
            seed=config.seed,
            round_number=round_number,
            num_generations=num_generations,
            stop_fn=policy.stop_fn,
            finished=finished,
            on_finished=keep,
            progress=lambda requests, tokens: bar.update(requests),
        )
    files.write_json_lines(out, _records(generations, prompts, num_generations, policy.template))
    unfinished.unlink(missing_ok=True)
    say(f"{total} responses are in {out}{skipped}.")


def _load_prompts(config: RunConfig, policy: Policy, given: Path | None) -> tuple[Prompts, str]:
    """The prompts to answer, and a note on skipped records."""
    if given is not None:
        vocabulary = policy.model.config.vocab_size
        return read_prompts(given, policy.template, vocabulary, config.data.max_prompt_length), ""
    prompts, _, report = dataset.load(config.data, policy.template, config.seed)
    return prompts, f"; {len(report.skipped)} malformed records were skipped"


def read_prompts(path: Path, template: Template, vocabulary: int, longest: int) -> Prompts:
    """The prompts of a JSONL file, with empty targets.

    If a line has `prompt_token_ids`, as `tpaw prompts` writes them, these are used unchanged. Otherwise the template is
    applied to `messages`, a conversation that ends before the assistant's turn, or to `prompt`, such a conversation or
    the text of one user turn. `prompt_id` selects a prompt's random stream; by default it is the line number, from 0.

    Raises:
        ValueError: a line cannot be used; the message names the line and the field.
    """
    lines: dict[int, int] = {}
    tokens: list[np.ndarray] = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        record = files.parse_json(line, where)
        if not isinstance(record, dict):
            raise ValueError(
                f"{where}: expected an object with prompt or prompt_token_ids, got {type(record).__name__}."
            )
        prompt_id = record.get("prompt_id", number - 1)
        if type(prompt_id) is not int or not 0 <= prompt_id < 1 << 31:
            raise ValueError(f"{where}: prompt_id is {prompt_id!r}; it must be an integer from 0 to 2^31 - 1.")
        if prompt_id in lines:
            default = "" if "prompt_id" in record else ", the default for this line,"
            raise ValueError(f"{where}: prompt_id {prompt_id}{default} is already used in line {lines[prompt_id]}.")
        ids = _prompt_tokens(record, template, vocabulary, where)
        if len(ids) > longest:
            raise ValueError(f"{where}: the prompt has {len(ids)} tokens; data.max_prompt_length is {longest}.")
        lines[prompt_id] = number
        tokens.append(np.array(ids, np.int32))
    if not tokens:
        raise ValueError(f"{path}: the file has no prompts.")
    return Prompts(np.array(list(lines), np.int32), Ragged.of(tokens), Ragged.zeros(np.zeros(len(tokens))))


def _prompt_tokens(record: dict[str, Any], template: Template, vocabulary: int, where: str) -> list[int]:
    ids = record.get("prompt_token_ids")
    if ids is None:
        turns = record.get("messages", record.get("prompt"))
        if turns is None:
            raise ValueError(f"{where}: one of the fields prompt_token_ids, messages or prompt is required.")
        turns = [{"role": "user", "content": turns}] if isinstance(turns, str) else turns
        messages = conversations.messages_of(turns, where)
        if not messages or messages[-1]["role"] == "assistant":
            raise ValueError(f"{where}: the conversation must end with a turn that is not the assistant's.")
        try:
            return template.prompt_tokens(messages, conversations.tools_of(record.get("tools"), where))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if not isinstance(ids, list) or not ids or not all(type(t) is int and 0 <= t < vocabulary for t in ids):
        raise ValueError(f"{where}: prompt_token_ids must be a non-empty list of ids from 0 to {vocabulary - 1}.")
    return ids


def _records(
    generations: Generations, prompts: Prompts, num_generations: int, template: Template
) -> Iterator[dict[str, Any]]:
    decode = lambda tokens: template.tokenizer.decode(tokens, skip_special_tokens=True)
    for n, (tokens, log_probs) in enumerate(zip(generations.tokens, generations.log_probs, strict=True)):
        i, sample = divmod(n, num_generations)
        record = {
            "prompt_id": int(prompts.ids[i]),
            "prompt": decode(prompts.prompt_tokens[i]),
            "prompt_token_ids": prompts.prompt_tokens[i].tolist(),
            "response": decode(tokens),
            "token_ids": tokens.tolist(),
            "log_probs": log_probs.tolist(),
        }
        yield record | ({"sample": sample} if num_generations > 1 else {})


def _digest(config: RunConfig, policy: Policy, prompts: Prompts, *numbers: int) -> str:
    """A digest of all that the responses depend on: weights, prompts, random stream, settings and stop tokens."""
    fields = config_file.flat(config_file.to_dict(config))
    settings = {k: v for k, v in fields.items() if k.startswith(("policy.compute", "policy.tokenizer", "sampling."))}
    for name in SPEED_ONLY_KEYS:
        settings.pop(name)
    stops = stop_tokens(policy.template, hub.load_generation_config(config.policy.path))
    weights = [int(number) for number in jax.device_get(jax.tree.leaves(ring.digests_of(policy.params)))]
    rope = [length] if (length := policy.model.config.rope_length) else []
    identity = [settings, stops, jax.default_backend(), weights, config.seed, *numbers, prompts.ids.tolist(), *rope]
    identity += [repr(policy.model.lora)] if policy.model.lora else []
    digest = hashlib.sha256(json.dumps(identity).encode())
    for tokens in prompts.prompt_tokens:
        digest.update(len(tokens).to_bytes(4, "little") + tokens.tobytes())
    return digest.hexdigest()[:12]
