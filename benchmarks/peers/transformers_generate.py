"""transformers.generate's side of the sampling comparison. python transformers_generate.py WORKLOAD.json BATCH DTYPE

Run by ../sampling.py in an environment with torch and transformers. Requests come in batches in their order, padded on
the left; a batch ends with its longest response.
"""

import json
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    with open(sys.argv[1]) as file:
        work = json.load(file)
    batch, dtype, m = int(sys.argv[2]), getattr(torch, sys.argv[3]), work["model"]
    config = LlamaConfig(
        vocab_size=m["vocab_size"],
        hidden_size=m["hidden_size"],
        intermediate_size=m["intermediate_size"],
        num_hidden_layers=m["num_layers"],
        num_attention_heads=m["num_heads"],
        num_key_value_heads=m["num_kv_heads"],
        head_dim=m["head_dim"],
        rope_theta=m["rope_theta"],
        rms_norm_eps=m["rms_norm_eps"],
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(dtype).eval()
    prompts, limits = work["prompts"], work["limits"]
    answer(model, prompts[:batch], 4)
    start = time.perf_counter()
    for i in range(0, len(prompts), batch):
        answer(model, prompts[i : i + batch], max(limits[i : i + batch]))
    seconds = time.perf_counter() - start
    useful = sum(limits)
    print(json.dumps({"tokens": useful, "seconds": seconds, "tokens_per_second": useful / seconds}))


def answer(model, prompts: list[list[int]], new_tokens: int) -> None:
    """Sample exactly `new_tokens` tokens for each prompt."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    with torch.inference_mode():
        made = model.generate(
            tokens,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=0,
            eos_token_id=None,
        )
    assert made.shape == (len(prompts), longest + new_tokens)


if __name__ == "__main__":
    main()
