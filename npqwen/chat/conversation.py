"""A conversation that remembers: its messages, and what the model has computed of them."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from npqwen.atomic_file import new_file
from npqwen.chat.answer import ChatStream, Reply
from npqwen.chat.chat_model import ChatModel
from npqwen.chat.chat_options import ChatOptions
from npqwen.chat.messages import Message, checked
from npqwen.chat.window import Window
from npqwen.errors import FormatError, NpqwenError, OptionError
from npqwen.format.files import read_small
from npqwen.generation.session import Session

FORMAT, VERSION = "npqwen-conversation", 1


class Conversation:
    """A conversation with a model. Each turn reads only what is new, also where the template changes the past.

    system: what the model is told first. messages: what was said before. The other options are those of `Model.chat`;
    every `send` may change them for one answer.

    A conversation that outgrows the context loses its oldest turns, whole ones, from what the model sees; the system
    message stays, `messages` keeps everything, `dropped` tells how many are not seen, and the answer has a Notice.

    An answer that is left early (closed, Ctrl-C, an error) keeps the text that was begun; before any text, the turn
    leaves no trace. One thread at a time; `fork()` for more.
    """

    def __init__(
        self,
        model: ChatModel,
        system: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] = (),
        **options: Any,
    ) -> None:
        """Raises OptionError for impossible messages or options."""
        first = [] if system is None else [{"role": "system", "content": system}]
        said = [*first, *messages]
        self.model = model
        self._options = ChatOptions.of(**options)
        self._messages = checked(said) if said else []
        self._session = Session(model)
        self._dropped = 0
        self._stream: ChatStream | None = None

    @property
    def messages(self) -> list[Message]:
        """A copy of all messages so far, also those that the model no longer sees."""
        stream = self._stream
        return copy.deepcopy(self._messages if stream is None else stream.past + stream.messages)

    @property
    def system(self) -> str | None:
        """What the model is told first. Set it to change that, from the next turn on."""
        return self._messages[0]["content"] if self._has_system() else None

    @system.setter
    def system(self, text: str | None) -> None:
        self._settle()
        first = [] if text is None else checked([{"role": "system", "content": text}])
        self._messages = first + self._messages[int(self._has_system()) :]

    @property
    def thinking(self) -> bool | None:
        """Whether answers begin with a thought; None is the model's own way. Set it to change that.

        Raises OptionError for what the model cannot be told.
        """
        return self._options.thinking

    @thinking.setter
    def thinking(self, thinking: bool | None) -> None:
        self._settle()
        self.model.chat_template.check_thinking(thinking)
        self._options = self._options.override(thinking=thinking)

    @property
    def dropped(self) -> int:
        """How many messages, the oldest after the system message, the model no longer sees."""
        return self._dropped

    @property
    def tokens(self) -> int:
        """Tokens of the context that are in use, as of the last answer; the most is `model.context`."""
        return self._session.cache.length

    @property
    def cache_bytes(self) -> int:
        """Bytes that `tokens` take in memory, and in a file that is saved."""
        cache = self._session.cache
        return sum(page.nbytes for page in cache.pages(cache.length))

    def send(self, content: str | list[dict[str, Any]] | None = None, **options: Any) -> Reply:
        """Say something, and have the whole answer. See `stream`."""
        return self.stream(content, **options).run()

    def stream(self, content: str | list[dict[str, Any]] | None = None, **options: Any) -> ChatStream:
        """Say something, and have the answer's events as they come.

        content: the user's message; None to answer what is there, such as results of tools just added.
        options: in place of the conversation's own, for this answer. An answer still under way is closed.

        Raises OptionError for impossible options, ContextLengthError for a message that does not fit the context.
        """
        self._settle()
        said = [] if content is None else checked([{"role": "user", "content": content}])
        if not said and not self._messages:
            raise OptionError("the conversation is empty; say something")
        return self._begin(said, self._messages, options)

    def retry(self, **options: Any) -> Reply:
        """Have the last answer anew, with other options if you like. See `stream_retry`."""
        return self.stream_retry(**options).run()

    def stream_retry(self, **options: Any) -> ChatStream:
        """`retry`, as events. If it is left before its text begins, the answer that was there stays.

        Raises OptionError if nothing was asked yet.
        """
        self._settle()
        at = self._last_turn()
        return self._begin([self._messages[at]], self._messages[:at], options, self._messages)

    def undo(self) -> str | list[dict[str, Any]]:
        """Take back the last turn, question and answer; returns what the user had said.

        Raises OptionError if there is none.
        """
        self._settle()
        at = self._last_turn()
        content: str | list[dict[str, Any]] = self._messages[at]["content"]
        self._messages = self._messages[:at]
        self._dropped = min(self._dropped, self._last_start())
        return content

    def clear(self) -> None:
        """Forget all but the system message."""
        self._settle()
        self._messages = self._messages[: int(self._has_system())]
        self._dropped = 0

    def add(self, *messages: Mapping[str, Any]) -> None:
        """Append messages without an answer: results of tools that you ran, or what was said elsewhere."""
        self._settle()
        self._messages = self._messages + checked(messages)

    def fork(self) -> Conversation:
        """An independent conversation with the same past, without computing it again. Ends an answer under way."""
        self._settle()
        fork = Conversation.__new__(Conversation)
        fork.model = self.model
        fork._options = self._options
        fork._messages = list(self._messages)
        fork._session = self._session.fork()
        fork._dropped = self._dropped
        fork._stream = None
        return fork

    def save(self, path: str | os.PathLike[str], *, cache: bool = True) -> None:
        """Write the messages and `thinking` to a JSON file, and beside it, as `path`.npqwen-cache, what was computed.

        The second is large, serves this model only, and spares reading all again; `load` does without it too, and
        cache=False writes none. Ends an answer under way. Raises OutputError if they cannot be written.
        """
        self._settle()
        path = Path(path)
        saved = {
            "format": FORMAT,
            "version": VERSION,
            "dropped": self._dropped,
            "thinking": self.thinking,
            "messages": self._messages,
        }
        text = json.dumps(saved, ensure_ascii=False, indent=1) + "\n"
        with new_file(path) as file:
            file.write(text.encode())
            if cache:
                self._session.save(_cache_of(path))
            else:  # an earlier one is of other messages
                _cache_of(path).unlink(missing_ok=True)

    @classmethod
    def load(cls, model: ChatModel, path: str | os.PathLike[str], **options: Any) -> Conversation:
        """Read what `save` wrote, with options as for a new conversation; `thinking` is the saved one if not given.

        What was computed is taken over if it is there, whole and this model's; if not, the next turn computes it.
        Raises FormatError if there is no saved conversation at `path`, OptionError for impossible options.
        """
        ChatOptions.of(**options)  # so that below only the file can be wrong
        path = Path(path)
        try:
            raw = json.loads(read_small(path).decode("utf-8"))
        except FileNotFoundError:
            raise FormatError(f"{path} is no saved conversation: there is no such file") from None
        except OSError as error:
            raise FormatError(f"{path} cannot be read: {error.strerror or error}") from None
        except (ValueError, RecursionError):
            raise FormatError(f"{path} is no saved conversation: it is no JSON") from None
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise FormatError(f"{path} is no saved conversation")
        if raw.get("version") != VERSION:
            raise FormatError(f"{path} has version {raw.get('version')!r}, this npqwen reads {VERSION}; upgrade npqwen")
        messages, dropped, thinking = raw.get("messages"), raw.get("dropped"), raw.get("thinking")
        if not isinstance(messages, list) or not isinstance(dropped, int) or not 0 <= dropped <= len(messages):
            raise FormatError(f"{path} is damaged: its messages cannot be read")
        if not isinstance(thinking, bool | None):
            raise FormatError(f"{path} is damaged: thinking is {thinking!r}, not true, false or null")
        options.setdefault("thinking", thinking)
        try:
            conversation = cls(model, messages=messages, **options)
        except OptionError as error:
            raise FormatError(f"{path} is damaged: {error}") from None
        conversation._dropped = dropped
        with contextlib.suppress(NpqwenError):
            conversation._session = Session.load(model, _cache_of(path))
        return conversation

    def _begin(
        self, said: list[Message], before: list[Message], changes: dict[str, Any], fallback: list[Message] | None = None
    ) -> ChatStream:
        """Answer `before` and `said`. Without an answer, `fallback` (or `before`) is what the conversation has."""
        options = self._options.override(**changes) if changes else self._options
        past = before + said
        dropped = min(self._dropped, self._last_start(past))
        prompter = options.prompter(self.model)
        window = Window(prompter.ids, self.model.context, options.generation.get("max_tokens"))

        def prompts(messages: list[Message]) -> tuple[list[int], list[str]]:
            nonlocal dropped
            ids, now = window.fit(messages, dropped)
            told = (
                []
                if now == dropped
                else [
                    f"the conversation is longer than the context of {self.model.context} tokens: "
                    f"its oldest {now} messages are not shown to the model any more"
                ]
            )
            dropped = now
            return ids, told

        def on_end(stream: ChatStream) -> None:
            self._stream = None
            if stream.messages or (stream.reply is not None):
                self._messages, self._dropped = past + copy.deepcopy(stream.messages), dropped
            elif fallback is not None:
                self._messages = fallback
            else:
                self._messages = before

        stream = ChatStream(self.model, self._session, past, options, prompts, on_end)
        self._stream = stream
        return stream

    def _settle(self) -> None:
        """End an answer that is under way."""
        if self._stream is not None:
            try:
                self._stream.close()
            except ValueError:  # the generator runs: another thread, or a tool that it called
                raise OptionError("an answer of this conversation is being made; fork it for another") from None

    def _has_system(self) -> bool:
        return bool(self._messages) and self._messages[0]["role"] == "system"

    def _last_turn(self) -> int:
        """Where the last message of the user is."""
        users = [at for at, message in enumerate(self._messages) if message["role"] == "user"]
        if not users:
            raise OptionError("nothing was asked yet")
        return users[-1]

    def _last_start(self, messages: list[Message] | None = None) -> int:
        """How many messages, after the system message, are before the last turn."""
        messages = self._messages if messages is None else messages
        first = int(bool(messages) and messages[0]["role"] == "system")
        users = [at for at, message in enumerate(messages) if message["role"] == "user"]
        return max(users[-1] - first, 0) if users else 0


def _cache_of(path: Path) -> Path:
    return path.with_name(path.name + ".npqwen-cache")
