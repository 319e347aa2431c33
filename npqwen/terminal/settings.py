"""Options of generation by name and as text, as somebody types them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from npqwen.errors import OptionError

if TYPE_CHECKING:
    from npqwen.model import Model


def _switch(text: str) -> bool:
    return {"on": True, "off": False}[text.lower()]


_KINDS: dict[str, tuple[Callable[[str], Any], str]] = {
    "temperature": (float, "a number"),
    "top_k": (int, "a whole number"),
    "top_p": (float, "a number"),
    "min_p": (float, "a number"),
    "repetition_penalty": (float, "a number"),
    "presence_penalty": (float, "a number"),
    "frequency_penalty": (float, "a number"),
    "seed": (int, "a whole number"),
    "max_tokens": (int, "a whole number"),
    "thinking_budget": (int, "a whole number"),
    "stop": (str, "text"),
    "loop_guard": (_switch, "on or off"),
}
NAMES = tuple(_KINDS)


class Settings:
    """Options for `Conversation.stream`, checked for one model; those that are not given are the model's own."""

    def __init__(self, model: Model, **options: Any) -> None:
        """Raises OptionError for impossible options."""
        self._model = model
        self.options = self._checked({name: value for name, value in options.items() if value is not None})

    def set(self, name: str, text: str) -> None:
        """Change one; "default" gives it back to the model. Raises OptionError, and then changes nothing."""
        name = name.lower().replace("-", "_")
        if name not in _KINDS:
            near = difflib.get_close_matches(name, NAMES, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(NAMES)}"
            raise OptionError(f"unknown option {name!r}; {hint}")
        options = {key: value for key, value in self.options.items() if key != name}
        if text.lower() != "default":
            read, kind = _KINDS[name]
            try:
                options[name] = read(text)
            except (ValueError, KeyError):
                raise OptionError(f"{name} is {text!r}; it must be {kind}, or default") from None
        self.options = self._checked(options)

    def shown(self, usual: Mapping[str, Any]) -> str:
        """A table of all. usual: the values of those that are not given."""
        rows = []
        for name in NAMES:
            given = name in self.options
            value = self.options[name] if given else usual.get(name)
            rows.append(f"  {name:<20}{_as_text(value):<12}{'yours' if given else ''}".rstrip())
        return "\n".join(rows)

    def _checked(self, options: dict[str, Any]) -> dict[str, Any]:
        from npqwen.generation.options import check_options
        from npqwen.generation.stream import check_for_model

        check_for_model(self._model, check_options(options))
        return options


def _as_text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(repr, value)) if isinstance(value, list | tuple) else str(value)
