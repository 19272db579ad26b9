"""Put what the benchmarks printed into the docs, as tables between two marks of a page, and a plot.

make bench-report        # from benchmarks/results: *.jsonl, which `make bench` writes, and plan*.json of `make plans`
"""

import json
from pathlib import Path

import common
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent
PAGES = {  # the word of a page's two marks
    "benchmarks": ROOT / "docs" / "throughput.md",
    "plans": ROOT / "docs" / "planning.md",
    "models": ROOT / "docs" / "planning.md",
    "faults": ROOT / "docs" / "reliability.md",
    "headline": ROOT / "README.md",
    "batches": ROOT / "docs" / "pods.md",
}
NAMES = {
    "tpaw_jax": "tpaw_jax, team of 3",
    "tunix": "Tunix DPO",
    "maxtext": "MaxText DPO",
    "trl": "TRL DPO",
    "trl precomputed": "TRL, precomputed",
}
CONTENDERS = tuple(NAMES)


def main() -> None:
    found = [json.loads(line) for path in sorted(RESULTS.glob("*.jsonl")) for line in path.read_text().splitlines()]
    of = lambda name: [record for record in found if record["benchmark"] == name]
    planned = [plan for path in sorted(RESULTS.glob("plan*.json")) for plan in json.loads(path.read_text())]
    comparisons = of_workloads(of("peers"))
    filled = lambda part: part.count("\n") > 2  # a table of nothing has its head alone
    made = [
        peers(comparisons),
        step(of("team_step")),
        scoring(of("scoring"), of("scoring_from_the_ring")),
        trees(of("trees_vs_pairs"), of("trees_vs_pairs_loss")),
        memory(of("memory_step"), of("memory_head"), of("memory_longest_row")),
        rounds(of("round")),
        sampling(of("sampling")),
        *evaluation(of("evaluation"), of("evaluation_harness")),
        tree_attention(*(of(f"tree_attention_{part}") for part in ("parity", "pairs", "schedule"))),
    ]
    plot(comparisons, of("round"))
    tables = {
        "benchmarks": made,
        "plans": [plans(planned), exchanges(planned)],
        "models": [steps_of_models(planned)],
        "batches": [batches(planned)],
        "faults": [
            faults(of("faults"), of("faults_bucket"), of("killed_pod")),
            durability(of("durability")),
            fuzz(of("fuzz")),
        ],
        "headline": [headline(comparisons)],
    }
    for name, path in PAGES.items():
        start, end = f"<!-- {name}: make bench-report -->\n", f"<!-- end of {name} -->"
        before, rest = path.read_text().split(start)
        path.write_text(before + start + "\n".join(filter(filled, tables[name])) + end + rest.split(end)[1])


