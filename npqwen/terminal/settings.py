"""The generation options of a conversation, set by name and as text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from npqwen.errors import OptionError
from npqwen.generation.option import Option
from npqwen.generation.options import ELSEWHERE, OPTIONS, check_options, find_option
from npqwen.wording import shortened

if TYPE_CHECKING:
    from npqwen.generation.language_model import LanguageModel

NAMES = tuple(name for name, option in OPTIONS.items() if option.settable)
"""The options that `/set` accepts."""


def option_name(name: str) -> str:
    """The name of the option that a user means, perhaps by its name in another program; it may be unknown."""
    name = name.lower().lstrip("-").replace("-", "_")
    return ELSEWHERE.get(name, name)


class Settings:
    """Options for `Conversation.stream`, checked for one model. The model has its own defaults for the others."""

    def __init__(self, model: LanguageModel, **options: Any) -> None:
        """Raises OptionError for invalid options."""
        self._model = model
        self.options = self._checked(options)

    @property
    def plain(self) -> dict[str, Any]:
        """The options that can be set by `/set` and kept in a file."""
        return {name: value for name, value in self.options.items() if name in NAMES}

    def set(self, name: str, text: str) -> str:
        """Set an option, or remove it if `text` is "default"; returns its name and new value, to be shown.

        If OptionError is raised, all options stay unchanged.
        """
        option = find_option(option_name(name), NAMES)
        if not text:
            raise OptionError(
                f"{option.name} needs a value: {option.expected}, or default for the model's own; it is "
                f"{_as_text(self.options[option.name]) if option.name in self.options else 'default'} now"
            )
        options = {key: value for key, value in self.options.items() if key != option.name}
        if text.lower() == "default":
            self.options = self._checked(options)
            return f"{option.name} is the default again"
        options[option.name] = option.parse(_unquoted(option, text))
        self.options = self._checked(options)
        return f"{option.name} is {_as_text(self.options[option.name])}"

    def replace(self, options: Mapping[str, Any]) -> list[str]:
        """Replace all options that `/set` accepts with these; returns the error messages of those that are skipped.

        An option may depend on any other, whatever their order.
        """
        self.options = {name: value for name, value in self.options.items() if name not in NAMES}
        left = dict(options)
        while left:
            problems = {}
            for name, value in left.items():
                try:
                    find_option(name, NAMES)
                    self.options = self._checked({**self.options, name: value})
                except OptionError as error:
                    problems[name] = str(error)
            if len(problems) == len(left):
                return [*problems.values()]
            left = {name: left[name] for name in problems}  # they may fit now, with what has been added
        return []

    def update(self, options: Mapping[str, Any]) -> None:
        """Set these options in addition; those that are None stay as they are. Raises OptionError."""
        given = {name: value for name, value in options.items() if value is not None}
        self.options = self._checked({**self.options, **given})

    def table(self, defaults: Mapping[str, Any]) -> str:
        """A table of all options. defaults: the values of those that are not set."""
        rows = []
        for name in NAMES:
            is_set = name in self.options
            value = self.options[name] if is_set else defaults.get(name)
            rows.append(f"  {name:<20}{_as_text(value):<12}{'set' if is_set else ''}".rstrip())
        return "\n".join(rows)

    def _checked(self, options: Mapping[str, Any]) -> dict[str, Any]:
        from npqwen.generation.decoding import check_for_model

        checked = check_options(options)
        check_for_model(self._model, checked)
        return dict(checked)


def _unquoted(option: Option, text: str) -> str:
    r"""A text in double quotes as JSON reads it, so that "\n" and " " can be written; any other as it is."""
    if option.kind is str and len(text) > 1 and text[0] == text[-1] == '"':
        try:
            return str(json.loads(text))
        except ValueError:
            return text
    return text


def _as_text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        return " ".join(map(repr, value))
    return shortened(json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value))
