"""What the study needs: worked additions in disjoint splits, a tokenizer of characters, and a small model from nothing.

    python benchmarks/study/prepare.py runs/study

A problem is `347+85=`; its target adds digit by digit and ends with the sum: `7+5=12;4+8+1=13;3+1=4;432`.
"""

import argparse
import json
import random
from pathlib import Path

import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from tpaw_jax import models as policies

CHARACTERS = "0123456789+=;"
SPECIAL = ["<pad>", "<s>", "</s>"]
SPLITS = {"train": 6000, "validation": 500, "test": 1000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--digits", type=int, default=4, help="most digits of a number")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    for name, records in splits(options.digits, options.seed).items():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (options.directory / f"{name}.jsonl").write_text(lines)
    for seed in range(5):
        write_model(options.directory / f"model_{seed}", seed)


def splits(digits: int, seed: int) -> dict[str, list[dict[str, str]]]:
    """Problems of every split; none is in two of them, nor twice in one, nor with its numbers exchanged."""
    rng = random.Random(seed)
    seen: set[tuple[int, int]] = set()
    found: dict[str, list[dict[str, str]]] = {}
    for name, count in SPLITS.items():
        found[name] = []
        while len(found[name]) < count:
            a, b = (rng.randrange(10 ** (length - 1), 10**length) for length in rng.choices(range(2, digits + 1), k=2))
            if (min(a, b), max(a, b)) not in seen:
                seen.add((min(a, b), max(a, b)))
                found[name].append({"prompt": f"{a}+{b}=", "completion": worked(a, b)})
    return found


def worked(a: int, b: int) -> str:
    """The addition digit by digit from the right, carries last, then the sum."""
    steps, carry = [], 0
    for place in range(max(len(str(a)), len(str(b)))):
        digits = [int(text[-1 - place]) for text in (str(a), str(b)) if place < len(text)]
        terms = [*digits, 1] if carry else digits
        total = sum(terms)
        steps.append(f"{'+'.join(map(str, terms))}={total}")
        carry = total // 10
    return ";".join([*steps, str(a + b)])


def write_model(directory: Path, seed: int) -> None:
    """A Llama of random weights with the tokenizer of characters, as transformers writes it."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=256
    )
    config = policies.ModelConfig("llama", len(vocabulary), 128, 384, 4, 4, 4, 32, 10000.0, 1e-5, 256, True)
    policies.save_pretrained(directory, config, random_parameters(config, seed), tokenizer, {"eos_token_id": 2})


def random_parameters(config, seed: int):
    """Parameters as the model initialises them."""
    import jax
    import jax.numpy as jnp

    model = policies.Transformer(config)
    return model.init(jax.random.key(seed), jnp.zeros((1, 8), jnp.int32))["params"]


if __name__ == "__main__":
    main()
