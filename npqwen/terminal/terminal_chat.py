"""A conversation in the terminal: its state, asking a question, showing an answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npqwen.chat.conversation import Conversation
from npqwen.errors import OptionError, OutputError
from npqwen.generation.thinking import CLOSE
from npqwen.terminal.answer_view import AnswerView, statistics
from npqwen.terminal.autosave import Autosave
from npqwen.terminal.history import History
from npqwen.terminal.interrupts import AnswerInterrupts
from npqwen.terminal.settings import Settings
from npqwen.terminal.terminal import Terminal
from npqwen.wording import shortened

if TYPE_CHECKING:
    from npqwen.chat.chat_stream import ChatStream
    from npqwen.chat.saved_conversation import SavedConversation
    from npqwen.generation.completion import Usage
    from npqwen.generation.watched import Watch
    from npqwen.model import Model

Begin = Callable[[list["Watch"]], "ChatStream"]
"""begin(watch): starts an answer with the option `watch`."""


@dataclass
class Totals:
    """The sums over all answers."""

    answers: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0

    def add(self, usage: Usage) -> None:
        """Add one answer."""
        self.answers += 1
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += usage.cached_tokens
        self.generated_tokens += usage.generated_tokens
        self.seconds += usage.first_token_seconds + usage.decode_seconds


@dataclass(frozen=True)
class Question:
    """A question, and the options for its answer alone."""

    text: str
    options: dict[str, Any] = field(default_factory=dict)


class TerminalChat:
    """One conversation with `model`, shown on `terminal`.

    view: shows the answers. settings: the generation options. system, thinking: as for a `Conversation`, which is the
    attribute `conversation`. name: the model's name to show and to save. autosave: where the conversation is saved
    automatically, None for nowhere. history: the file of what is typed, if there is one.
    """

    def __init__(
        self,
        model: Model,
        terminal: Terminal,
        view: AnswerView,
        settings: Settings,
        *,
        system: str | None = None,
        thinking: bool | None = None,
        name: str = "",
        autosave: Autosave | None = None,
        history: History | None = None,
    ) -> None:
        self.model = model
        self.terminal = terminal
        self.view = view
        self.settings = settings
        self.name = name
        self.autosave = autosave
        self.history = history
        self.conversation = Conversation(model, system, **self.conversation_options)
        self.conversation.thinking = thinking
        self.file: str | None = None
        """Where the conversation was last saved to or loaded from."""
        self.totals = Totals()
        self.last_usage: Usage | None = None
        self.shows_statistics = True
        self.unanswered: Question | None = None
        """The last question, if it has no answer: it is not part of the conversation."""
        self.last_temperature: float | None = None
        """The temperature of the last answer, if it was given here."""
        self.retries = 0
        """How often the last question was asked again."""
        self.question_options: dict[str, Any] = {}
        """Options of the last question alone."""
        self.used: int | None = None
        """How many tokens of the context are in use, if that is known."""
        self.confirm: Callable[[str], bool] | None = None
        """Asks the user a yes/no question; None if there is nobody to ask."""
        self.finished = False
        self._autosave_failed = False

    @property
    def conversation_options(self) -> dict[str, Any]:
        """Options of every conversation in this terminal."""
        return {"progress": self.terminal.prompt_progress}

    def ask(self, question: str, **options: Any) -> None:
        """Ask, and show the answer. `options` are for this question only."""
        self.unanswered = Question(question, options)
        self.answer(self._begin_question, "/retry asks the question again")

    def ask_once(self, question: str, *, ends_thinking: bool) -> None:
        """Ask, and show the answer and its statistics. Raises KeyboardInterrupt if Ctrl-C has ended it.

        ends_thinking: whether the first Ctrl-C only ends the thinking.
        """
        self.unanswered = Question(question)
        stream, interrupted = self._follow(self._begin_question, ends_thinking=ends_thinking)
        if interrupted or stream is None:
            raise KeyboardInterrupt
        self.terminal.notice(statistics(stream))

    def answer(self, begin: Begin, without_answer: str) -> None:
        """Show the answer that `begin` starts. Ctrl-C ends the thinking or the answer, not the conversation.

        without_answer: the notice if the answer was stopped before its text began.
        """
        stream, _ = self._follow(begin, "" if self.view.mode == "show" else "; /thought shows it", ends_thinking=True)
        if stream is not None:
            self.last_usage = stream.usage
            self.totals.add(stream.usage)
            self.used = self.conversation.tokens
        if stream is None or not stream.messages:
            self.terminal.notice(f"stopped before the answer began; {without_answer}")
        elif self.shows_statistics:
            self.terminal.notice(statistics(stream, self.context_usage()))

    def _begin_question(self, watch: list[Watch]) -> ChatStream:
        assert self.unanswered is not None
        options = self.settings.options | self.unanswered.options
        return self.conversation.stream(self.unanswered.text, **options, watch=watch)

    def _follow(self, begin: Begin, hint: str = "", *, ends_thinking: bool) -> tuple[ChatStream | None, bool]:
        """Show an answer; returns its stream, None if it was stopped before there was one, and whether it was stopped.

        Whatever happens, the answer's text is part of the conversation afterwards, and is saved.
        """
        ends_thinking = ends_thinking and self.model.tokenizer.token_id(CLOSE) is not None
        interrupts = AnswerInterrupts(ends_thinking, self.view.announce_end_of_thinking)
        thinking_hint = "Ctrl-C: answer now" if ends_thinking else ""
        stream: ChatStream | None = None
        interrupted = False
        with self.terminal.echo_off(), interrupts.handled():
            self.save_automatically()  # the question, in case the process dies before the answer
            try:
                with interrupts.raising():
                    stream = begin([interrupts.watch])
                    self.view.follow(stream, hint, thinking_hint)
            except KeyboardInterrupt:
                interrupted = True
            finally:
                if stream is not None:
                    stream.close()
                    if stream.messages:
                        self.last_temperature = stream.temperature
                    if stream.messages and self.unanswered is not None:
                        self.retries, self.question_options, self.unanswered = 0, self.unanswered.options, None
                self.save_automatically()
        return stream, interrupted

    def forget_last(self) -> None:
        """Forget the state of the last question, which has changed: retries, its options, the context in use."""
        self.retries, self.question_options, self.used, self.unanswered = 0, {}, None, None
        self.last_temperature = None

    def saved(self) -> SavedConversation:
        """The conversation and its settings as files keep them."""
        unanswered = None if self.unanswered is None else self.unanswered.text
        return self.conversation.saved(model=self.name, options=self.settings.plain, unanswered=unanswered)

    def save_automatically(self) -> None:
        """Save the conversation where `--continue` finds it; remove its file if empty. A failure is reported once."""
        if self.autosave is None:
            return
        saved = self.saved()
        if saved.unanswered is None and all(message["role"] == "system" for message in saved.messages):
            self.autosave.forget()
            return
        try:
            self.autosave.save(saved)
            self._autosave_failed = False
        except OutputError as error:
            if not self._autosave_failed:
                self.terminal.notice(f"this conversation is not being saved: {error}")
            self._autosave_failed = True

    def restore(self, saved: SavedConversation, path: Path) -> None:
        """Continue the conversation and the settings that were read from `path`.

        Settings that this model does not support are left out, and named.
        """
        loaded = Conversation.restore(self.model, saved, path, **self.conversation_options)
        problems = [] if saved.options is None else self.settings.replace(saved.options)
        try:
            loaded.thinking = loaded.thinking
        except OptionError:
            problems.append(f"thinking {'on' if loaded.thinking else 'off'}; this model cannot be switched to it")
            loaded.thinking = None
        self.conversation = loaded
        self.forget_last()
        if saved.unanswered is not None:
            self.unanswered = Question(saved.unanswered)
        self.used = loaded.tokens or None  # without a saved cache, unknown until the messages are read
        if saved.model not in (None, self.name):
            self.terminal.notice(f"this conversation was held with {shortened(saved.model)}; {self.name} continues it")
        for problem in problems:
            self.terminal.notice(f"a saved setting is ignored: {problem}")

    def context_usage(self) -> str:
        """How much of the context is in use; empty while that is unknown."""
        limit = self.model.context
        return "" if self.used is None else f"context {self.used:,} of {limit:,} ({100 * self.used / limit:.0f}%)"
