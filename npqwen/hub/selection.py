"""Which conversions and downloads a user means by a model's name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from npqwen.checks import choice, near_names
from npqwen.errors import ModelNotFoundError, NpqwenError, quoted
from npqwen.hub.downloads import Download
from npqwen.hub.inventory import Conversion
from npqwen.hub.names import parse


def select(
    model: str, conversions: Sequence[Conversion], downloads: Sequence[Download]
) -> tuple[list[Conversion], list[Download]]:
    """The conversions and downloads of a model.

    model: its id, with or without the owner and in any case; "id@revision"; the path of its checkpoint; or the path of
    one conversion. Raises ModelNotFoundError, with names that come near, if there is none of it.
    """
    by_path = [one for one in conversions if _same_path(model, one.path) or _same_path(model, Path(one.model))]
    if by_path:
        return by_path, []
    wanted, revision = _parsed(model)
    known = {one.model for one in conversions} | {one.model for one in downloads}
    names = _matching(wanted, known)
    chosen = [one for one in conversions if one.model in names and (not revision or _has(one, revision))]
    fetched = [one for one in downloads if one.model in names and not revision]
    if not chosen and not fetched:
        near = near_names(wanted, known) or near_names(wanted.rpartition("/")[2], _tails(known))
        there = f"did you mean {choice([_tails(known).get(one, one) for one in near])}?" if near else "see npqwen list"
        raise ModelNotFoundError(f"no model {quoted(model)} is in the cache; {there}")
    return chosen, fetched


def _parsed(model: str) -> tuple[str, str | None]:
    """Name and revision."""
    try:
        name = parse(model)
    except NpqwenError:  # only a part of a name, perhaps
        wanted, _, revision = model.partition("@")
        return wanted, revision or None
    return name.repository, name.revision


def _matching(wanted: str, known: Iterable[str]) -> set[str]:
    """The known names that are `wanted`, in any case; else those whose last part it is."""
    wanted = wanted.lower()
    whole = {name for name in known if wanted == name.lower()}
    return whole or {name for name in known if wanted.rpartition("/")[2] == name.lower().rpartition("/")[2]}


def _tails(known: Iterable[str]) -> dict[str, str]:
    return {name.rpartition("/")[2]: name for name in known}


def _has(one: Conversion, revision: str) -> bool:
    named = revision in one.revisions
    return named or (len(revision) >= 7 and any(commit.startswith(revision) for commit in one.revisions.values()))


def _same_path(text: str, path: Path) -> bool:
    """Whether a path of a user is this one; a checkpoint that is gone is known by its path, too."""
    typed = os.path.expanduser(text)
    return path.is_absolute() and str(path) in (os.path.abspath(typed), os.path.realpath(typed))
