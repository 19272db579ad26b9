"""What a run that is opened again finds damaged, and the round from which everything can be made again.

Damaged files and checkpoints are set aside and made again by the stages that made them, from what those had: the
policy of a round answers its prompts again, a policy is trained again on the round's responses and scores. The journal
then tells whether they became what they were; where not, all that followed from them is made again too.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from tpaw_jax.config import ObjectiveConfig
from tpaw_jax.runtime import processes
from tpaw_jax.selfplay import triplets
from tpaw_jax.storage import journal, ring
from tpaw_jax.storage.files import CorruptedFile
from tpaw_jax.storage.journal import Journal
from tpaw_jax.storage.ring import Ring


def quarantine_corruption(opened: Journal, say: Callable[[str], None]) -> None:
    """Check all files and checkpoints of a run against its journal, and set aside what is not as it was written."""
    if opened.found:
        say(f"{opened.directory / 'journal.json'} is damaged or missing; the run goes on by {opened.found}.")
    for name, what in journal.check(opened).items():
        say(f"{opened.directory / name}: {what}. {_what_follows(opened, name)}")
        journal.quarantine(opened, name)


def quarantine(directory: Path, damage: CorruptedFile, say: Callable[[str], None]) -> None:
    """Set aside what was found damaged when it was read; without it where it is a player that the ring no longer has,
    so that the run begins again.
    """
    opened = journal.open_journal(directory)
    name = damage.path.absolute().relative_to(directory.absolute()).as_posix()
    processes.barrier("the journal is read")
    if damage.path.exists() or name in opened.facts:
        say(f"{damage} {_what_follows(opened, name)}")
        journal.quarantine(opened, name)
    else:
        say(f"{damage} Without it the run cannot go on.")
        _begin_again(opened, say)


def first_round(kept: Ring, objective: ObjectiveConfig, say: Callable[[str], None]) -> int:
    """The round from which a run goes on: that of the newest policy, or an earlier one where something is lost.

    From an earlier round only what is missing is made again, of all that the round after the newest policy's needs.
    Where the ring no longer holds what that takes, the run begins again with theta_0.
    """
    newest = max(kept.policies, default=0)
    start = next((s for s in sorted({*kept.policies, 0}, reverse=True) if _playable(kept, objective, s, newest)), None)
    processes.barrier("the round to go on from is chosen")
    if start is None:
        _begin_again(kept.journal, say)
        return 0
    if start < newest:
        say(f"The run makes again what is lost, from round {start} on.")
    return start


def lost_policies(opened: Journal, first: int) -> list[int]:
    """The rounds from `first` on whose policies are lost and not made again yet."""
    lost = [facts for facts in opened.facts.values() if facts["stage"] == "policy" and facts.get("lost")]
    return [facts["round"] + 1 for facts in lost if facts["round"] + 1 > first]


def _begin_again(opened: Journal, say: Callable[[str], None]) -> None:
    """Remove all policies, training states and rounds."""
    say("What is lost can no longer be made from what the ring holds: the run begins again with theta_0.")
    if processes.is_main():
        for path in [*opened.directory.glob("ring/*/[0-9]*")]:
            shutil.rmtree(path.rename(path.with_name(path.name + ".removed")))
        for name in opened.facts:
            (opened.directory / name).unlink(missing_ok=True)
        journal.remove_sampled(opened, 0)
    opened.facts.clear()
    journal.save(opened)
    processes.barrier("the run begins again")


def _playable(kept: Ring, objective: ObjectiveConfig, start: int, newest: int) -> bool:
    """Whether all rounds from `start` to the one after the newest policy's find their players and opponents."""
    complete, policies = kept.journal.is_complete, set(kept.policies)
    have = policies | {t for t in (start,) if t > newest - kept.n_max}  # an older one that is made again does not stay
    for t in range(start, newest + 2):
        answers = f"{triplets.round_name(t)}/generations.npz"
        if t + 1 in policies:  # of a finished round only its responses can be missing
            if not complete(answers) and t not in have | {start}:
                return False
            continue
        window = objective.opponents(t)
        if not all(complete(f"{triplets.round_name(r)}/generations.npz") for r in window if r < start):
            return False
        for player in ring.players(kept, t):
            scored = [f"{triplets.round_name(r)}/scores_of_player_{player:04d}.npz" for r in window if r >= player]
            if player not in have | {t} and not all(map(complete, scored)):
                return False
        if t + 1 > newest - kept.n_max:
            have.add(t + 1)
    return start == 0 or start in policies


def _what_follows(opened: Journal, name: str) -> str:
    facts = opened.facts.get(name)
    if facts is None or facts["stage"] == "summary":
        return "It is set aside."
    return f"It is set aside; where round {max(facts['round'], 0)} or a later one needs it, it is made again."
