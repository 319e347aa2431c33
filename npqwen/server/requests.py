"""Requests in the library's own terms: every API's handlers translate a body into one of these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from npqwen.chat.chat_options import ChatOptions
from npqwen.generation.decoding import Prompt
from npqwen.generation.options import GenerationOptions

if TYPE_CHECKING:
    from npqwen.engine.prefix_page import Ids
    from npqwen.model import Model


@dataclass(frozen=True, eq=False)
class ChatRequest:
    """A request for n answers to a conversation.

    messages: as `Model.chat` takes them. options: those of a chat, without functions among the tools. n: how many
    answers; with a seed, answer i is sampled with seed + i.
    """

    messages: Sequence[Mapping[str, Any]]
    options: ChatOptions = field(default_factory=lambda: ChatOptions())
    n: int = 1


@dataclass(frozen=True, eq=False)
class TextRequest:
    """A request for n continuations of raw text or token ids, without a chat template; see `ChatRequest` for n."""

    prompt: Prompt
    options: GenerationOptions = field(default_factory=lambda: GenerationOptions())
    n: int = 1


@dataclass(frozen=True, eq=False)
class ReadRequest:
    """A request for the final hidden states of the last tokens of texts.

    texts(model): returns the token ids of each text, or raises an error for invalid texts; called on a worker thread.
    """

    texts: Callable[[Model], list[Ids]]


Request = ChatRequest | TextRequest