def headline(comparisons: list[dict]) -> str:
    """Triplets per second of each contender, by size of workload."""
    lines = [f"| triplets/s, by number of prompts | {' | '.join(NAMES.values())} |"]
    lines.append("| --- " * (1 + len(NAMES)) + "|")
    for one in comparisons:
        if not one["peers_with_huge_pages"]:
            rates, ratios = one["triplets_per_second"], one["ours_over_theirs"]
            cells = [f"{rates['tpaw_jax']['median']:.1f}"]
            cells += [f"{rates[c]['median']:.2f} ({ratios[c]['median']:.1f} x)" for c in CONTENDERS[1:]]
            lines.append(f"| {one['prompts']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def of_workloads(records: list[dict]) -> list[dict]:
    """Rates and ratios of each size of workload, over all runs of it; a ratio is of two rates on one workload."""
    runs: dict[tuple, dict[int, dict[str, float]]] = {}
    for r in records:
        size = r["peers_with_huge_pages"], r["prompts"]
        runs.setdefault(size, {}).setdefault(r["seed"], {})[r["contender"]] = r["triplets_per_second"]
    found = []
    for (huge_pages, prompts), of_seed in sorted(runs.items()):
        theirs = {c: [rates[c] for rates in of_seed.values() if c in rates] for c in CONTENDERS}
        over = {c: [rates["tpaw_jax"] / rates[c] for rates in of_seed.values() if c in rates] for c in CONTENDERS}
        found.append(
            {
                "prompts": prompts,
                "workloads": len(of_seed),
                "peers_with_huge_pages": huge_pages,
                "triplets_per_second": {c: common.spread(rates) for c, rates in theirs.items()},
                "ours_over_theirs": {c: common.spread(ratios) for c, ratios in over.items()},
            }
        )
    return found


def peers(summaries: list[dict]) -> str:
    """Triplets/s of every contender, one line a workload."""
    lines = []
    for s in summaries:
        rate = s["triplets_per_second"]
        ratio = s["ours_over_theirs"]
        cells = [_range(rate["tpaw_jax"], "{:.2f}")]
        cells += [f"{rate[c]['median']:.2f} (**{_range(ratio[c], '{:.1f}')}**)" for c in CONTENDERS[1:]]
        how = "with our allocator settings" if s["peers_with_huge_pages"] else "as they come"
        lines.append([f"{s['workloads']} x {s['prompts']} prompts, peers {how}", *cells])
    return _table(["triplets/s, median; ours over theirs, median and range", *(NAMES[c] for c in CONTENDERS)], lines)


def step(records: list[dict]) -> str:
    """The team step and the share of the matmul peak it reaches."""
    lines = [
        [
            f"{r['model']}, rows of {r['row_length']}",
            f"{r['fill']:.1%}",
            f"{r['triplets_per_second']['median']:.2f}",
            _range(r["tokens_per_second"], "{:.0f}"),
            _range(r["model_gflops"], "{:.0f}"),
            f"{r['matmul_peak_gflops']['median']:.0f}",
            f"**{r['share_of_peak']:.0%}**",
            f"{r['input_wait_share']:.3%}",
        ]
        for r in records
    ]
    head = ["team step", "fill", "triplets/s", "tokens/s", "model GFLOP/s", "matmul peak", "share", "waits for input"]
    return _table(head, lines)


def scoring(records: list[dict], streams: list[dict]) -> str:
    """Forward passes, and players read from the ring."""
    lines = [
        [
            f"{r['model']}, {r['batches_at_once']} rows of {r['row_length']} at once",
            _range(r["tokens_per_second"], "{:.0f}"),
            _range(r["model_gflops"], "{:.0f}"),
            f"{r['share_of_peak']:.0%}",
        ]
        for r in records
    ]
    text = _table(["scoring", "tokens/s", "model GFLOP/s", "share of the peak"], lines)
    for s in streams:
        text += (
            f"\nThree {s['model']} players from the ring: {s['seconds_read_ahead']['median']:.2f} s where the next is "
            f"read while one scores, {s['seconds_in_turn']['median']:.2f} s in turn; "
            f"{s['seconds_waited']['median']:.2f} s of the first is waiting for the disk.\n"
        )
    return text


def trees(records: list[dict], losses: list[dict]) -> str:
    """Trees with cached scores against padded pairs with live references."""
    lines = [
        [
            f"{r['model']}, {r['prompts']} prompts at {r['scale']:g} of the paper's lengths",
            f"{r['trees_triplets_per_second']['median']:.2f}",
            f"{r['pairs_triplets_per_second']['median']:.2f}",
            f"**{r['ratio']['median']:.1f} x** ({r['ratio']['min']:.1f} to {r['ratio']['max']:.1f})",
            f"{r['flops_ratio']:.1f} x",
            f"{loss['relative_difference']:.0e}",
        ]
        for r, loss in zip(records, losses, strict=True)
    ]
    head = ["three players", "trees, triplets/s", "padded pairs, live references", "ratio", "FLOPs", "loss differs by"]
    return _table(head, lines)


def memory(steps: list[dict], heads: list[dict], longest: list[dict]) -> str:
    """Peaks of compiled programs."""
    lines = [
        [
            f"{r['model']}, rows of {r['row_length']}, remat {r['remat']}",
            f"{r['team_of_three_gib']:.2f}",
            f"{r['sft_gib']:.2f}",
            f"{r['ratio']:.3f}",
        ]
        for r in steps
    ]
    text = _table(["peak of the step, GiB", "team of three", "plain SFT", "ratio"], lines)
    lines = [
        [
            f"V = {r['vocabulary']:,}, D = {r['width']}, {r['predictions']} predictions",
            f"{r['chunked_gib']:.2f} ({r['chunked_beyond_inputs_and_gradients_gib']:.2f})",
            f"{r['full_gib']:.2f} ({r['full_beyond_inputs_and_gradients_gib']:.2f})",
            f"{r['ratio']:.1f} x",
        ]
        for r in heads
    ]
    head = ["peak of the head, GiB (beyond inputs and gradients)", "chunked", "full logits", "ratio"]
    text += "\n" + _table(head, lines)
    if longest:
        fits = ", ".join(f"{r['row_length']:,} with `{r['remat']}`" for r in longest)
        text += f"\nLongest row whose {longest[0]['model']} step fits {longest[0]['budget_gib']:g} GiB: {fits}.\n"
    return text


def rounds(records: list[dict]) -> str:
    """Where the wall time of each round goes."""
    stages = list(records[0]["share_of"]) if records else []
    lines = [
        [
            f"{Path(r['config']).stem}, round {r['round']}, {r['triplets']} triplets",
            f"{r['seconds']:.0f} ({r['compile_seconds']:.0f} compiling)",
            *(f"{r['share_of'][stage]:.1%}" for stage in stages),
        ]
        for r in records
    ]
    return _table(["wall time", "seconds", *stages], lines)


SHARES = ("slots_busy", "share_of_bandwidth", "share_of_bound", "share_of_peak")
"""Of a reading of our sampler; `share_of_bound` is missing in those that are older than it."""


def sampling(records: list[dict]) -> str:
    """Useful tokens/s of the samplers, one line a number of slots and a dtype, and how near to their bounds ours is."""
    lines = []
    sizes = {(r["requests"], r["dtype"], r["batch"]) for r in records if r["contender"] == "tpaw_jax"}
    for requests, dtype, batch in sorted(
        sizes, key=lambda size: (size[0] > 128, size[1] == "bfloat16", size[2], size[0])
    ):
        ours = [r for r in records if r.get("requests") == requests and (r["dtype"], r["batch"]) == (dtype, batch)]
        mine = {r["seed"]: r["tokens_per_second"] for r in ours}
        middle = lambda name, ours=ours: common.spread([r[name] for r in ours])["median"]
        cells = [f"{requests} requests, {dtype}, {batch}", _range(common.spread(list(mine.values())), "{:.0f}")]
        for name in ("transformers", "tunix"):
            theirs = [r for r in records if r["contender"] == name and r["seed"] in mine]
            ratios = [mine[r["seed"]] / r["tokens_per_second"] for r in theirs]
            rate = common.spread([r["tokens_per_second"] for r in theirs])["median"] if theirs else 0
            cells.append(f"{rate:.0f} (**{_range(common.spread(ratios), '{:.1f}')}**)" if theirs else "")
        shares = [middle(name) if name in ours[0] else None for name in SHARES]
        lines.append([*cells, *("" if share is None else f"{share:.0%}" for share in shares)])
    head = ["useful tokens/s, slots", "tpaw_jax", "transformers.generate", "Tunix's sampler"]
    bounds = ["decode, of the bandwidth", "decode, of the nearer bound", "prefill, of the matmul peak"]
    return _table([*head, "slots busy", *bounds], lines)


def evaluation(problems: list[dict], tasks: list[dict]) -> tuple[str, str]:
    """Greedy answers beside transformers', then lm-eval's scores by our interface and by its own model."""
    lines = []
    for r in problems:
        gaps = [part["logits apart"] for part in r["where_they_part"] if part["logits apart"] is not None]
        apart = f"{len(gaps)}, at most {max(gaps):.1e}" if gaps else "0"
        rates = f"{r['accuracy']:.1%} ({', '.join(f'{at:.1%}' for at in r['interval'])})"
        tokens = f"{r['tokens_per_second']:.0f}", f"{r['transformers_tokens_per_second']:.0f}"
        same = f"{r['same_responses']}", f"{r['same_answers']}"
        lines.append(
            [f"{r['problems']} problems of GSM8K", rates, f"{r['transformers_accuracy']:.1%}", *tokens, *same, apart]
        )
    head = ["`tpaw eval` on SmolLM2", "right", "transformers", "tokens/s", "transformers", "same responses"]
    answers = _table([*head, "same verdicts", "parted: logits of the two tokens apart"], lines)
    lines = []
    for r in tasks:
        for score, value in r["scores"].items():
            lines.append([f"{score.removesuffix(',none')}", f"{value:.4f}", f"{r['hf_scores'][score]:.4f}"])
        gap = f"{r['largest_log_likelihood_difference']:.1e} nats"
        lines.append([f"largest difference of {r['log_likelihoods']} log-likelihoods", gap, ""])
        lines.append([f"same texts of {r['documents']}", str(r["same_texts"]), ""])
    return answers, _table(["lm-eval", "by `tpaw_jax`", "by its `hf` model"], lines)


def tree_attention(parities: list[dict], pairs: list[dict], schedules: list[dict]) -> str:
    """The TPU kernel under the tree's rule: errors, pairs, and the speed that the compiler's schedule allows."""
    lines = []
    for r in pairs:
        of_row = [s for s in schedules if s["row_length"] == r["row_length"]]
        shares = [" / ".join(f"{x:.0%}" for x in s["share_of_a_plain_matmul"].values()) for s in of_row]
        over = f"{r['pairs_computed_over_pairs_seen']:.2f}"
        lines.append([f"rows of {r['row_length']:,}", f"{r['fill']:.0%}", over, *shares])
    topologies = dict.fromkeys(s["topology"] for s in schedules)
    head = ["tree attention on TPU", "fill", "pairs computed over seen", *(t.partition(":")[0] for t in topologies)]
    text = _table(head, lines)
    for r in parities:
        values, gradients = r["largest_relative_error"].values()
        text += (
            f"\nIn interpret mode, {r['trees']} random trees in {r['rows']} rows: largest error {values:.1e} of the "
            f"largest value, {gradients:.1e} of the largest gradient.\n"
        )
    return text


def steps_of_models(reports: list[dict]) -> str:
    """What `tpaw plan` says of the step alone, for models of many families."""
    lines = []
    for r in (r for r in reports if set(r["stages"]) == {"step"}):
        step = r["stages"]["step"]
        mesh = " x ".join(f"{axis} {size}" for axis, size in r["mesh"].items() if size > 1)
        cells = [f"{Path(r['model']).name} on {r['topology']}, {mesh}", f"{r['parameters'] / 1e9:.1f}"]
        if not step["fits"]:
            lines.append([*cells, f"{step['peak GiB']:.1f} of {step['of GiB']:.1f}: does not fit", *[""] * 7])
            continue
        exchanged = sum(e["GiB sent"] for e in step["exchanges"] if e["kind"] == "all-to-all")
        by_hand = step["GiB sent by hand"].get("all-to-all", 0.0)
        seconds = ("compute", "memory", "exchange beside", "exchange alone")
        lines.append(
            [
                *cells,
                f"{step['peak GiB']:.1f} of {step['of GiB']:.1f}",
                *(f"{step[f'predicted {name} s']:.2f}" for name in seconds),
                f"**{step['predicted MFU']:.0%}**",
                step["binds"],
                f"{exchanged:.1f} ({by_hand:.1f})",
            ]
        )
    head = ["a step", "billion parameters", "peak, GiB", "compute, s", "memory, s", "overlapped collectives, s"]
    head += ["exposed collectives, s", "MFU of active FLOPs", "binds", "all-to-all, GiB sent (by hand)"]
    return _table(head, lines)


def plans(reports: list[dict]) -> str:
    """What `tpaw plan` says of each topology: the compiler's peaks, and what is predicted."""
    lines = []
    for r in reports:
        of, run = r["stages"], r.get("predicted run")
        if run is None or len(of) < 4:  # something does not fit, or was not asked for
            continue
        peaks, step = [f"{s['peak GiB']:.1f} + {s['beside it GiB']:.1f}" for s in of.values()], of["step"]
        mesh = " x ".join(f"{axis} {size}" for axis, size in r["mesh"].items() if size > 1)
        lines.append(
            [
                f"{Path(r['model']).name} on {r['topology']}, {mesh}, rows of {r['row length']:,}, remat {r['remat']}",
                f"{run['triplets a step']:,.0f}",
                f"{step['of GiB']:.1f}",
                *peaks,
                f"**{step['predicted MFU']:.0%}**",
                step["binds"],
                f"{of['decode']['memory traffic GiB'] / of['decode']['memory traffic GiB, by hand']:.2f}",
                f"{run['triplets/s of training']:.0f}",
                f"{run['hours']:.1f}",
                f"{run['chip-hours']:.0f}",
                f"{run['padded pairs, hours']:.0f}",
            ]
        )
    head = [
        "planned",
        "triplets per step",
        "GiB there are",
        *(f"{name}, GiB" for name in ("step", "scoring", "prefill", "decode")),
    ]
    head += ["MFU of the step", "binds", "decode moves, over the least", "triplets/s", "hours", "chip-hours"]
    return _table([*head, "hours in pairs"], lines)


def batches(reports: list[dict]) -> str:
    """The same model and chips with steps of the paper's batch, and with one long row per chip."""
    pairs: dict[tuple[str, str, int], list[dict]] = {}
    for r in sorted(reports, key=lambda r: r["chips"]):
        if "predicted run" in r:
            pairs.setdefault((r["model"], r["topology"], r["chips"]), []).append(r)
    lines = []
    for (model, topology, chips), of in pairs.items():
        if len(of) < 2:
            continue
        cells = []
        for r in sorted(of, key=lambda r: r["predicted run"]["triplets a step"]):
            run, mesh = r["predicted run"], " x ".join(f"{axis} {n}" for axis, n in r["mesh"].items() if n > 1)
            layout = f"{mesh}, rows of {r['row length']:,}"
            cells += [f"{run['triplets a step']:,.0f}", layout, f"{r['stages']['step']['predicted MFU']:.0%}"]
            cells.append(f"{run['hours']:.2f}")
        lines.append([f"{Path(model).name}, {topology}", str(chips), *cells])
    step = ["triplets per step", "layout", "predicted MFU", "hours of the run"]
    return _table(["model and slice", "chips", *step, *(f"{name}, large steps" for name in step)], lines)


def exchanges(reports: list[dict]) -> str:
    """What a step computes, moves and sends on one device, by topology: collectives beside their count by hand."""
    kinds = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "between slices")
    lines = []
    for r in reports:
        step, cells = r["stages"].get("step", {}), []
        if "exchanges" not in step:
            continue
        for kind in kinds:
            found = [e for e in step["exchanges"] if e["kind"] == kind]
            total, expected = sum(e["GiB sent"] for e in found), step["GiB sent by hand"].get(kind, 0)
            cells.append(f"{total:.2f} ({expected:.2f})" if expected or total > 0.01 else "")
        every = sum(e["GiB sent"] for e in step["exchanges"])
        beside = sum(e["GiB sent"] for e in step["exchanges"] if e["asynchronous"])
        if every:
            cells += [f"**{every / sum(step['GiB sent by hand'].values()):.2f}**", f"{beside / every:.1%}"]
        figures = [f"{step['TFLOP executed']:.0f}", f"{step['memory traffic GiB']:.0f}", f"{step['peak GiB']:.1f}"]
        lines.append([f"{Path(r['model']).name} on {r['topology']}", *figures, *cells])
    head = ["a step on one chip", "TFLOP", "memory traffic, GiB", "peak, GiB"]
    sent = [f"{kind}, GiB sent (by hand)" for kind in kinds]
    return _table([*head, *sent, "all sent over by hand", "asynchronous"], lines)


