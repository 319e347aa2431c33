"""What a client wants, in the library's own terms: every API's handlers translate a body into one of these."""

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
    """An answer to a conversation, or n answers.

    messages: as `Model.chat` takes them. options: those of a chat, without functions among the tools. n: how many
    answers; with a seed, answer i is drawn with seed + i.
    """

    messages: Sequence[Mapping[str, Any]]
    options: ChatOptions = field(default_factory=lambda: ChatOptions())
    n: int = 1


@dataclass(frozen=True, eq=False)
class TextRequest:
    """A continuation of raw text or token ids without a chat template, or n of them; see `ChatRequest` for n."""

    prompt: Prompt
    options: GenerationOptions = field(default_factory=lambda: GenerationOptions())
    n: int = 1


@dataclass(frozen=True, eq=False)
class ReadRequest:
    """Texts to read: the final hidden states of their last tokens.

    texts(model): the token ids of each, made on a thread of its own. It raises what is wrong with them.
    """

    texts: Callable[[Model], list[Ids]]


Request = ChatRequest | TextRequest
