"""The interface of a model that can chat. `npqwen.model.Model` implements it; tests have their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from npqwen.generation.language_model import LanguageModel

if TYPE_CHECKING:
    from npqwen.chat.chat_template import ChatTemplate


class ChatModel(LanguageModel, Protocol):
    """A language model whose checkpoint has chat templates."""

    @property
    def chat_template(self) -> ChatTemplate:
        """Renders messages as text."""