def faults(on_disk: list[dict], in_bucket: list[dict], pod: list[dict]) -> str:
    """Runs that were killed, damaged or out of space: how many ended as the undisturbed one."""
    lines = _kills_and_damages(on_disk)
    for fault, called in (("full disk", "full disks"), ("read-only disk", ""), ("too many open files", "")):
        of = [r for r in on_disk if r["fault"] == fault]
        if of:
            told, same = sum(bool(r["said"]) for r in of), sum(r["same"] for r in of)
            stages = ", ".join(dict.fromkeys(r["stage"] for r in of))
            lines.append([f"{len(of)} x {called or fault} ({stages})", f"{told}", f"{same} of {len(of)}", ""])
    lines += [[f"in a bucket: {line[0]}", *line[1:]] for line in _kills_and_damages(in_bucket)]
    for r in pod:
        if "kills" in r:
            same = "yes" if r["same"] else "no"
            runs = r.get("runs", 1)
            played = "one run" if runs == 1 else f"{runs} runs"
            lines.append([f"in a bucket, two processes: {played}, {r['kills']} kills", "", same, ""])
    return _table(["a small run that met", "told", "ended as the undisturbed one", "work redone, median"], lines)


def _kills_and_damages(records: list[dict]) -> list[list[str]]:
    lines = []
    for r in records:
        if r["fault"] == "kill, all":
            stages = ", ".join(f"{name} {count}" for name, count in r["stages"].items())
            steps, seconds = r["steps_redone"], r["seconds_redone"]
            redone = ", at most ".join(f"{steps[of]:.0f} steps and {seconds[of]:.1f} s" for of in ("median", "max"))
            lines.append([f"{r['kills']} kills ({stages})", "", f"{r['same']} of {r['kills']}", redone])
        if r["fault"] == "damage, all":
            lines.append([f"{r['damages']} damages", f"{r['found']}", f"{r['same']} of {r['damages']}", ""])
    return lines


