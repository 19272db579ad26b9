"""What does a round cost the host: seconds and memory of reading, tokenizing, packing and storing N prompts?

    python benchmarks/data_scale.py --records 50000 200000 --hosts 1 4

Synthetic records with UltraChat-like lengths, tokenized by the demo model's tokenizer, and three generations a prompt
of random tokens. One JSON line per number of records and of hosts, which are processes of this machine here: the most
of any host. Hosts share the machine's cores, so `cpu_seconds` says what each would need alone.
"""

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import common
import numpy as np

from tpaw_jax.config import RunConfig, config_file
from tpaw_jax.data import dataset, packing, prefix_trees, templates
from tpaw_jax.models import hub
from tpaw_jax.selfplay import round_store
from tpaw_jax.storage import array_files, journal
from tpaw_jax.types import Generations, Prompts, Ragged

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "tpaw_jax" / "demo"
TOKENS_PER_WORD = 2  # of the demo's tokenizer on `WORDS`
WORDS = np.array(["the", "cat", "dog", "sun", "tree", "boy", "girl", "ran", "saw", "big", "red", "was", "and", "to"])
BATCH = 16  # rows that are written at a time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="+", default=[50_000, 200_000, 2_000_000])
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 4], help="processes that act as hosts of a pod")
    parser.add_argument("--processes", type=int, default=0, help="of each host; 0: its share of the cores")
    parser.add_argument("--host", help="used by the script itself")
    options = parser.parse_args()
    if options.host:
        host, hosts, port, directory = options.host.split(",")
        measure(options.records[0], Path(directory), int(host), int(hosts), int(port), options.processes)
        return
    for count in options.records:
        with tempfile.TemporaryDirectory() as directory:
            write_records(Path(directory) / "records.jsonl", count)
            for hosts in options.hosts:
                processes = options.processes or max(1, len(os.sched_getaffinity(0)) // hosts)
                common.emit(benchmark="data_scale", **of_hosts(count, Path(directory), hosts, processes))


def of_hosts(count: int, directory: Path, hosts: int, processes: int) -> dict[str, Any]:
    """The seconds and peaks of a number of hosts, the most of any of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "--records", str(count), "--processes", str(processes), "--host"]
    start = lambda host: subprocess.Popen(
        [*command, f"{host},{hosts},{port},{directory}"], stdout=subprocess.PIPE, text=True
    )
    outputs = [process.communicate()[0] for process in [start(host) for host in range(hosts)]]
    found = [json.loads(output.splitlines()[-1]) for output in outputs]
    most = lambda key: {name: max(one[key][name] for one in found) for name in found[0][key]}
    facts = {"hosts": hosts, "processes": processes, **found[0]}
    return facts | {name: most(name) for name in ("seconds", "cpu_seconds", "peak_gib", "peak_held_gib")}


def measure(count: int, directory: Path, host: int, hosts: int, port: int, processes: int) -> None:
    """Print the line of one host.

    A peak is the most memory that its process, without its workers, has had so far: in all, and what the system cannot
    take back, which leaves out the parts of mapped files that happen to be in memory.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")
    if hosts > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", hosts, host)
    seconds: dict[str, float] = {}
    cpu_seconds: dict[str, float] = {}
    peaks: dict[str, float] = {}
    held_gib: dict[str, float] = {}
    held, sampled = [0.0], threading.Event()

    def sample() -> None:
        while not sampled.wait(0.02):
            held[0] = max(held[0], anonymous_gib())

    threading.Thread(target=sample, daemon=True).start()

    def timed(name: str, call: Any, *arguments: Any) -> Any:
        start, used = time.perf_counter(), cpu_time()
        result = call(*arguments)
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
        cpu_seconds[name] = cpu_seconds.get(name, 0.0) + cpu_time() - used
        peaks[name] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        held[0] = held_gib[name] = max(held[0], anonymous_gib())
        return result

    run = configuration(directory / "records.jsonl", processes)
    template = templates.make_template(hub.load_tokenizer(str(DEMO / "stories260K")), run.data, 512)
    with tempfile.TemporaryDirectory() as own:
        shared = directory / f"of_{hosts}"
        prompts, _, _ = timed("reading and tokenizing", dataset.load, run.data, template, run.seed, shared)
        store = round_store.open_store(journal.open_journal(Path(own)), prompts)
        for t in range(3):
            responses = generations(prompts, t)
            store = timed("storing three rounds", round_store.append, store, responses)
        window = [store.generations[t] for t in reversed(range(3))]
        trees = timed("trees", prefix_trees.trees_of_window, prompts, window, store.sources)
        rows = timed("packing", packing.pack, trees, run.packing)
        timed("indices of rows", lambda: (rows.prompt_index, rows.source, rows.triplets, rows.tokens))
        some = range(0, min(len(rows), 50 * BATCH), BATCH)
        batch = lambda first: packing.take(rows, np.arange(first, min(first + BATCH, len(rows))), BATCH).batch
        timed("rows", lambda: [batch(first).tokens.size for first in some])
        seconds["a row"] = seconds.pop("rows") / (len(some) * BATCH)
    common.emit(
        records=count,
        prompts=len(prompts),
        tokens_per_prompt=float(prompts.prompt_tokens.lengths.mean()),
        rows=len(rows),
        fill=rows.fill,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        peak_gib=peaks,
        peak_held_gib=held_gib,
        machine=common.machine(),
    )
    if hosts > 1:
        jax.distributed.shutdown()


def cpu_time() -> float:
    """Seconds that cores have worked for this process and its finished workers."""
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def anonymous_gib() -> float:
    """The memory of this process that is not part of a file."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 2**20


def configuration(path: Path, processes: int) -> RunConfig:
    """The demo's data settings with the paper's lengths."""
    settings = {
        "data.sources": json.dumps([{"path": str(path)}]),
        "data.max_prompts": 0,
        "data.processes": processes,
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


def generations(prompts: Prompts, t: int) -> Generations:
    """A round of responses of random tokens, where the engine would put them."""
    rng = np.random.default_rng(t)
    lengths = common.lengths(len(prompts), 3, 1.0, 0)[2][:, t]
    tokens = array_files.join((rng.integers(3, 512, n, np.int32) for n in lengths), np.int32)
    log_probs = array_files.join((np.zeros(n, np.float32) for n in lengths), np.float32)
    return Generations(t, Ragged.split(tokens, lengths), Ragged.split(log_probs, lengths))


if __name__ == "__main__":
    main()
