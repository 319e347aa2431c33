"""System messages in the middle of a conversation, which some chat templates refuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from npqwen.chat.messages import Message, joined
from npqwen.errors import OptionError

if TYPE_CHECKING:
    from npqwen.chat.chat_template import ChatTemplate

_PROBE = "a system message in the middle"


def placed(messages: Sequence[Message], template: ChatTemplate) -> list[Message]:
    """`messages` with system messages only where the template reads them; they are checked, or texts and calls.

    Those at the beginning become one. A later one stays where it is if the template writes such turns. Otherwise its
    text begins the user's next turn, or is a turn of the user's if none follows.
    """
    first = next((at for at, message in enumerate(messages) if message["role"] != "system"), len(messages))
    beginning = "\n\n".join(_text(message) for message in messages[:first])
    placed = [{"role": "system", "content": beginning}] if first else []
    rest = messages[first:]
    if all(message["role"] != "system" for message in rest) or _reads_later_system_messages(template):
        return placed + list(rest)
    waiting: list[str] = []
    for message in rest:
        if message["role"] == "system":
            waiting.append(_text(message))
        elif message["role"] == "user" and waiting:
            placed.append({**message, "content": "\n\n".join([*waiting, _text(message)])})
            waiting = []
        else:
            placed.append(message)
    if waiting:
        placed.append({"role": "user", "content": "\n\n".join(waiting)})
    return placed


def _text(message: Message) -> str:
    content: str = joined(message)["content"]
    return content


def _reads_later_system_messages(template: ChatTemplate) -> bool:
    """Whether a template writes a system message that follows a question. Determined by rendering one."""
    try:
        return _PROBE in template.render([{"role": "user", "content": "?"}, {"role": "system", "content": _PROBE}])
    except OptionError:
        return False