def durability(records: list[dict]) -> str:
    """What a save costs the steps beside it, and what all saves cost at the default intervals."""
    lines = [
        [
            r["model"],
            f"{r['gib_of_a_save']:.2f}",
            f"{r['step_seconds']['median']:.1f}",
            _range(r["seconds_of_a_save"], "{:.1f}"),
            f"{r['seconds_between_saves']:.0f}",
            f"**{r['ratio_at_defaults']:.3f}**",
        ]
        for r in records
    ]
    head = ["saving the training state", "GiB", "step, s", "cost of a save, s", "between saves, s"]
    return _table([*head, "time with saves over without"], lines)


def fuzz(records: list[dict]) -> str:
    """Inputs that coverage-guided fuzzing gave to the readers."""
    lines = [[r["reader"], f"{r['inputs']:,}", f"{r['refused']:,}", r["crash"] or "none"] for r in records]
    return _table(["fuzzed reader", "inputs", "refused with a sentence", "ended otherwise"], lines)


def plot(summaries: list[dict], records: list[dict]) -> None:
    """Triplets/s beside the peers, and the stages of the rounds."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    as_they_come = [s for s in summaries if not s["peers_with_huge_pages"]]
    width = 0.8 / len(CONTENDERS)
    for place, contender in enumerate(CONTENDERS):
        rates = [s["triplets_per_second"][contender] for s in as_they_come]
        x = [i + (place - (len(CONTENDERS) - 1) / 2) * width for i in range(len(rates))]
        below = [r["median"] - r["min"] for r in rates]
        above = [r["max"] - r["median"] for r in rates]
        left.bar(x, [r["median"] for r in rates], 0.95 * width, yerr=[below, above], label=NAMES[contender])
    left.set_xticks(range(len(as_they_come)), [f"{s['prompts']} prompts" for s in as_they_come])
    left.set_ylabel("triplets/s, scoring counted")
    left.margins(y=0.25)
    left.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
    start = [0.0] * len(records)
    for stage in records[0]["seconds_of"] if records else []:
        seconds = [r["seconds_of"][stage] for r in records]
        right.barh(range(len(records)), seconds, left=start, label=stage)
        start = [a + b for a, b in zip(start, seconds, strict=True)]
    right.set_yticks(range(len(records)), [f"round {r['round']}" for r in records])
    right.invert_yaxis()
    right.set_xlabel("seconds")
    right.margins(x=0.3)
    right.legend(frameon=False, fontsize=8, loc="upper right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULTS / "throughput.png", dpi=130)


def _range(spread: dict, form: str) -> str:
    if spread["repeats"] == 1:
        return form.format(spread["median"])
    return f"{form.format(spread['median'])} ({form.format(spread['min'])} to {form.format(spread['max'])})"


def _table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


if __name__ == "__main__":
    main()
