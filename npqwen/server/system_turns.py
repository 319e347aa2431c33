"""System messages in the middle of a conversation, which some chat templates refuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from npqwen.chat.begun_answer import BegunAnswer
from npqwen.chat.messages import Message, joined
from npqwen.errors import OptionError

if TYPE_CHECKING:
    from npqwen.chat.chat_template import ChatTemplate

_PROBE = "a system message in the middle"


def with_allowed_system_turns(messages: Sequence[Message], template: ChatTemplate) -> list[Message]:
    """`messages` with system messages only where the template accepts them. messages: checked, or texts and calls only.

    Leading ones are joined into one. Later ones stay in place if the template renders such turns. Otherwise their text
    is prepended to the next user turn, or becomes a user turn if none follows, before an answer that has begun.
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
        at = len(placed) if BegunAnswer.of(rest) is None else len(placed) - 1
        placed.insert(at, {"role": "user", "content": "\n\n".join(waiting)})
    return placed


def _text(message: Message) -> str:
    content: str = joined(message)["content"]
    return content


def _reads_later_system_messages(template: ChatTemplate) -> bool:
    """Whether a template renders a system message that follows a user's. Determined by rendering one."""
    try:
        return _PROBE in template.render([{"role": "user", "content": "?"}, {"role": "system", "content": _PROBE}])
    except OptionError:
        return False
