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
_FILES = ("FILE", "DIRECTORY", "DIR", "PATH", "INPUT", "OUTPUT", "OUT", "TEXT...")
"""Metavariables of files and directories."""


class _Model(StringParamType):
    """The name or the path of a model."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        try:
            names = [*_names(incomplete), *_places(incomplete)]
        except (OSError, NpqwenError):  # caches that cannot be read suggest nothing
            names = []
        return [CompletionItem(name) for name in names] or [CompletionItem(incomplete, type="file")]


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
    if parameter.name in _MODELS:
        return _Model()
    shown = parameter.metavar or str(parameter.name).upper()
    parts = re.split(r"[][|]", shown)
    words = [part for part in parts if part != part.upper()] if "|" in shown else []
    files = any(part in _FILES for part in parts)
    return _FileOrWord(words, files=files) if words or files else parameter.type


def words(choices: list[str]) -> list[CompletionItem]:
    """The completions of an option whose values are numbers: all `choices`."""
    return [CompletionItem(choice) for choice in choices]


def _names(incomplete: str) -> list[str]:
    """Hub models on this machine whose name, with or without its owner, starts with `incomplete`, ignoring case."""
    from npqwen.cache_directory import cache_directory
    from npqwen.hub import record
    from npqwen.hub.downloads import downloaded_names
    from npqwen.hub.names import OWNER

    found = set(downloaded_names())
    for path in record.conversions(cache_directory()):
        known = record.read(path) if path.parent.parent.name == "hub" else None
        if known is not None:
            found.add(known.model)
    if incomplete:
        found |= {name.removeprefix(f"{OWNER}/") for name in found}
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
