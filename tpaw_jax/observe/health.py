"""Signs that self-play goes wrong, read from a round's line of the table: sentences with the figure and the round."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

NOTHING_SAID = 2.0
"""Tokens of the mean response, its end counted, at or below which a policy has stopped answering."""

AT_LIMIT = 0.9
"""Share of responses cut at `sampling.max_new_tokens` from which a policy has stopped ending them."""

UNLEARNT = 1.0
"""Nats a token by which held-out targets become less likely in a round when it forgets what it was taught."""


ANOTHER_POLICY = 0.3
"""Nats a token between the log-probs of who answered and of the scorer, from which no rounding explains them."""


class Diverged(ValueError):
    """A run that was told to be strict has stopped; the message says what went wrong in which round."""


def warnings(summary: Mapping[str, Any], prompts: int, longest: int) -> list[str]:
    """What is wrong with a round of `prompts` prompts whose responses end at `longest` tokens."""
    found = []
    say = lambda sentence: found.append(f"Round {summary['round']}: {sentence}")
    if summary["response tokens"] <= NOTHING_SAID:
        say(f"responses have {summary['response tokens']:.1f} tokens on average: the policy has stopped answering.")
    elif summary["at limit"] >= AT_LIMIT:
        say(
            f"{summary['at limit']:.0%} of the responses were cut at sampling.max_new_tokens, {longest}: the limit is "
            "low, or the policy has stopped ending them."
        )
    if (summary.get("sampler gap") or 0) > ANOTHER_POLICY:
        say(
            f"the log-probs that came with the responses are {summary['sampler gap']:.2g} nats a token from the "
            "scorer's: another policy, other settings or another template gave them."
        )
    if summary["echoes"] == prompts:
        say("every response equals its target: there is nothing left to tell apart.")
    elif summary["margin"] < 0:
        say(f"the mean margin is {summary['margin']:.3g}: responses were made more likely than targets.")
    return of_training(summary) + found


def of_training(summary: Mapping[str, Any]) -> list[str]:
    """What is wrong with the training of a round, of self-play or supervised."""
    found = []
    say = lambda sentence: found.append(f"Round {summary['round']}: {sentence}")
    if not math.isfinite(summary["loss"]):
        say(f"the mean loss of the last epoch is {summary['loss']}.")
    if summary["skipped"]:
        say(f"{summary['skipped']} of {summary['steps']} steps were skipped, their loss or gradient was not finite.")
    before, after = summary["held-out before"], summary["held-out after"]
    if before is not None and after is not None and not after > before - UNLEARNT:
        say(f"held-out targets went from {before:.3g} to {after:.3g} nats a token: the learning rate may be too large.")
    return found
