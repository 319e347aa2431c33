"""Conversion of messages to the token ids of a prompt, in which only the template writes control tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from npqwen.chat.begun_answer import BegunAnswer
from npqwen.chat.borders import Borders, Names, split, unused_character, without_needless_cuts
from npqwen.chat.chat_model import ChatModel
from npqwen.chat.chat_template import opens_thinking
from npqwen.chat.messages import Message
from npqwen.errors import OptionError
from npqwen.tools.toolbox import Tool


class Prompter:
    """Makes prompts for one model, with fixed tools and template options.

    Messages of users and assistants, tool results and tool schemas may spell out <|im_end|> and other control tokens,
    whole or in part. They are encoded as text: the model can read them, but they neither end nor begin a turn. Results
    and schemas cannot write </tool_response>, <think> or <tool_call> either. The system message is trusted.
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
        self._all = Names(tokenizer, tokenizer.added_ids)
        # Users and assistants may write <think> and <tool_call>, which are added tokens, but not special.
        special = Names(tokenizer, tokenizer.special_ids)
        self._forbidden = {"user": special, "assistant": special, "tool": self._all}

    def ids(self, messages: list[Message], limit: int | None = None) -> list[int]:
        """The ids of the prompt for an answer to `messages`, or for the rest of the answer that they end with.

        limit: see `Tokenizer.encode`.

        Raises what `ChatTemplate.render` raises.
        """
        return [id for piece in self._pieces(messages) for id in self._model.tokenizer.encode(piece, limit)]

    def _pieces(self, messages: list[Message]) -> list[str]:
        """The rendered prompt, cut within each control token's name that the template did not write itself."""
        begun, template, thinking = BegunAnswer.of(messages), self._model.chat_template, self._thinking
        if begun is not None:
            messages = messages[:-1]
            if not messages:
                raise OptionError("the only message is the assistant's; begin the conversation with a user's message")
        if begun:
            kind = template.thinking(self._options.get("template"), self._schemas is not None)
            thinking = bool(begun.reasoning) if kind == "switch" else None
            if kind == "never":
                begun = begun._replace(reasoning="")
        plain = template.prepare(messages, self._schemas, thinking, True, **self._options)
        opening = plain.text()
        is_open = opens_thinking(opening)
        text = opening + begun.rendered(is_open) if begun else opening
        borders = Borders(unused_character(text, [plain.messages, plain.tools, plain.variables]))
        marked = replace(
            plain,
            messages=[self._with_borders(message, borders) for message in plain.messages],
            tools=borders.within(plain.tools, self._all),
        )
        marked_text = marked.text()
        if begun:
            names = self._forbidden["assistant"]
            marked_text += begun.rendered(is_open, lambda said: str(borders.within(said, names)))
        if not borders.any:
            return [text]
        parts = split(marked_text, borders.character)
        if self._all.found(parts) == self._all.found([text]):
            return [text]
        return without_needless_cuts(parts, self._all)

    def _with_borders(self, message: Message, borders: Borders) -> Message:
        """`message` with borders in all its keys and values but the role; itself if its role is trusted."""
        names = self._forbidden.get(message["role"])
        if names is None:
            return message
        return {
            borders.within(key, names): value if key == "role" else borders.within(value, names)
            for key, value in message.items()
        }
