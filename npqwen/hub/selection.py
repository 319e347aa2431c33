"""Which conversions and downloads a user means by a model's name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from npqwen.checks import near_names
from npqwen.errors import ModelNotFoundError, NpqwenError
from npqwen.hub.downloads import Download
from npqwen.hub.inventory import Conversion
from npqwen.hub.names import check_given, parse, repository_of, several
from npqwen.wording import alternatives, quoted


def select(
    model: str, conversions: Sequence[Conversion], downloads: Sequence[Download]
) -> tuple[list[Conversion], list[Download]]:
    """The conversions and downloads of a model.

    model: its id, with or without the owner and in any case; "id@revision"; the path of its checkpoint; or the path of
    one conversion. Raises ModelNotFoundError if there are none, with similar names, and if several models have the name
    that is given without an owner or a directory.
    """
    check_given(model)
    by_path = [one for one in conversions if _same_path(model, one.path) or _same_path(model, Path(one.model))]
    if by_path:
        return by_path, []
    known = {one.model for one in conversions} | {one.model for one in downloads}
    names, revision = _matching(model, known)
    chosen = [one for one in conversions if one.model in names and (not revision or _has(one, revision))]
    repositories = {repository_of(name) for name in names}
    fetched = [one for one in downloads if one.model in repositories and not revision]
    if not chosen and not fetched:
        near = _near(model.partition("@")[0], sorted(known))
        there = f"did you mean {alternatives(near)}?" if near else "see npqwen list"
        raise ModelNotFoundError(f"no model {quoted(model)} is in the cache; {there}")
    return chosen, fetched


def _matching(model: str, known: Iterable[str]) -> tuple[set[str], str | None]:
    """The known names that match, in any case, and a revision. A name without an owner or a directory matches any.

    Raises ModelNotFoundError if it is the name of several models.
    """
    wanted, _, revision = model.partition("@")
    try:
        name = parse(model)
    except NpqwenError:  # a part of a name, perhaps
        whole: set[str] = set()
    else:
        revision = name.revision or ""
        whole = {one for one in known if one.lower() == name.model.lower()}
        if name.file is None:  # of GGUF files, all quantizations
            whole |= {one for one in known if repository_of(one).lower() == name.repository.lower()}
    ownerless = set() if "/" in wanted else {one for one in known if _tail(one).lower() == wanted.lower()}
    if not whole and len(ownerless) > 1:
        raise several(wanted, ownerless)
    return whole or ownerless, revision or None


def _near(wanted: str, known: list[str]) -> list[str]:
    """Known names whose last part is similar to that of the wanted one."""
    tails = {_tail(one): one for one in known}
    return [tails[one] for one in near_names(_tail(wanted), tails)]


def _tail(name: str) -> str:
    return name.rpartition("/")[2]


def _has(one: Conversion, revision: str) -> bool:
    named = revision in one.revisions
    return named or (len(revision) >= 7 and any(commit.startswith(revision) for commit in one.revisions.values()))


def _same_path(text: str, path: Path) -> bool:
    """Whether a user's path is this one. Neither need exist: the checkpoint of a conversion may be gone."""
    typed = os.path.expanduser(text)
    return path.is_absolute() and str(path) in (os.path.abspath(typed), os.path.realpath(typed))
