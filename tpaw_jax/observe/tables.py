"""What a run prints: progress bars, and the table of rounds."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from tpaw_jax.runtime import processes

SUMMARY_ROWS: dict[str, tuple[tuple[str, str, bool], ...]] = {
    "data": (
        ("players", "players", True),
        ("triplets", "triplets", True),
        ("targets", "targets", True),
        ("target tokens", "target tokens", True),
        ("steps", "optimizer steps", True),
        ("response tokens", "mean response length, tokens", True),
        ("at limit", "truncated responses, %", False),
        ("echoes", "copies of target", True),
        ("fill", "row fill, %", False),
    ),
    "rewards": (
        ("loss", "loss", True),
        ("chosen", "rewards/chosen", True),
        ("rejected", "rewards/rejected", False),
        ("margin", "rewards/margins", True),
        ("accuracy", "rewards/accuracies", True),
        ("alpha=eta", "target upweighted, %", True),
        ("held-out before", "held-out log-prob, before", True),
        ("held-out after", "held-out log-prob, after", True),
    ),
    "health": (
        ("skipped", "skipped steps", False),
        ("P_t at step 0", "scoring noise", True),
        ("sampler gap", "sampler vs scorer, mean nats/token", False),
        ("largest gap", "sampler vs scorer, max nats/token", False),
    ),
    "cost": (
        ("TFLOP", "TFLOP", False),
        ("TFLOP in pairs", "TFLOP as padded pairs", False),
        ("saving", "FLOPs saved, x", True),
        ("GFLOP/s", "GFLOP/s", False),
        ("goodput", "goodput, %", False),
    ),
}
"""The rows of the table of rounds by group: (key of summary.json, label, whether it is one of the main metrics)."""


@contextlib.contextmanager
def progress(description: str, total: int, unit: str) -> Iterator[Any]:
    """A progress bar with rate and remaining time, for the main process and only on a terminal."""
    disable = None if processes.is_main() else True
    with tqdm(total=total, desc=description, unit=unit, disable=disable, leave=False, dynamic_ncols=True) as bar:
        yield bar


def round_table(summaries: Sequence[Mapping[str, Any]], verbose: bool = False) -> str:
    """The table of rounds: one column per round, one row per metric; all of them if `verbose`.

    Accuracies of tasks (`eval/...`) follow the rewards; the seconds of the stages (`... s`) follow the cost.
    """
    if not summaries:
        return "  (no finished round)"
    keys = dict.fromkeys(key for summary in summaries for key in summary)
    rows = [["round", *(str(summary["round"]) for summary in summaries)]]
    for group, listed in SUMMARY_ROWS.items():
        wanted = [(key, label) for key, label, main in listed if key in keys and (main or verbose)]
        if group == "rewards":
            wanted += [(key, key) for key in keys if key.startswith("eval/")]
        if group == "cost" and verbose:
            wanted += [(key, f"{key[:-2]}, seconds") for key in keys if key.endswith(" s")]
        rows += [[group]] if wanted else []
        for key, label in wanted:
            scale = 100 if label.endswith("%") else 1
            values = (summary.get(key) for summary in summaries)
            rows.append(["  " + label, *(_cell(v if v is None else scale * v) for v in values)])
    return aligned(rows)


def table(columns: Sequence[Mapping[str, Any]]) -> str:
    """One column per record, one row per field; numbers have four significant digits."""
    names = list(dict.fromkeys(name for column in columns for name in column))
    return aligned([[name, *(_cell(column.get(name)) for column in columns)] for name in names])


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells in aligned columns: the first to the left, the others to the right."""
    width = max(map(len, rows))
    padded = [[*row, *[""] * (width - len(row))] for row in rows]
    widths = [max(len(row[i]) for row in padded) for i in range(width)]
    cells = lambda row: (cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))
    return "\n".join(("  " + "  ".join([row[0].ljust(widths[0]), *cells(row)])).rstrip() for row in padded)


def named_values(title: str, values: Mapping[str, Any]) -> str:
    """A title and one line per value."""
    width = max(map(len, values))
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in values.items())])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
