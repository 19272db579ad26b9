"""Warnings of divergence, computed from the summary of a round."""

import math
from collections.abc import Mapping
from typing import Any

MIN_RESPONSE_TOKENS = 2.0
"""Mean response length, end-of-turn token included, at or below which the policy has stopped answering."""

MAX_TRUNCATED = 0.9
"""Share of responses truncated at `sampling.max_new_tokens` from which the policy has stopped ending them."""

MAX_HELD_OUT_DROP = 1.0
"""Nats per token that the held-out log-prob may fall in a round before the policy counts as forgetting."""

MAX_SAMPLER_GAP = 0.3
"""Nats per token between the sampler's and the scorer's log-probs that rounding can no longer explain."""


class Diverged(ValueError):
    """A strict run has stopped at a sign of divergence."""


def warnings(summary: Mapping[str, Any], prompts: int, longest: int) -> list[str]:
    """Sentences on what is wrong with a round of `prompts` prompts and responses of at most `longest` tokens."""
    sentences = []
    say = lambda sentence: sentences.append(f"Round {summary['round']}: {sentence}")
    if summary["response tokens"] <= MIN_RESPONSE_TOKENS:
        say(f"responses have {summary['response tokens']:.1f} tokens on average: the policy has stopped answering.")
    elif summary["at limit"] >= MAX_TRUNCATED:
        say(
            f"{summary['at limit']:.0%} of the responses were truncated at {longest} tokens: sampling.max_new_tokens "
            "is too low, or the policy has stopped ending its responses."
        )
    if (summary.get("sampler gap") or 0) > MAX_SAMPLER_GAP:
        say(
            f"the sampler's log-probs are {summary['sampler gap']:.2g} nats per token away from the scorer's: the "
            "responses come from another policy, other settings or another template, or the sampler has a bug."
        )
    if summary["echoes"] == prompts:
        say("every response equals its target: there is nothing left to learn.")
    elif summary["margin"] < 0:
        say(f"the mean margin is {summary['margin']:.3g}: the policy now prefers its own responses to the targets.")
    return training_warnings(summary) + sentences


def training_warnings(summary: Mapping[str, Any]) -> list[str]:
    """Sentences on what is wrong with the training of a round, self-play or supervised."""
    sentences = []
    say = lambda sentence: sentences.append(f"Round {summary['round']}: {sentence}")
    if not math.isfinite(summary["loss"]):
        say(f"the mean loss of the last epoch is {summary['loss']}.")
    if summary["skipped"]:
        say(f"{summary['skipped']} of {summary['steps']} steps were skipped: the loss or gradient was not finite.")
    before, after = summary["held-out before"], summary["held-out after"]
    if before is not None and after is not None and not after > before - MAX_HELD_OUT_DROP:
        say(f"the held-out log-prob fell from {before:.3g} to {after:.3g} nats per token; lower the learning rate.")
    return sentences
