"""Messages to the ids of a prompt, in which only the template speaks in control tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from npqwen.chat.chat_model import ChatModel
from npqwen.chat.messages import Message
from npqwen.tokenizer import Tokenizer
from npqwen.tools.toolbox import Tool


class Prompter:
    """Makes prompts for one model, with the same tools and options of its template.

    A user, a tool's result, or an answer that repeats them may spell out <|im_end|> and its like. That is text, and
    stays text: such a message can be read by the model, but neither ends a turn nor begins one. Nor does a tool's
    result end itself by </tool_response>, or begin a thought or a call.
    """

    def __init__(
        self,
        model: ChatModel,
        tools: Mapping[str, Tool] | None,
        thinking: bool | None,
        template_options: Mapping[str, Any],
    ) -> None:
        self._model = model
        self._schemas = None if tools is None else [tool.schema for tool in tools.values()]
        self._thinking = thinking
        self._options = template_options
        tokenizer = model.tokenizer
        # What users and assistants say of <think> or <tool_call> is theirs to say.
        said = _names(tokenizer, tokenizer.special_ids)
        self._control = {"user": said, "assistant": said, "tool": _names(tokenizer, tokenizer.added_ids)}

    def ids(self, messages: list[Message]) -> list[int]:
        """The prompt of an answer to `messages`; see `ChatTemplate.render` for what it raises."""
        border = _unused_letter(messages)
        bordered = [self._bordered(message, border) for message in messages]
        text = self._model.chat_template.render(bordered, self._schemas, self._thinking, True, **self._options)
        return [id for part in text.split(border) for id in self._model.tokenizer.encode(part)]

    def _bordered(self, message: Message, border: str) -> Message:
        """The message with a border inside every control token's name, so that the name is encoded in two parts."""
        control = self._control.get(message["role"])
        if control is None:
            return message

        def split(value: Any) -> Any:
            if isinstance(value, str):
                return control.sub(lambda name: name[0][0] + border + name[0][1:], value)
            if isinstance(value, list):
                return [split(item) for item in value]
            if isinstance(value, dict):  # a call's arguments: their names are the model's words, too
                return {split(key): split(item) for key, item in value.items()}
            return value

        return {key: split(value) for key, value in message.items()}


def _names(tokenizer: Tokenizer, ids: Iterable[int]) -> re.Pattern[str]:
    """What finds the names of these tokens in a text."""
    names = {tokenizer.token_bytes(id).decode("utf-8", "replace") for id in ids}
    # The longest first, as the tokenizer finds them.
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or "(?!)")


def _unused_letter(messages: list[Message]) -> str:
    """A private-use character that no message has."""
    used = set(json.dumps(messages, ensure_ascii=False))
    return next(letter for letter in map(chr, range(0xF0000, 0xFFFFE)) if letter not in used)
