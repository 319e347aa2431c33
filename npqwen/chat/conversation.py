"""A conversation: its messages, and the keys and values computed for them."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from npqwen.atomic_file import new_file
from npqwen.chat.chat_model import ChatModel
from npqwen.chat.chat_options import CHAT_OPTIONS, ChatOptions, ChatSettings
from npqwen.chat.chat_stream import ChatStream
from npqwen.chat.events import Reply
from npqwen.chat.messages import Message, checked
from npqwen.chat.saved_conversation import SavedConversation
from npqwen.chat.window import Window
from npqwen.checks import check_path
from npqwen.engine import snapshot
from npqwen.errors import NpqwenError, OptionError
from npqwen.generation.option import with_options
from npqwen.generation.options import OPTIONS
from npqwen.generation.session import Session
from npqwen.wording import quoted

if TYPE_CHECKING:
    from typing_extensions import Unpack


class About(TypedDict, total=False):
    """Fields of a saved conversation that a `Conversation` does not have; see `SavedConversation`."""

    model: str | None
    options: dict[str, Any] | None
    unanswered: str | None


class Conversation:
    """A conversation with a model. Each turn computes only what is new, even if the template changes earlier turns.

    When it outgrows the context, the oldest turns are dropped from the prompt, each as a whole. The system message
    stays; `messages` keeps everything; `dropped` counts the messages that the model no longer sees; the answer has a
    Notice.

    An answer that ends early (closed, Ctrl-C, an error) keeps its partial text. If there is none, the turn is undone.
    Use by one thread at a time; `fork()` for more.
    """

    def __init__(
        self,
        model: ChatModel,
        system: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] = (),
        **options: Unpack[ChatOptions],
    ) -> None:
        """
        system: the system message. messages: those of an earlier conversation. options: for all answers; those given
        to `send`, `stream` or `retry` replace them for one. Raises OptionError for wrong messages or options.
        """
        if isinstance(messages, str) or not isinstance(messages, Sequence):
            raise OptionError(f"messages is {quoted(messages)}; give a list of messages")
        first = [] if system is None else [{"role": "system", "content": system}]
        given = [*first, *messages]
        self.model = model
        self._settings = ChatSettings.of(options)
        self._messages = checked(given) if given else []
        self._session = Session(model)
        self._dropped = 0
        self._stream: ChatStream | None = None

    def __repr__(self) -> str:
        return f"<Conversation: {len(self.messages)} messages, {self.tokens} of {self.model.context} tokens>"

    @property
    def messages(self) -> list[Message]:
        """A copy of all messages so far, including those that the model no longer sees."""
        stream = self._stream
        return copy.deepcopy(self._messages if stream is None else stream.past + stream.messages)

    @property
    def system(self) -> str | None:
        """The system message, None if there is none. Assignments take effect from the next turn."""
        return self._messages[0]["content"] if self._has_system() else None

    @system.setter
    def system(self, text: str | None) -> None:
        self._settle()
        first = [] if text is None else checked([{"role": "system", "content": text}])
        self._messages = first + self._messages[int(self._has_system()) :]

    @property
    def thinking(self) -> bool | None:
        """Whether the model thinks first; None leaves it to the chat template. May be assigned.

        Raises OptionError for a value that the model cannot obey.
        """
        return self._settings.thinking

    @thinking.setter
    def thinking(self, thinking: bool | None) -> None:
        self._settle()
        self.model.chat_template.check_thinking(thinking)
        self._settings = self._settings.override({"thinking": thinking})

    @property
    def dropped(self) -> int:
        """How many messages, the oldest after the system message, the model no longer sees."""
        return self._dropped

    @property
    def tokens(self) -> int:
        """Tokens of the context that are in use after the last answer; the maximum is `model.context`."""
        return self._session.cache.length

    @property
    def cache_bytes(self) -> int:
        """Approximate size of the cache of these tokens in a saved file, in bytes."""
        cache = self._session.cache
        return snapshot.size_of(cache)

    @with_options(CHAT_OPTIONS, OPTIONS)
    def send(self, content: str | list[dict[str, Any]] | None = None, **options: Unpack[ChatOptions]) -> Reply:
        """Send a user's message and return the whole answer. See `stream`."""
        return self.stream(content, **options).run()

    @with_options(CHAT_OPTIONS, OPTIONS)
    def stream(self, content: str | list[dict[str, Any]] | None = None, **options: Unpack[ChatOptions]) -> ChatStream:
        """Send a user's message and stream the answer's events.

        content: the message; None to answer the messages so far, such as results of tools just added. options: for
        this answer, in place of the conversation's own. An answer that is still streaming is closed.

        Raises OptionError for wrong options, ContextLengthError for a message that does not fit the context.
        """
        self._settle()
        new = [] if content is None else checked([{"role": "user", "content": content}])
        if not new and not self._messages:
            raise OptionError("the conversation is empty; send a message first")
        return self._begin(new, self._messages, options)

    @with_options(CHAT_OPTIONS, OPTIONS)
    def retry(self, **options: Unpack[ChatOptions]) -> Reply:
        """Answer the last user's message again, perhaps with other options. See `stream_retry`."""
        return self.stream_retry(**options).run()

    @with_options(CHAT_OPTIONS, OPTIONS)
    def stream_retry(self, **options: Unpack[ChatOptions]) -> ChatStream:
        """Replace the last answer with a new one, and stream its events. If it ends before any text, the old one stays.

        Raises OptionError if there is no user message yet.
        """
        self._settle()
        at = self._last_turn()
        return self._begin([self._messages[at]], self._messages[:at], options, self._messages)

    def undo(self) -> str | list[dict[str, Any]]:
        """Remove the last turn; returns the content of the user's message. Raises OptionError if there is none."""
        self._settle()
        at = self._last_turn()
        content: str | list[dict[str, Any]] = self._messages[at]["content"]
        self._messages = self._messages[:at]
        self._dropped = min(self._dropped, self._last_start())
        return content

    def clear(self) -> None:
        """Remove all messages but the system message."""
        self._settle()
        self._messages = self._messages[: int(self._has_system())]
        self._dropped = 0

    def add(self, *messages: Mapping[str, Any]) -> None:
        """Append messages without an answer, such as results of tools that you ran."""
        self._settle()
        self._messages = self._messages + checked(messages)

    def fork(self) -> Conversation:
        """An independent copy, which shares the cache. An answer that is still streaming is closed."""
        self._settle()
        fork = Conversation.__new__(Conversation)
        fork.model = self.model
        fork._settings = self._settings
        fork._messages = list(self._messages)
        fork._session = self._session.fork()
        fork._dropped = self._dropped
        fork._stream = None
        return fork

    def saved(self, **about: Unpack[About]) -> SavedConversation:
        """The conversation as `save` writes it. An answer that is still streaming is closed."""
        self._settle()
        return SavedConversation(self._messages, self._dropped, self.thinking, **about)

    def save(self, path: str | os.PathLike[str], *, cache: bool = True, **about: Unpack[About]) -> None:
        """Write the messages and `thinking` to a JSON file, and the keys and values to `path`.npqwen-cache beside it.

        The second file is large and works with this model only. It avoids recomputing the conversation; `load`
        works without it. cache: whether to write it. about: further fields of the JSON file, for programs that show
        it. An answer that is still streaming is closed. Raises OutputError if a file cannot be written.
        """
        text = self.saved(**about).encode()
        path = check_path(path)
        with new_file(path) as file:
            file.write(text)
            if cache:
                self._session.save(cache_file(path))
            else:  # an older cache belongs to other messages
                cache_file(path).unlink(missing_ok=True)

    @classmethod
    def load(cls, model: ChatModel, path: str | os.PathLike[str], **options: Unpack[ChatOptions]) -> Conversation:
        """Read what `save` wrote. options: as for a new conversation; `thinking` defaults to the saved value.

        The cache file is used if it exists, is intact and belongs to this model; otherwise the next turn computes
        everything. Raises FormatError if `path` is not a saved conversation, OptionError for wrong options.
        """
        ChatSettings.of(options)  # so that errors below are the file's
        path = check_path(path)
        return cls.restore(model, SavedConversation.read(path), path, **options)

    @classmethod
    def restore(
        cls, model: ChatModel, saved: SavedConversation, path: Path, **options: Unpack[ChatOptions]
    ) -> Conversation:
        """The conversation that was read from `path`, as `load` returns it."""
        options.setdefault("thinking", saved.thinking)
        conversation = cls(model, messages=saved.messages, **options)
        conversation._dropped = saved.dropped
        with contextlib.suppress(NpqwenError):
            conversation._session = Session.load(model, cache_file(path))
        return conversation

    def _begin(
        self,
        new: list[Message],
        before: list[Message],
        changes: ChatOptions,
        fallback: list[Message] | None = None,
    ) -> ChatStream:
        """Answer `before` and `new`. If the answer has no text, the messages become `fallback` (default: `before`)."""
        settings = self._settings.override(changes) if changes else self._settings
        past = before + new
        dropped = min(self._dropped, self._last_start(past))
        prompter = settings.prompter(self.model)
        window = Window(prompter.ids, self.model.context, settings.generation.get("max_tokens"))

        def prompts(messages: list[Message]) -> tuple[list[int], list[str]]:
            nonlocal dropped
            before, notices = dropped, []
            ids, dropped = window.fit(messages, dropped)
            if dropped != before:
                notices = [
                    f"the conversation exceeds the context of {self.model.context} tokens: "
                    f"its oldest {dropped} messages are no longer shown to the model"
                ]
            return ids, notices

        def on_end(stream: ChatStream) -> None:
            self._stream = None
            if stream.messages or (stream.reply is not None):
                self._messages, self._dropped = past + copy.deepcopy(stream.messages), dropped
            elif fallback is not None:
                self._messages = fallback
            else:
                self._messages = before

        stream = ChatStream(self.model, self._session, past, settings, prompts, on_end)
        self._stream = stream
        return stream

    def _settle(self) -> None:
        """Close an answer that is still streaming. Raises OptionError if another thread, or a tool, runs it."""
        if self._stream is not None:
            try:
                self._stream.close()
            except OptionError:
                raise OptionError("the conversation is generating an answer; fork it for another") from None

    def _has_system(self) -> bool:
        return bool(self._messages) and self._messages[0]["role"] == "system"

    def _last_turn(self) -> int:
        """The index of the last user's message. Raises OptionError if there is none."""
        users = [at for at, message in enumerate(self._messages) if message["role"] == "user"]
        if not users:
            raise OptionError("the conversation has no user message yet")
        return users[-1]

    def _last_start(self, messages: list[Message] | None = None) -> int:
        """The number of messages between the system message and the last turn."""
        messages = self._messages if messages is None else messages
        first = int(bool(messages) and messages[0]["role"] == "system")
        users = [at for at, message in enumerate(messages) if message["role"] == "user"]
        return max(users[-1] - first, 0) if users else 0


def cache_file(path: Path) -> Path:
    """The file of keys and values that belongs to a saved conversation."""
    return path.with_name(path.name + ".npqwen-cache")
