"""The conversions in the cache: which models they are, when they were last used, and which will not be used again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from npqwen.errors import CheckpointError, FormatError
from npqwen.format.quantization import FORMAT_VERSION, Quantization, read_bits
from npqwen.format.recipe import RECIPES
from npqwen.hub import record

_NAME = re.compile(r"(?P<weights>[0-9a-f]{12})(?P<files>-[0-9a-f]{8})?-(?P<recipe>\w+)-v(?P<version>\d+)", re.ASCII)
"""The name of a conversion's directory. It has no digest of the small files if a version without records made it."""


@dataclass(frozen=True)
class Conversion:
    """A converted model in the cache."""

    path: Path
    model: str
    """The hub id, or the path of the checkpoint; of a conversion without a record, the name of its directory."""
    revisions: Mapping[str, str]
    """The branches, tags and commits on the hub that it matches, with their commit hashes."""
    bits: int | None
    """None if its config.json does not name them."""
    calibrated: bool
    last_used: float
    """Seconds since the epoch."""
    stale: str | None
    """Why it will not be used again, as a clause; None if it may be."""


def conversions(root: Path) -> list[Conversion]:
    """All conversions in a cache directory, by model and bits. Those that are removed meanwhile are left out."""
    found = []
    for path in record.conversions(root):
        try:
            found.append(_conversion(path))
        except FileNotFoundError:  # removed meanwhile
            continue
    return sorted(found, key=lambda one: (one.model.lower(), one.bits or 0, -one.last_used))


def staleness(path: Path) -> str | None:
    """Why a conversion will not be used again, as a clause; None if it may be."""
    name = _NAME.fullmatch(path.name)
    if name is not None and int(name["version"]) < FORMAT_VERSION:
        return f"of format version {name['version']}; this npqwen reads {FORMAT_VERSION}"
    known = record.read(path)
    if known is None:
        return "an earlier version of npqwen made it" if name is not None and name["files"] is None else None
    if known.replaced:
        return "a newer conversion has replaced it"
    if path.parent.parent.name == "local" and not Path(known.model).exists() and Path(known.model).parent.is_dir():
        return "its checkpoint is gone"
    return None


def _conversion(path: Path) -> Conversion:
    known = record.read(path)
    bits = read_bits(path)
    try:
        calibrated = Quantization.from_directory(path).calibration is not None
    except (FormatError, CheckpointError):
        calibrated = False
    return Conversion(
        path=path,
        model=_model(path) if known is None else known.model,
        revisions={} if known is None else dict(known.revisions),
        bits=bits if isinstance(bits, int) and bits in RECIPES else None,
        calibrated=calibrated,
        last_used=record.last_used(path),
        stale=staleness(path),
    )


def _model(path: Path) -> str:
    """The model of a conversion without a record: hub/owner--name, or local/name."""
    name = path.parent.name
    return name.replace("--", "/", 1) if path.parent.parent.name == "hub" else name
