"""Turn TinyStories text into JSONL with the start of each story as prompt and the rest as completion.

    python scripts/prepare_tinystories.py tinystories.txt tpaw_jax/demo/tinystories.jsonl --stories 400

Stories in the text are separated by <|endoftext|>.
"""

import argparse
import json
from pathlib import Path

PROMPT_WORDS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--stories", type=int, default=400)
    options = parser.parse_args()
    stories = options.text.read_text(errors="ignore").split("<|endoftext|>")[:-1]  # the last story is truncated
    records = []
    for story in stories:
        words = " ".join(story.split()).split(" ")
        if len(words) > 2 * PROMPT_WORDS and len(records) < options.stories:
            records.append({"prompt": " ".join(words[:PROMPT_WORDS]), "completion": " ".join(words[PROMPT_WORDS:])})
    options.out.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


if __name__ == "__main__":
    main()
