"""What does a round cost the host: seconds and memory of reading, tokenizing, packing and storing N prompts?

    python benchmarks/data_scale.py --records 50000 200000

Synthetic records with UltraChat-like lengths, tokenized by the demo model's tokenizer, and three generations a prompt
of random tokens. One JSON line per number of records, each in a process of its own, so that the peaks are its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import numpy as np

from tpaw_jax.config import RunConfig, config_file
from tpaw_jax.data import dataset, packing, prefix_trees, templates
from tpaw_jax.models import hub
from tpaw_jax.selfplay import round_store
from tpaw_jax.storage import journal
from tpaw_jax.types import Generations, Prompts

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "tpaw_jax" / "demo"
TOKENS_PER_WORD = 2  # of the demo's tokenizer on `WORDS`
WORDS = np.array(["the", "cat", "dog", "sun", "tree", "boy", "girl", "ran", "saw", "big", "red", "was", "and", "to"])
BATCH = 16  # rows that are written at a time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="+", default=[50_000, 200_000, 2_000_000])
    parser.add_argument("--in-this-process", action="store_true", help="used by the script itself")
    options = parser.parse_args()
    for count in options.records:
        if options.in_this_process:
            measure(count)
        else:
            subprocess.run([sys.executable, __file__, "--records", str(count), "--in-this-process"], check=True)


def measure(count: int) -> None:
    """The line of one number of records."""
    seconds: dict[str, float] = {}
    peaks: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as directory:

        def timed(name: str, call: Any, *arguments: Any) -> Any:
            start = time.perf_counter()
            result = call(*arguments)
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
            peaks[name] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            return result

        path = Path(directory) / "records.jsonl"
        write_records(path, count)
        run = configuration(path)
        template = templates.make_template(hub.load_tokenizer(str(DEMO / "stories260K")), run.data, 512)
        prompts, _, _ = timed("reading and tokenizing", dataset.load, run.data, template, run.seed)
        window = generations(prompts)
        store = round_store.open_store(journal.open_journal(Path(directory) / "run"), prompts)
        for one in reversed(window):
            store = timed("storing three rounds", round_store.append, store, one)
        trees = timed("trees", prefix_trees.trees_of_window, prompts, window, store.sources)
        rows = timed("packing", packing.pack, trees, run.packing)
        timed("indices of rows", lambda: (rows.prompt_index, rows.source, rows.triplets, rows.tokens))
        some = range(0, min(len(rows), 50 * BATCH), BATCH)
        timed("rows", lambda: [packing.take(rows, np.arange(i, min(i + BATCH, len(rows))), BATCH).batch for i in some])
        seconds["a row"] = seconds.pop("rows") / (len(some) * BATCH)
    tokens = sum(len(x) for x in prompts.prompt_tokens) / len(prompts)
    common.emit(
        benchmark="data_scale",
        records=count,
        prompts=len(prompts),
        tokens_per_prompt=tokens,
        rows=len(rows),
        fill=rows.fill,
        seconds=seconds,
        peak_gib=peaks,
        machine=common.machine(),
    )


def configuration(path: Path) -> RunConfig:
    """The demo's data settings with the paper's lengths."""
    settings = {
        "data.sources": json.dumps([{"path": str(path)}]),
        "data.max_prompts": 0,
        "data.max_prompt_length": 512,
        "data.max_length": 1024,
        "sampling.max_new_tokens": 256,
        "packing.row_length": 8192,
        "packing.max_responses_per_row": 64,
    }
    return config_file.load(DEMO / "demo.yaml", [f"{key}={value}" for key, value in settings.items()])


def write_records(path: Path, count: int) -> None:
    """Prompts and answers of random words, of lengths as in `common.lengths`."""
    rng = np.random.default_rng(0)
    x, y, _ = common.lengths(count, 1, 1.0, 0)
    with path.open("w") as file:
        for i in range(count):
            text = lambda n: " ".join(WORDS[rng.integers(0, len(WORDS), max(1, n // TOKENS_PER_WORD))])
            file.write(json.dumps({"prompt": f"{i} {text(x[i])}", "completion": text(y[i])}) + "\n")


def generations(prompts: Prompts) -> list[Generations]:
    """Three rounds of responses of random tokens, newest first."""
    rng = np.random.default_rng(1)
    _, _, lengths = common.lengths(len(prompts), 3, 1.0, 0)
    draw = lambda n: rng.integers(3, 512, n).astype(np.int32)
    blank = lambda n: np.zeros(n, np.float32)
    return [
        Generations(t, tuple(draw(n) for n in lengths[:, t]), tuple(blank(n) for n in lengths[:, t]))
        for t in reversed(range(3))
    ]


if __name__ == "__main__":
    main()
