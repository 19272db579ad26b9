"""What the study needs: problems in disjoint splits and, for the additions, small models from nothing.

    python benchmarks/study/prepare.py runs/study --experiment additions

An addition is `347+85=`; its target adds digit by digit and ends with the sum: `7+5=12;4+8+1=13;3+1=4;432`. The sums
and differences of two numbers of chain_sum are reasoning-gym's (extra `study`); their target is the number alone.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from tpaw_jax import models as policies

CHARACTERS = "0123456789+=;"
SPECIAL = ["<pad>", "<s>", "</s>"]
SPLITS = {
    "additions": {"train": 6000, "validation": 500, "test": 1000},
    "chain_sum": {"train": 400, "validation": 100, "test": 200},
}
APART = 10**8
"""Of the seeds of two splits: item i of a dataset of reasoning-gym is drawn with seed + i."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--experiment", choices=SPLITS, default="additions")
    parser.add_argument("--digits", type=int, default=4, help="most digits of a number of the additions")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    if options.experiment == "additions":
        drawn = dict.fromkeys(SPLITS["additions"], additions(options.digits, random.Random(options.seed)))
        for seed in range(5):
            write_model(options.directory / f"model_{seed}", seed)
    else:
        drawn = {name: chain_sums(options.seed + APART * i) for i, name in enumerate(SPLITS["chain_sum"])}
    for name, records in splits(options.experiment, drawn).items():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (options.directory / f"{name}.jsonl").write_text(lines)
    (options.directory / "prepared").touch()


def splits(experiment: str, drawn: dict[str, Iterator[tuple[Any, str, str]]]) -> dict[str, list[dict[str, str]]]:
    """Problems of every split from what is drawn for it: (what makes it the same as another, prompt, target).

    None is in two splits, nor twice in one.
    """
    seen: set[Any] = set()
    found: dict[str, list[dict[str, str]]] = {}
    for name, count in SPLITS[experiment].items():
        found[name] = []
        while len(found[name]) < count:
            same, prompt, target = next(drawn[name])
            if same not in seen:
                seen.add(same)
                found[name].append({"prompt": prompt, "completion": target})
    return found


def additions(digits: int, rng: random.Random) -> Iterator[tuple[Any, str, str]]:
    """Of numbers of 2 to so many digits; exchanging them makes no other problem."""
    while True:
        a, b = (rng.randrange(10 ** (length - 1), 10**length) for length in rng.choices(range(2, digits + 1), k=2))
        yield (min(a, b), max(a, b)), f"{a}+{b}=", worked(a, b)


def chain_sums(seed: int) -> Iterator[tuple[Any, str, str]]:
    """Sums and differences of two numbers of one or two digits, in reasoning-gym's words; exchanging the terms of a sum
    makes no other problem.
    """
    import reasoning_gym

    terms = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
    for item in reasoning_gym.create_dataset("chain_sum", size=100_000, seed=seed, **terms):
        first, sign, second = item["question"].split()[-4:-1]
        terms_of = (first, second) if sign == "-" else tuple(sorted((first, second)))
        yield (sign, *terms_of), item["question"], item["answer"]


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
