"""The plan of a run: which rounds are left, and which stages of each, computed from the journal and the ring."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tpaw_jax.config import ObjectiveConfig
from tpaw_jax.runtime import processes
from tpaw_jax.selfplay import round_store
from tpaw_jax.selfplay.round_store import Store
from tpaw_jax.storage import recovery
from tpaw_jax.storage.journal import Journal
from tpaw_jax.storage.ring import Ring


class RoundPlan(NamedTuple):
    """The stages of a round that are left."""

    number: int
    generate: bool  # D_t is missing
    train: bool  # theta_(t+1) is missing


def rounds_to_play(
    kept: Ring, store: Store, first: int, rounds: int, generations: Path | None = None
) -> list[RoundPlan]:
    """The rounds from `first` on that lack a result; with `generations`, only the one round that this file is for.

    Raises:
        ValueError: `generations` is given, but an earlier round must be regenerated first.
    """
    last, policies = rounds, set(kept.policies)
    if generations is not None:
        lost = _lost_policies(kept.journal, first)
        if lost or first < max(policies):
            raise ValueError(
                f"{generations}: an earlier round was lost and must be regenerated before another engine's responses "
                f"can be used. Run the same command without --generations until round {max([*policies, *lost])} begins."
            )
        last = min(first + 1, last)
    plans = [RoundPlan(t, t not in store.generations, t + 1 not in policies) for t in range(first, last)]
    return [plan for plan in plans if plan.generate or plan.train]


def first_round(kept: Ring, objective: ObjectiveConfig, say: Callable[[str], None]) -> int:
    """The round at which a run resumes: that of the newest policy, or an earlier one if a needed file was lost.

    An earlier start regenerates only what is missing. If the ring no longer holds the policies for that, the run
    starts over from theta_0.
    """
    newest = max(kept.policies, default=0)
    candidates = sorted({*kept.policies, 0}, reverse=True)
    start = next((s for s in candidates if _can_start_at(kept, objective, s, newest)), None)
    processes.barrier("the first round is chosen")
    if start is None:
        recovery.start_over(kept.journal, say)
        return 0
    if start < newest:
        say(f"Files of earlier rounds were lost. The run regenerates them, starting at round {start}.")
    return start


def _can_start_at(kept: Ring, objective: ObjectiveConfig, start: int, newest: int) -> bool:
    """Whether the run can resume at `start`.

    For each round up to the one after the newest policy, the policies, responses and scores that it needs must exist or
    be regenerated before it.
    """
    complete, policies = kept.journal.is_complete, set(kept.policies)
    stays = lambda t: t > newest - kept.n_max  # an older policy leaves the ring as soon as it is regenerated
    available = policies | ({start} if stays(start) else set())
    for t in range(start, newest + 2):
        if t + 1 in policies:  # a finished round can miss only its responses
            if not complete(round_store.generations_name(t)) and t not in available | {start}:
                return False
            continue
        window = objective.opponents(t)
        if not all(complete(round_store.generations_name(r)) for r in window if r < start):
            return False
        for player in objective.players(t):
            scored = all(complete(round_store.scores_name(r, player)) for r in window if r >= player)
            if player not in available | {t} and not scored:
                return False
        if stays(t + 1):
            available.add(t + 1)
    return True


def _lost_policies(opened: Journal, first: int) -> list[int]:
    """The rounds from `first` on whose policies were lost and have not been regenerated."""
    lost = [facts for facts in opened.facts.values() if facts["stage"] == "policy" and facts.get("lost")]
    return [facts["round"] + 1 for facts in lost if facts["round"] + 1 > first]
