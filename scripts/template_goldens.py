"""Write the goldens of test_template_goldens.py: conversations as whole tokenizers and their templates render them.

    python scripts/template_goldens.py qwen2.5=DIRECTORY qwen3=DIRECTORY llama-3.1=DIRECTORY

Each directory has a `tokenizer.json` and a `tokenizer_config.json` with a chat template. The tests get the tokenizers
without the tokens and merges that no conversation needs: they give the same ids in a hundredth of the space.
"""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode

FIXTURES = Path(__file__).parent.parent / "tests" / "fixtures"
COUNT = 50
TEMPLATES = ("alternating", "no_generation_prompt", "rewrites_thinking", "trims")
"""Templates of the tests, which the first tokenizer renders."""
WITH_TOOLS = ("qwen2.5", "qwen3")
BYTES_OF = bytes_to_unicode()

WORDS = """the a planet largest is Jupiter why does it rain because water falls 3 + 4 = 7 12,500 don't I'll naïve
cafe\u0301 東京 Москва مرحبا 🙂 👩\u200d🔬 x_1 f(x) {} <b> </b> <think> ``` https://x.org/?a=b&c
2026-11-29 SELECT * FROM t;"""
GAPS = (" ", " ", " ", " ", "\n", "\n\n", "  ", "\t", "")
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
    },
}


def main(arguments: list[str]) -> None:
    """Write the goldens of all tokenizers and templates."""
    rng, texts, lines = np.random.default_rng(0), {}, []
    directories = dict(argument.split("=") for argument in arguments)
    loaded = {name: transformers.AutoTokenizer.from_pretrained(path) for name, path in directories.items()}
    first = next(iter(directories))
    pairs = [(name, name) for name in directories] + [(first, template) for template in TEMPLATES]
    for name, template in pairs:
        tokenizer = loaded[name]
        path = FIXTURES / "chat_templates" / f"{template}.jinja"
        chat = path.read_text() if template in TEMPLATES else tokenizer.chat_template
        for _ in range(COUNT):
            messages, tools = conversation(rng, template)
            options = {"tools": tools or None, "chat_template": chat}
            prompts = [
                tokenizer.apply_chat_template(
                    messages[:-1], add_generation_prompt=True, return_dict=False, enable_thinking=thinks, **options
                )
                for thinks in (True, False)
            ]
            text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
            texts.setdefault(name, set()).update((text, *map(tokenizer.decode, prompts)))
            golden = {"tokenizer": name, "template": template, "messages": messages, "tools": tools, "text": text}
            lines.append(json.dumps({**golden, "prompts": prompts}, ensure_ascii=False))
    content = "".join(line + "\n" for line in lines).encode()
    (FIXTURES / "template_goldens.jsonl.gz").write_bytes(gzip.compress(content, mtime=0))
    for name, path in directories.items():
        prune(Path(path), FIXTURES / "tokenizers" / name, texts[name], loaded[name])


def conversation(rng: np.random.Generator, template: str) -> tuple[list[dict[str, Any]], list[Any]]:
    """A random conversation that the template has words for, and its tools."""

    def text() -> str:
        parts = [str(rng.choice(WORDS.split())) + str(rng.choice(GAPS)) for _ in range(rng.integers(1, 9))]
        return str(rng.choice(["", "", " ", "\n"])) + "".join(parts) + "."

    def answer() -> dict[str, Any]:
        thought = f"<think>\n{text().strip()}\n</think>\n\n" if rng.random() < 0.3 else ""
        return {"role": "assistant", "content": thought + text()}

    def call() -> dict[str, Any]:
        arguments = {"a": int(rng.integers(99)), "b": text()}
        called = {"type": "function", "function": {"name": "add", "arguments": arguments}}
        return {"role": "assistant", "content": "" if rng.random() < 0.5 else text(), "tool_calls": [called]}

    user = lambda: {"role": "user", "content": text()}
    tools = template in WITH_TOOLS and rng.random() < 0.5
    start = [] if template == "alternating" or rng.random() < 0.5 else [{"role": "system", "content": text()}]
    turns = list(start)
    for _ in range(rng.integers(0, 3)):
        turns += [user(), call(), {"role": "tool", "content": text()}, answer()] if tools else [user(), answer()]
    last = call() if tools and rng.random() < 0.3 else answer()
    if template == "qwen3" and "tool_calls" not in last and rng.random() < 0.3:
        last = {"role": "assistant", "content": text(), "reasoning_content": text()}
    return [*turns, user(), last], [ADD] if tools else []


def prune(source: Path, target: Path, texts: set[str], whole: Any) -> None:
    """Write a tokenizer without the tokens and merges that the texts do not need."""
    known = json.loads((source / "tokenizer.json").read_text())
    settings = json.loads((source / "tokenizer_config.json").read_text())
    normal = [whole.backend_tokenizer.normalizer.normalize_str(t) if known["normalizer"] else t for t in texts]
    letters = "\n".join("".join(BYTES_OF[b] for b in text.encode()) for text in normal)
    vocabulary = known["model"]["vocab"]
    kept = {token: i for token, i in vocabulary.items() if len(token) == 1 or token in letters}
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in known["model"]["merges"]]
    merges = [pair for pair in pairs if {pair[0], pair[1], pair[0] + pair[1]} <= kept.keys()]
    special = {whole.eos_token, whole.bos_token, whole.pad_token}
    added = [t for t in known["added_tokens"] if t["content"] in special or any(t["content"] in x for x in texts)]
    # An added token that is not in the vocabulary would get the number of tokens as its id.
    known["model"] |= {"vocab": kept | {t["content"]: t["id"] for t in added}, "merges": merges}
    target.mkdir(parents=True, exist_ok=True)
    (target / "tokenizer.json").write_text(json.dumps({**known, "added_tokens": added}, ensure_ascii=False))
    names = ("bos_token", "eos_token", "pad_token", "chat_template")
    fields = {name: settings[name] for name in names if settings.get(name) is not None}
    (target / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **fields}))
    pruned = transformers.AutoTokenizer.from_pretrained(target)
    for text in texts:
        ids = whole.encode(text, add_special_tokens=False)
        assert pruned.encode(text, add_special_tokens=False) == ids, text
        assert pruned.decode(ids) == whole.decode(ids), text
    print(f"{target}: {len(kept)} of {len(vocabulary)} tokens")


if __name__ == "__main__":
    main(sys.argv[1:])
