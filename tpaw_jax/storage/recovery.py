"""Corrupted files of a run: quarantine them, so that their stage regenerates them from its inputs.

The policy of a round answers its prompts again; a policy is trained again on its round's responses and scores. The
journal then tells whether the result is identical. If it is not, everything computed from it is regenerated too.
"""

from collections.abc import Callable
from pathlib import Path

from tpaw_jax.runtime import processes
from tpaw_jax.storage import bucket, files, journal
from tpaw_jax.storage.files import CorruptedFile
from tpaw_jax.storage.journal import Journal


def quarantine_corruption(opened: Journal, say: Callable[[str], None]) -> None:
    """Check all files and checkpoints of a run against its journal, and rename the corrupted ones to `*.damaged`."""
    if opened.read_from:
        say(f"{opened.directory / 'journal.json'} is corrupted or missing; the run uses {opened.read_from} instead.")
    for name, fault in journal.check(opened).items():
        say(f"{opened.directory / name}: {fault}. {_consequence(opened, name)}")
        journal.quarantine(opened, name)


def quarantine(directory: Path, corrupted: CorruptedFile, say: Callable[[str], None]) -> None:
    """Rename a file that turned out corrupted when it was read, to `*.damaged`.

    If it is a player that the ring no longer has, nothing can regenerate it: the run starts over.
    """
    opened = journal.open_journal(directory)
    name = bucket.absolute(corrupted.path).relative_to(bucket.absolute(directory)).as_posix()
    processes.barrier("the journal is read")
    if corrupted.path.exists() or name in opened.facts:
        say(f"{corrupted} {_consequence(opened, name)}")
        journal.quarantine(opened, name)
    else:
        say(f"{corrupted} The run cannot continue without it.")
        start_over(opened, say)


def start_over(opened: Journal, say: Callable[[str], None]) -> None:
    """Remove all policies, training states and rounds."""
    say("The lost files cannot be regenerated from what the ring holds: the run starts over from theta_0.")
    if processes.is_main():
        journal.check_owner(opened)
        for path in [*opened.directory.glob("ring/*/[0-9]*")]:
            files.remove_tree(path)
        for name in opened.facts:
            (opened.directory / name).unlink(missing_ok=True)
        journal.remove_sampled(opened, 0)
    opened.facts.clear()
    journal.save(opened)
    processes.barrier("the run starts over")


def _consequence(opened: Journal, name: str) -> str:
    facts = opened.facts.get(name)
    if facts is None or facts["stage"] == "summary":
        return "It is renamed to *.damaged."
    return f"It is renamed to *.damaged, and regenerated if round {max(facts['round'], 0)} or a later one needs it."
