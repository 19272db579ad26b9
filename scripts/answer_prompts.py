"""Answer a run's prompts with vLLM or transformers, for `tpaw play --generations`.

    tpaw export --run runs/mine --out theta                      # the newest policy, round t's
    tpaw prompts --config run.yaml --out prompts.jsonl
    python scripts/answer_prompts.py --model theta --prompts prompts.jsonl --out answers.jsonl --engine vllm
    tpaw play --config run.yaml --generations answers.jsonl      # plays round t with these responses

`--engine transformers` needs torch; `--engine vllm` needs vLLM. The engine's own token ids and log-probs are written,
so nothing is tokenized twice. Before round 0 there is nothing to export: pass the configuration's policy.path as
--model.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

Answer = tuple[list[int], list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a directory that `tpaw export` wrote")
    parser.add_argument("--prompts", required=True, type=Path, help="what `tpaw prompts` wrote")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--engine", choices=ENGINES, default="vllm")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="the run's sampling.max_new_tokens")
    parser.add_argument("--seed", type=int, default=0, help="use another seed for each round")
    options = parser.parse_args()
    prompts = [json.loads(line) for line in options.prompts.read_text().splitlines()]
    tokens = [prompt["prompt_token_ids"] for prompt in prompts]
    answers = ENGINES[options.engine](options.model, tokens, options.max_new_tokens, options.seed)
    with options.out.open("w") as file:
        for prompt, (token_ids, log_probs) in zip(prompts, answers, strict=True):
            file.write(json.dumps(prompt | {"token_ids": token_ids, "log_probs": log_probs}) + "\n")


def with_vllm(model: str, prompts: list[list[int]], max_new_tokens: int, seed: int) -> Iterator[Answer]:
    """Sample with vLLM at temperature 1 without filters, like the default configuration."""
    from vllm import LLM, SamplingParams

    settings = SamplingParams(temperature=1.0, top_p=1.0, top_k=-1, max_tokens=max_new_tokens, logprobs=0)
    requests = LLM(model=model, seed=seed).generate([{"prompt_token_ids": tokens} for tokens in prompts], settings)
    for output in (request.outputs[0] for request in requests):
        ids = list(output.token_ids)
        yield ids, [at[token].logprob for at, token in zip(output.logprobs, ids, strict=True)]


def with_transformers(model: str, prompts: list[list[int]], max_new_tokens: int, seed: int) -> Iterator[Answer]:
    """Sample with transformers, one prompt at a time: slow, but runs on any machine."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    torch.manual_seed(seed)
    policy = AutoModelForCausalLM.from_pretrained(model)
    plain = GenerationConfig(  # without the penalties that the model's own generation config may have
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=policy.generation_config.eos_token_id,
        pad_token_id=policy.generation_config.pad_token_id,
        output_logits=True,
        return_dict_in_generate=True,
    )
    policy.generation_config = plain
    for tokens in prompts:
        output = policy.generate(
            torch.tensor([tokens]),
            attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
            generation_config=plain,
        )
        ids = output.sequences[0, len(tokens) :]
        log_probs = torch.log_softmax(torch.cat(output.logits).float(), dim=-1).gather(1, ids[:, None])[:, 0]
        yield ids.tolist(), log_probs.clamp(max=0).tolist()


ENGINES = {"vllm": with_vllm, "transformers": with_transformers}

if __name__ == "__main__":
    main()
