"""Write the 50,000 prompts and targets of SPIN and TPAW: the first exchange of UltraChat-200k conversations.

    python scripts/prepare_spin_subset.py --out ultrachat_50k.jsonl
    python scripts/prepare_spin_subset.py --source my_conversations.jsonl --count 1000 --out subset.jsonl

As in SPIN's spin/reformat.py, the first user turn of a conversation is the prompt and the first answer the target. The
seed chooses --count conversations, in an order that does not depend on --count.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from tpaw_jax.config import SourceConfig
from tpaw_jax.data import sources
from tpaw_jax.storage import files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="HuggingFaceH4/ultrachat_200k", help="a path as in data.sources")
    parser.add_argument("--split", default="train_sft")
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    chosen, conversations = subset(SourceConfig(options.source, split=options.split), options.count, options.seed)
    files.replace(options.out, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in chosen).encode())
    print(f"{options.out} contains the first exchanges of {len(chosen)} of {conversations} conversations.")


def subset(source: SourceConfig, count: int, seed: int) -> tuple[list[dict[str, str]], int]:
    """`count` first exchanges as prompt and completion, and the number of conversations in the source.

    Raises:
        ValueError: a record has no turns, or its first two are not a user turn and an assistant turn.
    """
    exchanges = []
    for where, raw in sources.read_source(source):
        if isinstance(raw, ValueError):
            raise raw
        turns = raw.get("messages") if isinstance(raw, dict) else None
        if not isinstance(turns, list) or [t.get("role") for t in turns[:2]] != ["user", "assistant"]:
            raise ValueError(f"{where}, field 'messages': the first two turns must be from user and assistant.")
        exchanges.append({"prompt": turns[0]["content"], "completion": turns[1]["content"]})
    order = np.random.default_rng(seed).permutation(len(exchanges))
    return [exchanges[i] for i in order[:count]], len(exchanges)


if __name__ == "__main__":
    main()
