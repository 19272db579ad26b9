"""`tpaw data`: what a configuration's data is, as a report and as coloured tokens, before anything is trained."""

import math
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tpaw_jax.data.dataset import DataReport
from tpaw_jax.data.templates import Template
from tpaw_jax.types import Prompts

BARS = " ▁▂▃▄▅▆▇█"
BINS = 24
"""Bars of a histogram of lengths."""

COLORS = {"prompt": ("\x1b[36m", "\x1b[34m"), "target": ("\x1b[32m", "\x1b[33m"), "end of turn": ("\x1b[7;35m",) * 2}
"""Terminal colours of a token; neighbours take turns."""
RESET = "\x1b[0m"
SKIPPED_SHOWN = 5


def report(prompts: Prompts, held_out: Prompts, found: DataReport, template: Template) -> str:
    """The data in numbers: records, what is cut or left out, and lengths in tokens."""
    count = len(prompts) + len(held_out)
    asked, answered, merged = set(), set(), 0  # hashes, since millions of texts would not fit into memory
    for some in (prompts, held_out):
        for x, y in zip(some.prompt_tokens, some.target_tokens, strict=True):
            asked.add(hash(x.tobytes()))
            answered.add(hash((x.tobytes(), y.tobytes())))
            merged += _merges(x, y, template)
    share = lambda n: f"{n} ({n / max(1, found.records):.1%})"
    rows = [
        ("records", found.records),
        ("prompts for training", len(prompts)),
        ("held-out prompts", len(held_out)),
        ("skipped records", len(found.skipped)),
        ("truncated prompts", found.prompts_cut),
        ("  that lost system turn or BOS", found.starts_cut),
        ("truncated targets", found.targets_cut),
        ("with turns behind the answer", share(found.turns_behind)),
        ("with tools", share(found.with_tools)),
        ("with reasoning in the answer", share(found.with_reasoning)),
        ("repeated prompts", count - len(asked)),
        ("repeated prompts with target", count - len(answered)),
        ("boundary within a token", merged),
    ]
    lines = [f"{name:32}{value}" for name, value in rows]
    lines += ["", f"{'tokens':10}{'min':>7}{'median':>8}{'95 %':>7}{'max':>7}{'total':>12}  from min to max"]
    for name in ("prompt", "target"):
        lengths = np.concatenate([getattr(some, f"{name}_tokens").lengths for some in (prompts, held_out)])
        low, middle, high, most = np.percentile(lengths, (0, 50, 95, 100)).astype(int)
        lines.append(f"{name:10}{low:7}{middle:8}{high:7}{most:7}{lengths.sum():12}  {_histogram(lengths)}")
    lines += [f"skipped: {sentence}" for sentence in found.skipped[:SKIPPED_SHOWN]]
    if len(found.skipped) > SKIPPED_SHOWN:
        lines.append(f"and {len(found.skipped) - SKIPPED_SHOWN} more")
    return "\n".join(lines)


def show(prompts: Prompts, number: int, template: Template, width: int, color: bool) -> str:
    """A prompt and its target, token by token, in lines of at most `width` columns."""
    prompt, target = prompts.prompt_tokens[number].tolist(), prompts.target_tokens[number].tolist()
    ended = target[-1:] == [template.end_of_turn]
    parts = [("prompt", prompt), ("target", target[:-1] if ended else target)]
    parts += [("end of turn", target[-1:])] if ended else []
    lines = [f"prompt {prompts.ids[number]}: {len(prompt)} prompt tokens, {len(target)} target tokens"]
    line, used = "", 0
    before: list[int] = []
    for part, ids in parts:
        pieces = list(_pieces(ids, before, template.tokenizer))
        before = ids
        pieces = pieces if color else [f"[{part}]", *pieces]
        for i, piece in enumerate(pieces):
            for j, text in enumerate(piece.replace("\n", "⏎\n").split("\n")):
                size = _columns(text)
                if j or (used and used + size > width):
                    lines.append(line)
                    line, used = "", 0
                line += f"{COLORS[part][i % 2]}{text}{RESET}" if color and text else text
                used += size
    return "\n".join([*lines, line])


def legend(color: bool) -> str:
    """What the colours of `show` mean."""
    names = [f"{COLORS[part][0]}{part}{RESET}" if color else f"[{part}]" for part in COLORS]
    return f"{', '.join(names)}; ⏎ is a newline" + ("; colours change from token to token" if color else "")


def _pieces(ids: Sequence[int], before: Sequence[int], tokenizer: Any) -> Iterator[str]:
    """The texts of tokens that follow those of `before`; tokens that share a character are one piece."""
    decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=False)
    last, start = list(before[-1:]), 0
    for end in range(1, len(ids) + 1):
        text = decode([*last, *ids[start:end]])[len(decode(last)) :]  # alone, some tokens lose their space
        if end == len(ids) or not text.endswith("\ufffd"):
            yield text
            last, start = [ids[end - 1]], end


def _merges(prompt: np.ndarray, target: np.ndarray, template: Template) -> bool:
    """Tell whether the text as a whole has a token that is partly in the prompt and partly in the target."""
    decode = lambda ids: template.tokenizer.decode(ids, skip_special_tokens=False)
    encode = lambda text: template.tokenizer.encode(text, add_special_tokens=False)
    ids = prompt.tolist()
    return encode(decode(ids) + decode(target))[: len(ids)] != ids == encode(decode(ids))


def _histogram(lengths: np.ndarray) -> str:
    counts = np.histogram(lengths, BINS)[0].tolist()
    return "".join(BARS[math.ceil(count / max(counts) * (len(BARS) - 1))] for count in counts)


def _columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
