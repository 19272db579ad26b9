"""Tunix's sampler's side of the sampling comparison. python tunix_sampler.py WORKLOAD.json BATCH DTYPE

Run by ../sampling.py in an environment with google-tunix. Requests come in batches in their order, one shape for all,
so that nothing compiles while the clock runs; a batch ends with its longest response.
"""

import json
import os
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import jax
import jax.numpy as jnp
import tunix_model
from flax import nnx
from tunix.generate import sampler as tunix_sampler


class Ids:
    """A tokenizer whose text is the ids themselves."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return 0

    def eos_id(self) -> int:
        return -1

    def pad_id(self) -> int:
        return 0


def main() -> None:
    with open(sys.argv[1]) as file:
        work = json.load(file)
    batch, dtype, m = int(sys.argv[2]), jnp.dtype(sys.argv[3]), work["model"]
    prompts, limits, longest = work["prompts"], work["limits"], work["longest"]
    with jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2):
        cache = tunix_sampler.CacheConfig(sum(longest.values()), m["num_layers"], m["num_kv_heads"], m["head_dim"])
        model = tunix_model.build(work["model"])
        nnx.update(model, jax.tree.map(lambda x: x.astype(dtype), nnx.state(model)))
        sampler = tunix_sampler.Sampler(model, Ids(), cache)

        def answer(i: int, new_tokens: int) -> None:
            texts = [" ".join(map(str, p)) for p in prompts[i : i + batch]]
            made = sampler(texts, new_tokens, longest["prompt"], temperature=1.0, top_p=1.0, seed=i, eos_tokens=[-1])
            assert all(len(tokens) == new_tokens for tokens in made.tokens)

        answer(0, 4)
        start = time.perf_counter()
        for i in range(0, len(prompts), batch):
            answer(i, max(limits[i : i + batch]))
        seconds = time.perf_counter() - start
    useful = sum(limits)
    print(json.dumps({"tokens": useful, "seconds": seconds, "tokens_per_second": useful / seconds}))


if __name__ == "__main__":
    main()
