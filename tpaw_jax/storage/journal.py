"""The journal of a run: which stages of which rounds are finished, and the checksums of their files.

`journal.json` is replaced atomically; the version before it stays as `journal.before.json`. In a bucket, it is replaced
only if no other process has replaced it since it was read. A file counts as finished only if the journal lists it. A
corrupted file is renamed to `*.damaged` and stays in the journal as lost, so that the run can tell whether the
regenerated file is identical.
"""

import dataclasses
import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tpaw_jax.runtime import processes
from tpaw_jax.storage import array_files, bucket, files

STAGES = ("sampling", "scoring", "training", "summary", "policy")
"""The stages of a round, in order."""

_VERSION = 1


class TakenOver(ValueError):
    """Another process has replaced the journal since this one read it."""

    passes = True  # the run goes on, elsewhere or later


class RegeneratedDifferently(Exception):
    """A lost file or checkpoint was regenerated with another result, so everything derived from it was removed."""


@dataclasses.dataclass
class Journal:
    """The facts about a run's files and checkpoints, keyed by path relative to the run's directory.

    Facts: `round`, `stage`, `bytes`; `sha256` for a file; `files`, their number, for a checkpoint; `same`, a
    fingerprint that is equal if the content is; `lost`, if found corrupted; `begun`, while a checkpoint may be
    incomplete.
    """

    directory: Path
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    data_fingerprint: str = ""  # of prompts and targets
    facts: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    base: str = ""  # fingerprint of the frozen parameters that the ring does not hold
    whole_batches: bool = False  # steps have whole batches of rows, because the run began with version 0.1
    read_only: bool = False  # read-only, because another process may be running
    read_from: str = ""  # the file that was read instead, if journal.json was corrupted or missing
    generation: bucket.Generation = b""  # of journal.json, in a bucket
    writer: str = dataclasses.field(default_factory=lambda: secrets.token_hex(8))  # no two write the same text

    def is_complete(self, name: str) -> bool:
        """Whether a file or checkpoint is finished and was not found corrupted."""
        facts = self.facts.get(name, {"lost": True})
        return not facts.get("lost") and not facts.get("begun")

    def names(self, stage: str) -> list[str]:
        """The complete files or checkpoints of a stage, by round."""
        of_stage = [name for name, f in self.facts.items() if f["stage"] == stage and self.is_complete(name)]
        return sorted(of_stage, key=lambda name: (self.facts[name]["round"], name))


def open_journal(directory: Path, read_only: bool = False) -> Journal:
    """Read the journal of a run's directory, or start one if there is no run; with `read_only`, never write it.

    Raises:
        ValueError: the directory holds a run, but both of its journals are missing or corrupted.
    """
    paths = [directory / "journal.json", directory / "journal.before.json"]
    partial = files.partial_path(paths[0])  # all that a kill between the two renames of `save` leaves
    remote = bucket.is_remote(directory)
    text, generation = bucket.read(paths[0]) if remote else (None, b"")
    for path in [partial, *paths] if not remote and partial.exists() and not paths[0].exists() else paths:
        content = _content_of(text, path) if text is not None and path == paths[0] else _read(path)
        if content is not None:
            return Journal(
                directory,
                content["config"],
                content["data"],
                content["facts"],
                content.get("base", ""),
                whole_batches=content.get("whole_batches", True),
                read_only=read_only,
                read_from="" if path == paths[0] else path.name,
                generation=generation,
            )
    if any(path.exists() for path in paths) or any((directory / "ring" / "policies").glob("[0-9]*")):
        raise ValueError(
            f"{directory}: this directory holds a run, but its {paths[0].name} and {paths[1].name} are missing or "
            "damaged, so the run cannot tell which of its files are complete. Restore one of the two from a backup, or "
            "choose another directory."
        )
    return Journal(directory, read_only=read_only, generation=generation)


def save(journal: Journal) -> None:
    """Write the journal, on process 0 only, and keep the version before it.

    Raises:
        TakenOver: another process has written it.
    """
    if journal.read_only or not processes.is_main():
        return
    content = {
        "version": _VERSION,
        "config": journal.config,
        "data": journal.data_fingerprint,
        **({"base": journal.base} if journal.base else {}),
        "whole_batches": journal.whole_batches,
        "facts": journal.facts,
        **({"writer": journal.writer} if bucket.is_remote(journal.directory) else {}),
    }
    path = journal.directory / "journal.json"
    text = json.dumps({"checksum": _checksum(content), **content}, indent=1) + "\n"
    if bucket.is_remote(path):
        _replace(journal, path, text.encode())
        return
    files.write_partial(path, text.encode())
    with files.explain_errors(path):
        if _read(path) is not None:
            os.replace(path, path.with_name("journal.before.json"))
        os.replace(files.partial_path(path), path)


