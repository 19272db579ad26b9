"""How fast are responses sampled? JSON lines: ours, transformers.generate and Tunix's sampler on the same requests.

    make peers                                  # their virtual environments, once
    python benchmarks/sampling.py --model smollm2 --batch 8 32 64 --dtype float32 bfloat16

Requests have prompts and numbers of new tokens of log-normal length, the latter cut at 256; no token stops a response
early. A useful token is one that ends up in a response. Ours keeps `--batch` slots busy and refills them. The others
answer `--batch` requests at a time, each until the longest of them is done. All sample at temperature 1, with random
weights of one architecture, one after the other, alone; compiling is not counted.
"""

import argparse
import dataclasses
import json
import os
import tempfile
from pathlib import Path

import common
import numpy as np

ROOT = Path(__file__).parent.parent
CONTENDERS = {  # name: (virtual environment, script)
    "tpaw_jax": ("", "tpaw_sampling.py"),
    "transformers": (".venv-trl", "transformers_generate.py"),
    "tunix": (".venv-tunix", "tunix_sampler.py"),
}
LONGEST = {"prompt": 128, "response": 256}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=common.MODELS, default="smollm2")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--requests", type=int, help="two batches by default, and at least 48")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--environments", type=Path, default=ROOT, help="where .venv-trl and .venv-tunix are")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    options = parser.parse_args()
    for dtype in options.dtype:
        for batch in options.batch:
            for _ in range(options.repeats):
                seed = int.from_bytes(os.urandom(3))
                with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
                    json.dump(workload(options.model, options.requests or max(48, 2 * batch), seed), file)
                    file.flush()
                    for name in options.only:
                        arguments = [file.name, str(batch), dtype]
                        found = common.run_contender(options.environments, *CONTENDERS[name], arguments)
                        common.emit(benchmark="sampling", contender=name, batch=batch, dtype=dtype, seed=seed, **found)


def workload(name: str, requests: int, seed: int) -> dict:
    """Random prompts of log-normal length, how many tokens each is answered with, and the model."""
    rng, model = np.random.default_rng(seed), common.MODELS[name]
    draw = lambda median, sigma, cap: np.clip(np.round(rng.lognormal(np.log(median), sigma, requests)), 4, cap)
    prompts, responses = draw(40, 0.7, LONGEST["prompt"]), draw(80, 0.7, LONGEST["response"])
    tokens = [rng.integers(10, model.vocab_size, int(n)).tolist() for n in prompts]
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    fields = {k: v for k, v in dataclasses.asdict(model).items() if k in (*kept, "rope_theta", "rms_norm_eps")}
    return {
        "name": name,
        "model": fields,
        "longest": LONGEST,
        "prompts": tokens,
        "limits": responses.astype(int).tolist(),
    }


if __name__ == "__main__":
    main()
