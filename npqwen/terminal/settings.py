"""The generation options of a conversation, set by name and as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from npqwen.generation.options import OPTIONS, check_options, find_option

if TYPE_CHECKING:
    from npqwen.generation.language_model import LanguageModel

NAMES = tuple(name for name, option in OPTIONS.items() if option.settable)
"""The options that `/set` knows."""


class Settings:
    """Options for `Conversation.stream`, checked for one model. The model has its own defaults for the others."""

    def __init__(self, model: LanguageModel, **options: Any) -> None:
        """Raises OptionError for impossible options."""
        self._model = model
        self.options = self._checked(options)

    def set(self, name: str, text: str) -> None:
        """Set an option, or remove it if `text` is "default". An OptionError leaves all of them unchanged."""
        option = find_option(name.lower().replace("-", "_"), NAMES)
        options = {key: value for key, value in self.options.items() if key != option.name}
        if text.lower() != "default":
            options[option.name] = option.parse(text)
        self.options = self._checked(options)

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


def _as_text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(repr, value)) if isinstance(value, list | tuple) else str(value)
