"""The journal of a run: which stages of which rounds are finished, and the checksums by which their files are known.

`journal.json` is small and written whole; the one before it is kept beside it. A file counts as finished when the
journal has it. What is found to be damaged is set aside and stays in the journal as lost: when it is made again, the
journal tells whether it became what it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from tpaw_jax.runtime import processes
from tpaw_jax.storage import files

STAGES = ("sampling", "scoring", "training", "summary", "policy")
"""Of a round, in their order."""

_VERSION = 1


class RegeneratedDifferently(Exception):
    """Something that was lost was made again and came out otherwise: what followed from it is to be made again too."""


@dataclasses.dataclass
class Journal:
    """The facts of a run by the names of its files and checkpoints, relative to its directory.

    Facts of each: `round`, `stage`, `bytes`, `sha256` of a file, `files` of a checkpoint, `same`, which is equal where
    what was made again is the same; `lost`, and `begun` of a checkpoint that may not be whole yet.
    """

    directory: Path
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: str = ""  # the fingerprint of prompts and targets
    facts: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    reading: bool = False  # of a run that another process may be playing: nothing is written
    found: str = ""  # the file it was read from where journal.json was damaged or missing

    def is_complete(self, name: str) -> bool:
        """Whether something is finished and was not found damaged."""
        facts = self.facts.get(name, {"lost": True})
        return not facts.get("lost") and not facts.get("begun")

    def names(self, stage: str) -> list[str]:
        """What a stage has left that is whole, in order of rounds."""
        of_stage = [name for name, f in self.facts.items() if f["stage"] == stage and self.is_complete(name)]
        return sorted(of_stage, key=lambda name: (self.facts[name]["round"], name))


def open_journal(directory: Path, reading: bool = False) -> Journal:
    """The journal of a run directory, new where there is no run yet; with `reading` it stays as it is on disk.

    Raises:
        ValueError: a run is there and no whole journal of it.
    """
    paths = [directory / "journal.json", directory / "journal.before.json"]
    between = files.partial_path(paths[0])  # where a kill came between the two renames of `save`
    for path in [between, *paths] if between.exists() and not paths[0].exists() else paths:
        content = _checked(path)
        if content is not None:
            found = "" if path == paths[0] else path.name
            return Journal(directory, content["config"], content["data"], content["facts"], reading, found)
    if any(path.exists() for path in paths) or any((directory / "ring" / "policies").glob("[0-9]*")):
        raise ValueError(
            f"{directory}: a run is there, but {paths[0].name} is missing or damaged, and {paths[1].name} too: nothing "
            "tells which of its files are whole. Put one of them back, or choose another directory."
        )
    return Journal(directory, reading=reading)


def save(journal: Journal) -> None:
    """Write the journal, by the process that writes; the one before stays beside it."""
    if journal.reading or not processes.is_main():
        return
    content = {"version": _VERSION, "config": journal.config, "data": journal.data, "facts": journal.facts}
    path = journal.directory / "journal.json"
    text = json.dumps({"checksum": _checksum(content), **content}, indent=1) + "\n"
    files.write_partial(path, text.encode())
    with files.explain_os_errors(path):
        if _checked(path) is not None:
            os.replace(path, path.with_name("journal.before.json"))
        os.replace(files.partial_path(path), path)


def write(journal: Journal, name: str, stage: str, round_number: int, content: bytes, same: str | None = None) -> None:
    """A file of a stage, known to the journal before it is at its place, so that it is never there unknown.

    Raises:
        RegeneratedDifferently: it was lost before and `same` is not what it was.
    """
    path = journal.directory / name
    if processes.is_main():
        files.write_partial(path, content)
    facts = {"round": round_number, "stage": stage, "bytes": len(content), "sha256": _sha256(content), "same": same}
    later = record(journal, name, facts)
    if processes.is_main():
        with files.explain_os_errors(path):
            os.replace(files.partial_path(path), path)
    raise_if_different(journal, name, later)


def record(journal: Journal, name: str, facts: dict[str, Any]) -> list[str] | None:
    """Put something finished into the journal. Where it was lost before and is not what it was, all that was made after
    it is removed, and its names are returned; `raise_if_different` is to follow.
    """
    before, later = journal.facts.get(name, {}), None
    if before.get("lost") and before.get("same") not in (None, facts["same"]):
        later = _remove_after(journal, name)
    journal.facts[name] = facts
    save(journal)
    return later


def raise_if_different(journal: Journal, name: str, later: list[str] | None) -> None:
    """Tell that something came out otherwise, if it did.

    Raises:
        RegeneratedDifferently: it did; the run is to be opened again.
    """
    if later is not None:
        raise RegeneratedDifferently(
            f"{journal.directory / name} was lost, and made again it is not what it was, as on another machine; "
            f"what was made after it is made again: {', '.join(sorted(later)) or 'nothing was'}."
        )


def begin(journal: Journal, name: str, stage: str, round_number: int) -> None:
    """Put a checkpoint that is about to be written into the journal, so that it is never there unknown."""
    journal.facts[name] = {**journal.facts.get(name, {}), "round": round_number, "stage": stage, "begun": True}
    save(journal)


def forget(journal: Journal, name: str) -> None:
    """Take something out of the journal that is to be removed, before it is."""
    if journal.facts.pop(name, None) is not None:
        save(journal)


def check(journal: Journal) -> dict[str, str]:
    """What is not as the journal has it, and what is wrong with it, as the process that writes finds it.

    A file that a kill left beside its place is put there. Of checkpoints, files and bytes are counted; their values are
    checked when they are read (see `ring`).
    """
    found = {}
    for name, facts in journal.facts.items() if processes.is_main() else ():
        path = journal.directory / name
        if facts.get("lost") and not facts.get("begun") and path.exists():
            found[name] = "it was found damaged before, and a kill left it where it was"
        if not journal.is_complete(name):
            continue
        what = _checkpoint_fault(path, facts) if "files" in facts else _file_fault(path, facts)
        aside = files.partial_path(path)
        if what and not journal.reading and aside.exists() and not _file_fault(aside, facts):
            os.replace(aside, path)  # a kill came before it was renamed
            continue
        if what:
            found[name] = what
    stated = processes.all_gather(found=np.frombuffer(json.dumps(found).encode(), np.uint8))[0]
    return json.loads(stated["found"].tobytes())


def quarantine(journal: Journal, name: str) -> None:
    """Move something damaged out of the way and count it as lost."""
    if name in journal.facts:
        journal.facts[name]["lost"] = True
    save(journal)
    path = journal.directory / name
    if processes.is_main() and path.exists():
        aside, number = path.with_name(path.name + ".damaged"), 1
        while aside.exists():
            aside, number = path.with_name(f"{path.name}.damaged{number}"), number + 1
        path.rename(aside)
    processes.barrier("what is damaged is set aside")


def _remove_after(journal: Journal, name: str) -> list[str]:
    """Remove all that was made after something, responses that are being sampled among it; not yet from the disk's
    journal, so that a kill meanwhile leaves something lost that is found to have changed again. The newest goes first:
    what a kill leaves is then a run of fewer rounds.
    """
    later = [other for other in journal.facts if _order(journal, other) > _order(journal, name)]
    later.sort(key=lambda other: _order(journal, other), reverse=True)
    for other in later:
        del journal.facts[other]
    processes.barrier("what was made after it is known")
    if processes.is_main():
        for other in later:
            path = journal.directory / other
            if path.is_dir():  # a file that the journal does not have is not read
                path.rename(path.with_name(path.name + ".removed"))
            else:
                path.unlink(missing_ok=True)
        remove_sampled(journal, journal.facts[name]["round"] + 1)
    processes.barrier("what was made after it is removed")
    return later


def remove_sampled(journal: Journal, first: int) -> None:
    """Remove the responses of unfinished rounds from `first` on."""
    for path in journal.directory.glob("round_*/sampled_*.jsonl"):
        if int(path.parent.name.removeprefix("round_")) >= first:
            path.unlink()


def _order(journal: Journal, name: str) -> tuple[int, int]:
    facts = journal.facts[name]
    return facts["round"], STAGES.index(facts["stage"])


def _file_fault(path: Path, facts: dict[str, Any]) -> str:
    if not path.exists():
        return "it is missing"
    if path.stat().st_size != facts["bytes"]:
        return f"it has {path.stat().st_size} bytes where {facts['bytes']} were written"
    return "" if _sha256(path.read_bytes()) == facts["sha256"] else "its checksum is not that of what was written"


def _checkpoint_fault(path: Path, facts: dict[str, Any]) -> str:
    if not path.exists():
        return "it is missing"
    files, size = measure(path)
    if (files, size) != (facts["files"], facts["bytes"]):
        return f"it has {size} bytes in {files} files where {facts['bytes']} in {facts['files']} were written"
    return ""


def measure(checkpoint: Path) -> tuple[int, int]:
    """Files and bytes of a checkpoint."""
    sizes = [path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()]
    return len(sizes), sum(sizes)


def _checked(path: Path) -> dict[str, Any] | None:
    """The content of a journal that is whole and of this version."""
    try:
        content = files.parse_json(path.read_bytes(), path)
        checksum = content.pop("checksum")
        return content if checksum == _checksum(content) and content["version"] == _VERSION else None
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None


def _checksum(content: dict[str, Any]) -> str:
    return _sha256(json.dumps(content, sort_keys=True).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
