"""How does a round of team self-play compare with the DPO trainers that people use? One JSON line a run, then ratios.

    make peers                                  # their virtual environments, once
    python benchmarks/peers.py --prompts 24 48 96 --repeats 3

All train the same model (Llama, 8 layers, 19 M parameters) in float32 on the same prompts, targets and three
generations each, UltraChat-like lengths at a quarter of the scale. Ours scores with a team of three players and trains
two epochs, all of it counted. Theirs has one reference, live in every step or, where TRL precomputes it, passed once
for two epochs; MaxText, Tunix and TRL are timed in steps alone after two of warm-up, on the first `--steps` batches of
the workload. Contenders run one after the other, alone, in every repeat.

They run as they come. `--huge-pages` gives the others the allocator settings too that `tpaw` sets for itself.
"""

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
from pathlib import Path

import common

from tpaw_jax.runtime.host import HUGE_PAGES

ROOT = Path(__file__).parent.parent
CONTENDERS = {  # name: (virtual environment, script, further arguments)
    "tpaw_jax": ("", "tpaw.py", []),
    "tunix": (".venv-tunix", "tunix_dpo.py", []),
    "maxtext": (".venv-maxtext", "maxtext_dpo.py", []),
    "trl": (".venv-trl", "trl_dpo.py", ["live"]),
    "trl precomputed": (".venv-trl", "trl_dpo.py", ["precomputed"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[24, 48, 96])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8, help="of the peers: the best of 4, 8 and 16 here")
    parser.add_argument("--steps", type=int, default=10, help="of the peers that are timed, at most")
    parser.add_argument("--huge-pages", action="store_true", help="the peers too")
    parser.add_argument("--environments", type=Path, default=ROOT, help="where .venv-tunix and the others are")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    options = parser.parse_args()
    for prompts in options.prompts:
        compare(options, prompts)


def compare(options: argparse.Namespace, prompts: int) -> None:
    """All contenders on `--repeats` workloads of `prompts` prompts, each with a seed of its own."""
    rates: dict[str, list[float]] = {name: [] for name in options.only}
    for _ in range(options.repeats):
        seed = int.from_bytes(os.urandom(3))
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(workload(prompts, seed), file)
            file.flush()
            for name in options.only:
                record = run(name, file.name, options)
                rates[name].append(record["triplets_per_second"])
                how = {"prompts": prompts, "seed": seed, "peers_with_huge_pages": options.huge_pages}
                common.emit(benchmark="peers", **how, **record)
    ours = rates.get("tpaw_jax", [])
    ratios = {name: statistics.median(a / b for a, b in zip(ours, r, strict=True)) for name, r in rates.items() if ours}
    common.emit(
        benchmark="peers_summary",
        prompts=prompts,
        peers_with_huge_pages=options.huge_pages,
        triplets_per_second={name: common.spread(r) for name, r in rates.items()},
        ours_over_theirs=ratios,  # the median over repeats of the ratio on one workload
        machine=common.machine(),
    )


def run(name: str, path: str, options: argparse.Namespace) -> dict:
    """One contender on one workload, in its own virtual environment; the line it printed."""
    environment, script, further = CONTENDERS[name]
    steps = [str(options.batch), str(options.steps)] if environment else []
    variables = {"GLIBC_TUNABLES": HUGE_PAGES} if environment and options.huge_pages else {}
    return common.run_contender(options.environments, environment, script, [path, *steps, *further], variables)


def workload(prompts: int, seed: int) -> dict:
    """Random tokens of UltraChat-like lengths at a quarter of the scale, three generations a prompt, and the model."""
    model = common.MODELS["small"]
    data, generations = common.workload(prompts, 3, 0.25, seed, model.vocab_size)
    rows = [
        {
            "prompt": data.prompt_tokens[i].tolist(),
            "target": data.target_tokens[i].tolist(),
            "generated": [g.tokens[i].tolist() for g in reversed(generations)],
        }
        for i in range(prompts)
    ]
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    fields = {k: v for k, v in dataclasses.asdict(model).items() if k in (*kept, "rope_theta", "rms_norm_eps")}
    return {"model": fields, "max_prompt": common.CAPS["prompt"], "max_response": common.CAPS["target"], "rows": rows}


if __name__ == "__main__":
    main()
