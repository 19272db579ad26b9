"""A model answers prompts outside of a run (`tpaw generate`), and goes on where it was stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from tpaw_jax import config_file, dataset, durable, generation_file, monitoring, sampling, session
from tpaw_jax.config import RunConfig
from tpaw_jax.dataset import Template
from tpaw_jax.types import Generations, Prompts

NO_TEXT_DEPENDS_ON = ("slots", "prefill_tokens", "tensor")
"""Fields of `sampling` that change how fast a response comes and nothing else."""


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
        ValueError: there is less than one response to a prompt, or a prompt cannot be used.
    """
    if num_generations < 1:
        raise ValueError(f"--num-generations is {num_generations}; a prompt has one response at least.")
    out.absolute().parent.mkdir(parents=True, exist_ok=True)  # found out before the work, not after
    player = session.open_player(config, mesh)
    template, skipped = player.template, 0
    if given is None:
        prompts, _, report = dataset.load(config.data, template, config.seed)
        skipped = len(report.skipped)
    else:
        prompts = read_prompts(given, template, player.model.config.vocab_size, config.data.max_prompt_length)
    unfinished = out.with_name(f"{out.name}.{_identity(config, prompts, round_number, num_generations)}.part")
    finished = generation_file.resume(unfinished, prompts, say, num_generations)
    if finished:
        say(f"{len(finished)} of {len(prompts) * num_generations} responses are there; the others follow.")
    with (
        monitoring.progress("generating", len(prompts) * num_generations, "response") as bar,
        generation_file.appending(unfinished, prompts, num_generations=num_generations) as keep,
    ):
        bar.update(len(finished))
        made = sampling.generate(
            player.sampler,
            player.params,
            prompts,
            seed=config.seed,
            round_number=round_number,
            num_generations=num_generations,
            ends=player.ends,
            finished=finished,
            keep=keep,
            progress=lambda requests, tokens: bar.update(requests),
        )
    durable.write_json_lines(out, _records(made, prompts, num_generations, template))
    unfinished.unlink(missing_ok=True)
    say(f"{len(made.tokens)} responses are in {out}; {skipped} malformed records were skipped.")


def read_prompts(path: Path, template: Template, vocabulary: int, longest: int) -> Prompts:
    """The prompts of a JSONL file: of each line `prompt_token_ids`, as `tpaw prompts` writes them, taken as they are.

    Where there are none, `prompt`, what the user says, or `messages`, a conversation up to where the assistant speaks,
    is put into the template. `prompt_id` names a prompt's random stream; it is the number of the line, from 0, where it
    is missing. Without targets.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line cannot be used; names it and the field.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file of prompts.")
    lines: dict[int, int] = {}
    tokens: list[np.ndarray] = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        record = durable.parse_json(line, where)
        if not isinstance(record, dict):
            raise ValueError(f"{where}: an object with prompt or prompt_token_ids was expected.")
        prompt_id = record.get("prompt_id", number - 1)
        if type(prompt_id) is not int or not 0 <= prompt_id < 1 << 31:
            raise ValueError(f"{where}: prompt_id is {prompt_id!r}; it must be a whole number from 0 to 2^31 - 1.")
        if prompt_id in lines:
            raise ValueError(f"{where}: prompt_id {prompt_id} stands in line {lines[prompt_id]} already.")
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
        turns = record.get("messages", [{"role": "user", "content": record.get("prompt")}])
        messages = dataset.messages_of(turns, where)
        if not messages or messages[-1]["role"] == "assistant":
            raise ValueError(f"{where}: messages must end with a turn that the assistant answers.")
        return template.prompt_tokens(messages)
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


def _identity(config: RunConfig, prompts: Prompts, round_number: int, num_generations: int) -> str:
    """A name for all that decides the responses: the model's files, prompts, random stream and settings."""
    plain = config_file.to_dict(config)
    settings = {name: value for name, value in plain["sampling"].items() if name not in NO_TEXT_DEPENDS_ON}
    path = Path(config.policy.path)
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    of_files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    said = [plain["policy"], settings, of_files, config.seed, round_number, num_generations, prompts.ids.tolist()]
    digest = hashlib.sha256(json.dumps(said).encode())
    for tokens in prompts.prompt_tokens:
        digest.update(len(tokens).to_bytes(4, "little") + tokens.tobytes())
    return digest.hexdigest()[:12]
