"""What a run that is opened again finds damaged, and the round from which everything can be made again.

Damaged files and checkpoints are set aside and made again by the stages that made them, from what those had: the
policy of a round answers its prompts again, a policy is trained again on the round's responses and scores. The journal
then tells whether they became what they were; where not, all that followed from them is made again too.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from tpaw_jax import journal, pod, ring, triplets
from tpaw_jax.durable import Damaged
from tpaw_jax.journal import Journal
from tpaw_jax.ring import Ring


def set_damage_aside(opened: Journal, say: Callable[[str], None]) -> None:
    """Check all files and checkpoints of a run against its journal, and set aside what is not as it was written."""
    if opened.before:
        say(f"{opened.directory / 'journal.json'} is damaged or missing; the run goes on by the journal before it.")
    for name, what in journal.check(opened).items():
        say(f"{opened.directory / name}: {what}. {_what_follows(opened, name)}")
        journal.set_aside(opened, name)


def set_aside(directory: Path, damage: Damaged, say: Callable[[str], None]) -> None:
    """Set aside what was found damaged when it was read."""
    opened = journal.open_journal(directory)
    name = damage.path.absolute().relative_to(directory.absolute()).as_posix()
    say(f"{damage} {_what_follows(opened, name)}")
    journal.set_aside(opened, name)


def first_round(kept: Ring, say: Callable[[str], None]) -> int:
    """The round from which a run goes on: that of the newest policy, or an earlier one where something is lost.

    From an earlier round only what is missing is made again, of all that the round after the newest policy's needs.
    Where the ring no longer holds what that takes, the run begins again with theta_0.
    """
    newest = max(kept.policies, default=0)
    for start in sorted({*kept.policies, 0}, reverse=True):
        if _playable(kept, start, newest):
            if start < newest:
                say(f"The run makes again what is lost, from round {start} on.")
            return start
    say("What is lost can no longer be made from what the ring holds: the run begins again with theta_0.")
    for name in list(kept.journal.facts):
        journal.forget(kept.journal, name)
    for path in (kept.directory / "policies").iterdir() if pod.writes() else ():
        shutil.rmtree(path.rename(path.with_name(path.name + ".removed")))
    pod.meet("the run begins again")
    return 0


def _playable(kept: Ring, start: int, newest: int) -> bool:
    """Whether all rounds from `start` to the one after the newest policy's find their players and opponents."""
    opened, n_max = kept.journal, kept.n_max
    have = {*kept.policies, start}
    for t in range(start, newest + 2):
        if t > newest - n_max or t == start:  # an older one that is made again does not stay
            have.add(t)
        window = ring.players(kept, t)
        answers = [f"{triplets.round_name(r)}/generations.npz" for r in window if r < start]
        if not all(map(opened.whole, answers)):
            return False
        for player in window:
            scored = [f"{triplets.round_name(r)}/scores_of_player_{player:04d}.npz" for r in window if r >= player]
            if player not in have and not all(map(opened.whole, scored)):
                return False
    return True


def _what_follows(opened: Journal, name: str) -> str:
    facts = opened.facts.get(name)
    if facts is None or facts["stage"] == "summary":
        return "It is set aside."
    return f"It is set aside; where round {max(facts['round'], 0)} or a later one needs it, it is made again."
