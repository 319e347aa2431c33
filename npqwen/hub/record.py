"""Where a conversion in the cache came from, when it was last used, and whether a newer one replaces it.

Each conversion holds the file `NAME`, a JSON object that `used` writes. Its modification time is the time of the last
use. A conversion without a readable record still works: the next use writes it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from npqwen.atomic_file import new_file
from npqwen.errors import CheckpointError, OutputError
from npqwen.format.config import read_json
from npqwen.format.quantization import is_converted, read_bits

NAME = "npqwen-source.json"
_VERSION = 1


@dataclass(frozen=True)
class Record:
    """What a conversion in the cache was made from."""

    model: str
    """The hub id, or the absolute path of the checkpoint directory."""
    revisions: Mapping[str, str] = field(default_factory=dict)
    """The branches, tags and commits on the hub that this conversion was last known to match, with their commit hashes.
    "main" is the key of an id without a revision. Empty for a local checkpoint."""
    replaced: bool = False
    """Whether other conversions with the same bits have taken over all of its revisions, or match the local checkpoint:
    this one will not be used again, unless the checkpoint returns to its earlier state."""


def read(directory: Path) -> Record | None:
    """The record of a conversion; None if there is none or it is damaged."""
    try:
        raw = read_json(directory / NAME)
    except CheckpointError:
        return None
    model, revisions, replaced = raw.get("model"), raw.get("revisions"), raw.get("replaced")
    if raw.get("record_version") != _VERSION or not isinstance(model, str) or not isinstance(replaced, bool):
        return None
    if not isinstance(revisions, dict) or not all(isinstance(commit, str) for commit in revisions.values()):
        return None
    return Record(model, revisions, replaced)


def last_used(directory: Path) -> float:
    """When a conversion was last used, or else made: seconds since the epoch. OSError if it is gone."""
    try:
        return (directory / NAME).stat().st_mtime
    except FileNotFoundError:
        return directory.stat().st_mtime


def used(directory: Path, model: str, revision: str | None = None, commit: str | None = None) -> None:
    """Record that a conversion is used now, for this model.

    revision, commit: of a model on the hub. Other conversions of this model with the same bits lose the revision; those
    with none left, and other conversions of a local checkpoint, are marked as replaced. A cache that cannot be written
    stays unchanged.
    """
    with contextlib.suppress(OutputError, OSError):
        before = read(directory)
        known = before is not None and before.model == model and not before.replaced
        if known and before is not None and (revision is None or before.revisions.get(revision) == commit):
            touch(directory)
            return
        revisions = dict(before.revisions) if before is not None and before.model == model else {}
        if revision is not None and commit is not None:
            revisions[revision] = commit
        _write(directory, Record(model, revisions))
        for other, theirs in _others(directory, model):
            left = {name: commit for name, commit in theirs.revisions.items() if name != revision}
            changed = replace(theirs, revisions=left, replaced=not left)
            if changed != theirs:
                time = last_used(other)
                _write(other, changed)
                os.utime(other / NAME, (time, time))


def touch(directory: Path) -> None:
    """Record that a conversion is used now, whatever it was made from."""
    with contextlib.suppress(OSError):
        os.utime(directory / NAME)


def conversions(root: Path) -> Iterator[Path]:
    """All conversions in the cache directory `root`, by name."""
    for directory in sorted([*root.glob("hub/*/*"), *root.glob("local/*/*")]):
        if not directory.name.startswith(".") and is_converted(directory):
            yield directory


def local_models(root: Path, name: str) -> set[str]:
    """The models of this name, in any case, that are on this machine and have conversions in the cache `root`."""
    folders = [folder for folder in root.glob("local/*") if folder.name.lower() == name.lower()]
    known = [read(path) for folder in folders for path in folder.glob("[!.]*") if is_converted(path)]
    return {one.model for one in known if one is not None}


def _others(directory: Path, model: str) -> Iterator[tuple[Path, Record]]:
    """The other conversions of a model with the same bits that have a record."""
    bits = read_bits(directory)
    for other in sorted(directory.parent.iterdir()):
        if other != directory and not other.name.startswith("."):
            record = read(other)
            if record is not None and record.model == model and read_bits(other) == bits:
                yield other, record


def _write(directory: Path, record: Record) -> None:
    with new_file(directory / NAME) as file:
        file.write((json.dumps({"record_version": _VERSION} | asdict(record), indent=2) + "\n").encode())
