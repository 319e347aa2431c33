"""The JSON file of a saved conversation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from npqwen.chat.messages import Message, checked
from npqwen.errors import FormatError, OptionError
from npqwen.format.files import SMALL, read_small
from npqwen.wording import quoted, unreadable

FORMAT, VERSION = "npqwen-conversation", 1


@dataclasses.dataclass(frozen=True)
class SavedConversation:
    """The saved state of a conversation. `read` checks all but the options, which depend on the model.

    messages, dropped, thinking: as in a `Conversation`.
    model: the name of the model that answered. options: generation options by name. None: the file does not say.
    unanswered: a question that has no answer yet, and is not among the messages.
    """

    messages: list[Message]
    dropped: int = 0
    thinking: bool | None = None
    model: str | None = None
    options: dict[str, Any] | None = None
    unanswered: str | None = None

    def encode(self) -> bytes:
        """The bytes of the file. Fields that are None are left out, except thinking."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "messages"}
        given = {name: value for name, value in fields.items() if value is not None or name == "thinking"}
        saved = {"format": FORMAT, "version": VERSION, **given, "messages": self.messages}
        return (json.dumps(saved, ensure_ascii=False, indent=1) + "\n").encode()

    @classmethod
    def read(cls, path: Path, limit: int = SMALL) -> SavedConversation:
        """Read a file of at most `limit` bytes. Raises FormatError if it is missing, unreadable or invalid."""
        try:
            raw = json.loads(read_small(path, limit).decode("utf-8"))
        except FileNotFoundError:
            raise FormatError(f"{path} does not exist") from None
        except OSError as error:
            raise FormatError(unreadable(path, error)) from None
        except (ValueError, RecursionError):
            raise FormatError(f"{path} is not a saved conversation: it is not JSON") from None
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise FormatError(f"{path} is not a saved conversation")
        if raw.get("version") != VERSION:
            raise FormatError(
                f"{path} has format version {quoted(raw.get('version'))}; this npqwen reads {VERSION}; upgrade it"
            )
        fields: dict[str, Any] = {field.name: raw.get(field.name) for field in dataclasses.fields(cls)}
        saved = cls(**fields)
        if not isinstance(saved.messages, list) or not _is_count(saved.dropped, len(saved.messages)):
            raise FormatError(f"{path} is damaged: its messages cannot be read")
        try:
            saved = dataclasses.replace(saved, messages=checked(saved.messages) if saved.messages else [])
        except OptionError as error:
            raise FormatError(f"{path} is damaged: {error}") from None
        for name, kind, expected in (
            ("thinking", bool, "true, false or null"),
            ("model", str, "a name"),
            ("options", dict, "an object"),
            ("unanswered", str, "text"),
        ):
            value = getattr(saved, name)
            if value is not None and not isinstance(value, kind):
                raise FormatError(f"{path} is damaged: {name} is {quoted(value)}, not {expected}")
        return saved


def _is_count(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most
