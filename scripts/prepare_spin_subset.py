"""The 50,000 prompts and answers that SPIN and TPAW play on: the first exchange of UltraChat-200k conversations.

    python scripts/prepare_spin_subset.py --out ultrachat_50k.jsonl
    python scripts/prepare_spin_subset.py --source my_conversations.jsonl --count 1000 --out subset.jsonl

As SPIN's spin/reformat.py, of every conversation the first user turn is the prompt and the answer to it the target.
`count` of them are chosen by the seed, in an order that does not depend on `count`.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from tpaw_jax.config import SourceConfig
from tpaw_jax.data import dataset
from tpaw_jax.storage import files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="HuggingFaceH4/ultrachat_200k", help="as in data.sources")
    parser.add_argument("--split", default="train_sft")
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    chosen, conversations = subset(SourceConfig(options.source, split=options.split), options.count, options.seed)
    files.replace(options.out, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in chosen).encode())
    print(f"{len(chosen)} of {conversations} conversations are in {options.out}.")


def subset(source: SourceConfig, count: int, seed: int) -> tuple[list[dict[str, str]], int]:
    """First exchanges as prompt and completion, and how many conversations there are.

    Raises:
        ValueError: a record has no turns, or its first two are not a user's and an assistant's; names the place.
    """
    exchanges = []
    for where, raw in dataset.read_source(source):
        if isinstance(raw, ValueError):
            raise raw
        turns = raw.get("messages") if isinstance(raw, dict) else None
        if not isinstance(turns, list) or [t.get("role") for t in turns[:2]] != ["user", "assistant"]:
            raise ValueError(f"{where}, field 'messages': its first two turns must be a user's and an assistant's.")
        exchanges.append({"prompt": turns[0]["content"], "completion": turns[1]["content"]})
    order = np.random.default_rng(seed).permutation(len(exchanges))
    return [exchanges[i] for i in order[:count]], len(exchanges)


if __name__ == "__main__":
    main()
