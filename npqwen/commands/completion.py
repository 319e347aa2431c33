"""Shell completion of commands' text parameters: names of models, files, or one of a few words."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem
from click.types import StringParamType

from npqwen.errors import NpqwenError

_MODELS = ("model", "models", "source", "against", "draft")
"""Names of parameters that are models."""
_IN_CACHE = "known"
"""The name of parameters that are models in the caches."""
_FILES = ("FILE", "DIRECTORY", "DIR", "PATH", "INPUT", "OUTPUT", "OUT", "TEXT...")
"""Metavariables of files and directories."""


class _Model(StringParamType):
    """The name of a model, or also its path if `files` is set."""

    def __init__(self, *, files: bool) -> None:
        self._files = files

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        try:
            names = [*_names(incomplete), *(_places(incomplete) if self._files else ())]
        except (OSError, NpqwenError):  # caches that cannot be read suggest nothing
            names = []
        found = [CompletionItem(name) for name in names]
        return found or ([CompletionItem(incomplete, type="file")] if self._files else [])


class _FileOrWord(StringParamType):
    """One of a few words; if none matches, a file or directory if `files` is set."""

    def __init__(self, words: list[str], *, files: bool) -> None:
        self._words, self._files = words, files

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        words = [CompletionItem(word) for word in self._words if word.startswith(incomplete)]
        return words or ([CompletionItem(incomplete, type="file")] if self._files else [])


def completed(parameter: click.Parameter) -> Any:
    """The click type of a parameter, with completion if it is a text of a known kind.

    The name or metavariable tells the kind: "MODEL", "FILE", "int8|f16|f32".
    """
    if parameter.type is not click.STRING:
        return parameter.type
    if parameter.name in (*_MODELS, _IN_CACHE):
        return _Model(files=parameter.name != _IN_CACHE)
    shown = parameter.metavar or str(parameter.name).upper()
    parts = re.split(r"[][|]", shown)
    words = [part for part in parts if part != part.upper()] if "|" in shown else []
    files = any(part in _FILES for part in parts)
    return _FileOrWord(words, files=files) if words or files else parameter.type


def words(choices: list[str]) -> list[CompletionItem]:
    """The completions of an option whose values are numbers: all `choices`."""
    return [CompletionItem(choice) for choice in choices]


def _names(incomplete: str) -> list[str]:
    """Models in the caches whose name, with or without its owner, starts with `incomplete`, ignoring case.

    A checkpoint of the user's has the name of its directory or file, or its path if others have the same name.
    """
    from npqwen.cache_directory import cache_directory
    from npqwen.hub import record
    from npqwen.hub.downloads import downloaded_names
    from npqwen.hub.names import OWNER

    found = set(downloaded_names())
    local: dict[str, set[str]] = {}
    for path in record.conversions(cache_directory()):
        known = record.read(path)
        if known is not None and path.parent.parent.name == "hub":
            found.add(known.model)
        elif known is not None:
            local.setdefault(path.parent.name, set()).add(known.model)
    if incomplete:
        found |= {name.removeprefix(f"{OWNER}/") for name in found}
    for folder, models in local.items():
        found |= {folder} if len(models) == 1 else models
    return sorted(name for name in found if name.lower().startswith(incomplete.lower()))


def _places(incomplete: str) -> Iterator[str]:
    """Paths of models that start with `incomplete`: directories with a config.json, and GGUF files."""
    folder, start = os.path.split(incomplete)
    place = Path(os.path.expanduser(folder or "."))
    for entry in sorted(place.iterdir()) if place.is_dir() else ():
        if entry.name.startswith(start) and not (entry.name.startswith(".") and not start):
            is_model = entry.is_file() if entry.name.lower().endswith(".gguf") else (entry / "config.json").is_file()
            if is_model:
                yield os.path.join(folder, entry.name)
