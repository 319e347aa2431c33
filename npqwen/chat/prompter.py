"""Messages to the ids of a prompt, in which only the template speaks in control tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from npqwen.chat.messages import Message
from npqwen.chat.tools import Tool

if TYPE_CHECKING:
    from npqwen.model import Model


class Prompter:
    """Makes prompts for one model, with the same tools and options of its template.

    A user or a tool's result may spell out <|im_end|> and its like. That is text, and stays text: such a message can
    be read by the model, but neither ends a turn nor begins one.
    """

    def __init__(
        self, model: Model, tools: Mapping[str, Tool] | None, thinking: bool | None, template_options: Mapping[str, Any]
    ) -> None:
        self._model = model
        self._schemas = None if tools is None else [tool.schema for tool in tools.values()]
        self._thinking = thinking
        self._options = template_options
        tokenizer = model.tokenizer
        names = {tokenizer.token_bytes(id).decode("utf-8", "replace") for id in tokenizer.special_ids}
        # The longest first, as the tokenizer finds them.
        self._control = re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or "(?!)")

    def ids(self, messages: list[Message]) -> list[int]:
        """The prompt of an answer to `messages`; see `ChatTemplate.render` for what it raises."""
        border = _unused_letter(messages)
        bordered = [self._bordered(message, border) for message in messages]
        text = self._model.chat_template.render(bordered, self._schemas, self._thinking, True, **self._options)
        return [id for part in text.split(border) for id in self._model.tokenizer.encode(part)]

    def _bordered(self, message: Message, border: str) -> Message:
        """The message with a border inside every control token's name, so that the name is encoded in two parts."""
        if message["role"] not in ("user", "tool"):
            return message

        def split(text: str) -> str:
            return self._control.sub(lambda name: name[0][0] + border + name[0][1:], text)

        content = message["content"]
        if isinstance(content, str):
            return message | {"content": split(content)}
        return message | {"content": [part | {"text": split(part["text"])} for part in content]}


def _unused_letter(messages: list[Message]) -> str:
    """A private-use character that no message has."""
    used = set(json.dumps(messages, ensure_ascii=False))
    return next(letter for letter in map(chr, range(0xF0000, 0xFFFFE)) if letter not in used)
