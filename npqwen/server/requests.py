"""Requests in the library's own terms: every API's handlers translate a body into one of these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from npqwen.chat.chat_options import CHAT_OPTIONS, ChatOptions, ChatSettings
from npqwen.errors import OptionError
from npqwen.generation.decoding import Prompt
from npqwen.generation.options import OPTIONS, GenerationOptions
from npqwen.server.fields import FieldError
from npqwen.structure.structure_error import StructureError

if TYPE_CHECKING:
    from npqwen.engine.prefix_page import Ids
    from npqwen.model import Model


@dataclass(frozen=True, eq=False)
class ChatRequest:
    """A request for n answers to a conversation.

    messages: as `Model.chat` takes them. options: those of a chat, without functions among the tools. n: how many
    answers; with a seed, answer i is sampled with seed + i. fields: names of options -> the body's fields that they
    come from, for error messages; an option that is not in it comes from the field of its own name.
    """

    messages: Sequence[Mapping[str, Any]]
    options: ChatOptions = field(default_factory=lambda: ChatOptions())
    n: int = 1
    fields: Mapping[str, str] = field(default_factory=dict)

    def settings(self) -> ChatSettings:
        """The options, checked; FieldError for an invalid one.

        It may compile a grammar, which takes a while: not to be called in the event loop's thread.
        """
        return ChatSettings.of(cast(ChatOptions, _checked(self.options, self.fields)))


@dataclass(frozen=True, eq=False)
class TextRequest:
    """A request for n continuations of raw text or token ids, without a chat template.

    n, fields: see `ChatRequest`.
    """

    prompt: Prompt
    options: GenerationOptions = field(default_factory=lambda: GenerationOptions())
    n: int = 1
    fields: Mapping[str, str] = field(default_factory=dict)

    def checked_options(self) -> GenerationOptions:
        """The options, each checked by itself; see `ChatRequest.settings`."""
        return cast(GenerationOptions, _checked(self.options, self.fields))


@dataclass(frozen=True, eq=False)
class ReadRequest:
    """A request for the final hidden states of the last tokens of texts.

    texts(model): returns the token ids of each text, or raises an error for invalid texts; called on a worker thread.
    """

    texts: Callable[[Model], list[Ids]]


Request = ChatRequest | TextRequest


def in_field(error: BaseException, fields: Mapping[str, str]) -> BaseException:
    """An error about a structure as one about the field that it comes from; any other error as it is."""
    if not isinstance(error, StructureError):
        return error
    field = fields.get(error.option, error.option)
    return FieldError(f"{field} {error.problem}", field)


def _checked(options: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    """`options` with checked values; FieldError with the field of the first that is invalid."""
    checked = dict(options)
    for name, value in options.items():
        option = OPTIONS.get(name) or CHAT_OPTIONS.get(name)
        if option is not None and value is not None:
            field = fields.get(name, name)
            try:
                checked[name] = option._replace(name=field).check(value)
            except OptionError as error:
                raise FieldError(str(error), field) from None
    return checked