def write(
    journal: Journal,
    name: str,
    stage: str,
    round_number: int,
    content: bytes | Mapping[str, np.ndarray],
    same: str | None = None,
) -> None:
    """Write a file of a stage: bytes, or the arrays of an .npz file. Only process 0's `content` and `same` matter.

    The journal lists the file before it appears under its final name.

    Raises:
        RegeneratedDifferently: the file had been lost, and `same` differs from the lost one's.
    """
    path = journal.directory / name
    facts: dict[str, Any] = {"round": round_number, "stage": stage}
    if processes.is_main():
        check_owner(journal)
        if isinstance(content, Mapping):
            size, checksum = array_files.write_partial(path, **content)
        else:
            files.write_partial(path, content)
            size, checksum = len(content), _sha256(content)
        facts |= {"bytes": size, "sha256": checksum, "same": same}
    removed = record(journal, name, processes.of_main(facts))
    if processes.is_main():
        files.finish_partial(path)
    raise_if_different(journal, name, removed)


def record(journal: Journal, name: str, facts: dict[str, Any]) -> list[str] | None:
    """Add a finished file or checkpoint to the journal.

    If it replaces a lost one and differs from it, remove everything made after it and return the names of what was
    removed. Pass the result to `raise_if_different` once the file is in place.
    """
    before, removed = journal.facts.get(name, {}), None
    if before.get("lost") and before.get("same") not in (None, facts["same"]):
        removed = _remove_after(journal, name)
    journal.facts[name] = facts
    save(journal)
    return removed


def raise_if_different(journal: Journal, name: str, removed: list[str] | None) -> None:
    """Raise if `record` removed what depended on a lost file.

    Raises:
        RegeneratedDifferently: it did; the run must be opened again.
    """
    if removed is not None:
        raise RegeneratedDifferently(
            f"{journal.directory / name} was lost, and the regenerated one differs from it, as happens on another kind "
            "of machine. Everything made after it was removed and will be regenerated: "
            f"{', '.join(sorted(removed)) or 'there was nothing'}."
        )


def begin(journal: Journal, name: str, stage: str, round_number: int) -> None:
    """Add a checkpoint to the journal before it is written, so that none is ever on disk unlisted."""
    journal.facts[name] = {**journal.facts.get(name, {}), "round": round_number, "stage": stage, "begun": True}
    save(journal)


def forget(journal: Journal, name: str) -> None:
    """Drop a file or checkpoint from the journal before it is removed from disk."""
    if journal.facts.pop(name, None) is not None:
        save(journal)


def check(journal: Journal) -> dict[str, str]:
    """Compare the files on disk with the journal; return what is wrong by name, the same on every process.

    A finished file that a kill left under its partial name is renamed. Checkpoints are checked by the number of their
    files and bytes; their values are checked when they are read (see `ring`).
    """
    faults = {}
    for name, facts in journal.facts.items() if processes.is_main() else ():
        path = journal.directory / name
        if facts.get("lost") and not facts.get("begun") and path.exists():
            faults[name] = "it was found damaged before, but a kill came before it was renamed"
        if not journal.is_complete(name):
            continue
        fault = _checkpoint_fault(path, facts) if "files" in facts else _file_fault(path, facts)
        partial = files.partial_path(path)
        if fault and not journal.read_only and partial.exists() and not _file_fault(partial, facts):
            files.finish_partial(path)
        elif fault:
            faults[name] = fault
    return processes.of_main(faults)


def quarantine(journal: Journal, name: str) -> None:
    """Mark a corrupted file or checkpoint as lost and rename it to `*.damaged`."""
    if name in journal.facts:
        journal.facts[name]["lost"] = True
    save(journal)
    path = journal.directory / name
    if processes.is_main() and path.exists():
        damaged, number = path.with_name(path.name + ".damaged"), 1
        while damaged.exists():
            damaged, number = path.with_name(f"{path.name}.damaged{number}"), number + 1
        files.move(path, damaged)
    processes.barrier("corrupted file renamed")


