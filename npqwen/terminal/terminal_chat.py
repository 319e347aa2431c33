"""A conversation in the terminal: its state, asking a question, showing an answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from npqwen.chat.conversation import Conversation
from npqwen.terminal.answer_view import AnswerView, statistics
from npqwen.terminal.interrupts import one_interrupt
from npqwen.terminal.settings import Settings
from npqwen.terminal.terminal import Terminal

if TYPE_CHECKING:
    from npqwen.chat.chat_stream import ChatStream
    from npqwen.generation.completion import Usage
    from npqwen.model import Model


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


class TerminalChat:
    """One conversation with `model`, shown on `terminal`.

    view: shows the answers. settings: the generation options. system, thinking: as for a `Conversation`, which is the
    attribute `conversation`. name: the model's name to show.
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
    ) -> None:
        self.model = model
        self.terminal = terminal
        self.view = view
        self.settings = settings
        self.name = name
        self.conversation = Conversation(model, system, **self.conversation_options)
        self.conversation.thinking = thinking
        self.file: str | None = None
        """Where the conversation was last saved to or loaded from."""
        self.totals = Totals()
        self.last_usage: Usage | None = None
        self.retries = 0
        """How often the last question was asked again."""
        self.question_options: dict[str, Any] = {}
        """Options of the last question alone."""
        self.used: int | None = None
        """How many tokens of the context are in use, if that is known."""
        self.finished = False

    @property
    def conversation_options(self) -> dict[str, Any]:
        """Options of every conversation in this terminal."""
        return {"progress": self.terminal.prompt_progress}

    def ask(self, question: str, **options: Any) -> None:
        """Ask, and show the answer. `options` are for this question only."""
        if self.answer(lambda: self.conversation.stream(question, **self.settings.options | options)):
            self.retries, self.question_options = 0, options

    def forget_last(self) -> None:
        """Forget the state of the last question, which has changed: retries, its options, the context in use."""
        self.retries, self.question_options, self.used = 0, {}, None

    def answer(self, begin: Callable[[], ChatStream], without_answer: str = "the question is taken back") -> bool:
        """Show the answer that `begin` starts; Ctrl-C ends the answer only. Returns whether it has any text.

        without_answer: says what happened to the conversation if there was no text.
        """
        hint = "" if self.view.mode == "show" else "; /thought shows it"
        with self.terminal.echo_off(), one_interrupt():
            stream = begin()
            try:
                self.view.follow(stream, hint)
            except KeyboardInterrupt:
                pass
            finally:
                stream.close()
        self.last_usage = stream.usage
        self.totals.add(stream.usage)
        self.used = self.conversation.tokens
        self.terminal.notice(statistics(stream, self.context_usage()))
        if not stream.messages:
            self.terminal.notice(f"stopped before the answer began: {without_answer}")
        return bool(stream.messages)

    def context_usage(self) -> str:
        """How much of the context is in use; empty while that is unknown."""
        limit = self.model.context
        return "" if self.used is None else f"context {self.used:,} of {limit:,} ({100 * self.used / limit:.0f} %)"
