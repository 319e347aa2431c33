"""The disk space that a model needs, checked before it is downloaded."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from npqwen.errors import OutputError
from npqwen.format.config import Config
from npqwen.format.recipe import Recipe
from npqwen.wording import size

_RESERVE = 1 << 26
"""Bytes that stay free: headers, small files, and what other programs write meanwhile."""
_TIMES = 16
"""A conversion that seems larger than this many times the weights comes from an impossible config.json."""


def converted_bytes(config: Config, recipe: Recipe, weights: int) -> int | None:
    """Bytes that a model's tensors will take; None for a config.json that cannot belong to `weights` bytes."""
    from npqwen_quant.plan import planned

    total = 0
    for tensor in planned(config, recipe):
        total += tensor.nbytes
        if total > _TIMES * weights + _RESERVE:
            return None
    return total


def check_disk_space(label: str, needs: Mapping[Path, tuple[str, int]], advice: str) -> None:
    """Raise OutputError unless the disks have room.

    needs: for each directory, which may not exist yet, a phrase that says what goes there, and its bytes. advice: a
    clause that says what else the user can do.
    """
    disks: dict[int, list[Path]] = {}
    for place in needs:
        disks.setdefault(_existing(place).stat().st_dev, []).append(place)
    for places in disks.values():
        needed = sum(needs[place][1] for place in places)
        free = free_bytes(places[0])
        if needed and needed + _RESERVE > free:
            parts = " and ".join(f"{size(needs[place][1])} {needs[place][0]}" for place in places if needs[place][1])
            where = " and ".join(str(place) for place in places if needs[place][1])
            raise OutputError(f"{label} needs {parts}, but only {size(free)} are free in {where}; {advice}")


def free_bytes(place: Path) -> int:
    """Bytes free on the disk of a directory that may not exist yet."""
    return shutil.disk_usage(_existing(place)).free


def _existing(place: Path) -> Path:
    return next(parent for parent in (place, *place.absolute().parents) if parent.exists())