def remove_sampled(journal: Journal, first: int) -> None:
    """Remove the responses kept while sampling (`sampled_N.part`), from round `first` on."""
    for path in journal.directory.glob("round_*/sampled_*"):
        if int(path.parent.name.removeprefix("round_")) >= first:
            path.unlink(missing_ok=True)


def measure(checkpoint: Path) -> tuple[int, int]:
    """The number of files of a checkpoint, and their bytes."""
    if bucket.is_remote(checkpoint):
        sizes = [*bucket.sizes(checkpoint).values()]
    else:
        sizes = [path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()]
    return len(sizes), sum(sizes)


def _remove_after(journal: Journal, name: str) -> list[str]:
    """Remove everything made after a file or checkpoint, responses still being sampled included.

    The caller saves the journal afterwards: until then the file counts as lost on disk, so a kill here repeats the
    removal. The newest is removed first, so that a kill leaves a run of fewer rounds.
    """
    later = [other for other in journal.facts if _order(journal, other) > _order(journal, name)]
    later.sort(key=lambda other: _order(journal, other), reverse=True)
    for other in later:
        del journal.facts[other]
    processes.barrier("removal begins")
    if processes.is_main():
        check_owner(journal)
        for other in later:
            path = journal.directory / other
            if bucket.is_remote(path):
                path.unlink(missing_ok=True)
                bucket.remove_tree(path)
            elif path.is_dir():  # renamed only: no run reads what its journal does not list
                path.rename(path.with_name(path.name + ".removed"))
            else:
                path.unlink(missing_ok=True)
        remove_sampled(journal, journal.facts[name]["round"] + 1)
    processes.barrier("removal is done")
    return later


def _replace(journal: Journal, path: Path, content: bytes) -> None:
    before, _ = bucket.read(path)
    if before is not None and _content_of(before, path) is not None:
        files.replace(path.with_name("journal.before.json"), before)
    generation = bucket.replace(path, content, journal.generation)
    if generation is None:
        raise taken_over(journal.directory)
    journal.generation = generation


def check_owner(journal: Journal) -> None:
    """Check that no other process has replaced the journal in a bucket since this one read or wrote it.

    Raises:
        TakenOver: one has.
    """
    directory = journal.directory
    if bucket.is_remote(directory) and bucket.read(directory / "journal.json")[1] != journal.generation:
        raise taken_over(directory)


def taken_over(directory: Path) -> TakenOver:
    """The error of a process whose run another one has taken over."""
    return TakenOver(
        f"{directory}: another process writes here, so this one stops. The usual cause: this host was cut off from the "
        "bucket for so long that the other process took over the run."
    )


def _order(journal: Journal, name: str) -> tuple[int, int]:
    facts = journal.facts[name]
    return facts["round"], STAGES.index(facts["stage"])


def _file_fault(path: Path, facts: dict[str, Any]) -> str:
    if not path.exists():
        return "it is missing"
    if files.size(path) != facts["bytes"]:
        return f"it has {files.size(path)} bytes instead of {facts['bytes']}"
    return "" if files.sha256(path) == facts["sha256"] else "its checksum differs from the journal's"


def _checkpoint_fault(path: Path, facts: dict[str, Any]) -> str:
    if not path.exists():
        return "it is missing"
    count, size = measure(path)
    if (count, size) != (facts["files"], facts["bytes"]):
        return f"it has {size} bytes in {count} files instead of {facts['bytes']} bytes in {facts['files']} files"
    return ""


def _read(path: Path) -> dict[str, Any] | None:
    """The content of a journal file; None if it is missing, corrupted or of another version."""
    if bucket.is_remote(path):
        text, _ = bucket.read(path)
        return None if text is None else _content_of(text, path)
    try:
        return _content_of(path.read_bytes(), path)
    except OSError:
        return None


def _content_of(text: bytes, path: Path) -> dict[str, Any] | None:
    try:
        content = files.parse_json(text, path)
        checksum = content.pop("checksum")
        return content if checksum == _checksum(content) and content["version"] == _VERSION else None
    except (ValueError, KeyError, AttributeError, TypeError):
        return None


def _checksum(content: dict[str, Any]) -> str:
    return _sha256(json.dumps(content, sort_keys=True).encode())


def _sha256(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()
