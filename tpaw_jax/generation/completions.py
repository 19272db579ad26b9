"""A model answers prompts outside of a run (`tpaw generate`), and goes on where it was stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tpaw_jax.config import RunConfig, config_file
from tpaw_jax.data import dataset
from tpaw_jax.data.dataset import Template
from tpaw_jax.generation import engine, generation_file
from tpaw_jax.generation.policy import SPEED_ONLY_KEYS, Policy, open_policy, stop_tokens
from tpaw_jax.models import hub
from tpaw_jax.observe import monitoring
from tpaw_jax.storage import files, ring
from tpaw_jax.types import Generations, Prompts


def answer(
    config: RunConfig,
    mesh: Mesh,
    out: Path,
    given: Path | None = None,
    round_number: int = 0,
    num_generations: int = 1,
    say: Callable[[str], None] = print,
) -> None:
    """Write `num_generations` responses to each prompt to `out`, a JSON line a response.

    The prompts are those that a run of the configuration plays on, or those of the file `given` (see `read_prompts`).
    Responses are kept as they finish in a file beside `out`, whose name tells what they are of: the same call goes on.

    Raises:
        FileNotFoundError: there is no file `given`, or no model.
        ValueError: there is less than one response to a prompt, or a prompt cannot be used.
    """
    if num_generations < 1:
        raise ValueError(f"--num-generations is {num_generations}; a prompt has one response at least.")
    out.absolute().parent.mkdir(parents=True, exist_ok=True)  # found out before the work, not after
    if given is not None and not given.is_file():
        raise FileNotFoundError(f"{given}: there is no such file of prompts.")
    player = open_policy(config, mesh)
    template, skipped = player.template, ""
    if given is None:
        prompts, _, report = dataset.load(config.data, template, config.seed)
        skipped = f"; {len(report.skipped)} malformed records were skipped"
    else:
        prompts = read_prompts(given, template, player.model.config.vocab_size, config.data.max_prompt_length)
    identity = _identity(config, player, prompts, round_number, num_generations)
    unfinished = out.with_name(f"{out.name}.{identity}.part")
    finished = generation_file.resume(unfinished, prompts, say, num_generations)
    if finished:
        say(f"{len(finished)} of {len(prompts) * num_generations} responses are there; the others follow.")
    with (
        monitoring.progress("generating", len(prompts) * num_generations, "response") as bar,
        generation_file.appending(unfinished, prompts, num_generations=num_generations) as keep,
    ):
        bar.update(len(finished))
        made = engine.generate(
            player.sampler,
            player.params,
            prompts,
            seed=config.seed,
            round_number=round_number,
            num_generations=num_generations,
            stop_fn=player.stop_fn,
            finished=finished,
            on_finished=keep,
            progress=lambda requests, tokens: bar.update(requests),
        )
    files.write_json_lines(out, _records(made, prompts, num_generations, template))
    unfinished.unlink(missing_ok=True)
    say(f"{len(made.tokens)} responses are in {out}{skipped}.")


def read_prompts(path: Path, template: Template, vocabulary: int, longest: int) -> Prompts:
    """The prompts of a JSONL file: of each line `prompt_token_ids`, as `tpaw prompts` writes them, taken as they are.

    Where there are none, `messages`, a conversation up to where the assistant speaks, or `prompt`, the same or a text
    that the user says, is put into the template. `prompt_id` names a prompt's random stream; it is the number of the
    line, from 0, where it is missing. Without targets.

    Raises:
        ValueError: a line cannot be used; names it and the field.
    """
    lines: dict[int, int] = {}
    tokens: list[np.ndarray] = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        record = files.parse_json(line, where)
        if not isinstance(record, dict):
            raise ValueError(f"{where}: an object with prompt or prompt_token_ids was expected.")
        prompt_id = record.get("prompt_id", number - 1)
        if type(prompt_id) is not int or not 0 <= prompt_id < 1 << 31:
            raise ValueError(f"{where}: prompt_id is {prompt_id!r}; it must be a whole number from 0 to 2^31 - 1.")
        if prompt_id in lines:
            own = "" if "prompt_id" in record else ", the number of this line,"
            raise ValueError(f"{where}: prompt_id {prompt_id}{own} is that of line {lines[prompt_id]} already.")
        ids = _prompt_tokens(record, template, vocabulary, where)
        if len(ids) > longest:
            raise ValueError(f"{where}: the prompt has {len(ids)} tokens; data.max_prompt_length is {longest}.")
        lines[prompt_id] = number
        tokens.append(np.array(ids, np.int32))
    if not tokens:
        raise ValueError(f"{path}: there are no prompts in it.")
    return Prompts(np.array(list(lines), np.int32), tuple(tokens), (np.zeros(0, np.int32),) * len(tokens))


def _prompt_tokens(record: dict[str, Any], template: Template, vocabulary: int, where: str) -> list[int]:
    ids = record.get("prompt_token_ids")
    if ids is None:
        turns = record.get("messages", record.get("prompt"))
        if turns is None:
            raise ValueError(f"{where}: there is neither prompt_token_ids nor messages nor prompt.")
        turns = [{"role": "user", "content": turns}] if isinstance(turns, str) else turns
        messages = dataset.messages_of(turns, where)
        if not messages or messages[-1]["role"] == "assistant":
            raise ValueError(f"{where}: the conversation must end with a turn that the assistant answers.")
        try:
            return template.prompt_tokens(messages)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if not isinstance(ids, list) or not ids or not all(type(t) is int and 0 <= t < vocabulary for t in ids):
        raise ValueError(f"{where}: prompt_token_ids must be a list of at least one id from 0 to {vocabulary - 1}.")
    return ids


def _records(made: Generations, prompts: Prompts, num_generations: int, template: Template) -> Iterator[dict[str, Any]]:
    decode = lambda tokens: template.tokenizer.decode(tokens, skip_special_tokens=True)
    for n, (tokens, log_probs) in enumerate(zip(made.tokens, made.log_probs, strict=True)):
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


def _identity(config: RunConfig, player: Policy, prompts: Prompts, *others: int) -> str:
    """A name for all that decides the responses: the weights, prompts, random stream, settings and where texts end."""
    plain = config_file.flat(config_file.to_dict(config))
    settings = {k: v for k, v in plain.items() if k.startswith(("policy.compute", "policy.tokenizer", "sampling."))}
    for name in SPEED_ONLY_KEYS:
        settings.pop(name)
    stops = stop_tokens(player.template, hub.load_generation_config(config.policy.path))
    weights = [int(number) for number in jax.device_get(jax.tree.leaves(ring.digests_of(player.params)))]
    said = [settings, stops, jax.default_backend(), weights, config.seed, *others, prompts.ids.tolist()]
    digest = hashlib.sha256(json.dumps(said).encode())
    for tokens in prompts.prompt_tokens:
        digest.update(len(tokens).to_bytes(4, "little") + tokens.tobytes())
    return digest.hexdigest()[:12]
