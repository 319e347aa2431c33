"""A conversation in the terminal: reads, answers, obeys commands, until somebody leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from npqwen.chat.conversation import Conversation
from npqwen.errors import NpqwenError
from npqwen.terminal.answer_view import AnswerView, statistics
from npqwen.terminal.interrupts import one_interrupt
from npqwen.terminal.prompt_line import PromptLine
from npqwen.terminal.screen import Terminal
from npqwen.terminal.settings import Settings
from npqwen.terminal.slash_commands import is_command, run_command

if TYPE_CHECKING:
    from npqwen.chat.answer import ChatStream
    from npqwen.generation.completion import Usage
    from npqwen.model import Model


@dataclass
class Totals:
    """What all answers cost together."""

    answers: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0

    def add(self, usage: Usage) -> None:
        self.answers += 1
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += usage.cached_tokens
        self.generated_tokens += usage.generated_tokens
        self.seconds += usage.first_token_seconds + usage.decode_seconds


class Talk:
    """One conversation with `model`, shown on `terminal`.

    view: shows the answers. settings: options of generation. system, thinking: as for a `Conversation`, which is there
    as `conversation`. name: what the model is called.
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
        self.conversation = Conversation(model, system, **self.fixed)
        self.conversation.thinking = thinking
        self.file: str | None = None
        """Where it was saved or loaded last."""
        self.totals = Totals()
        self.last: Usage | None = None
        self.tries = 0
        """How often the last question was answered anew."""
        self.once: dict[str, Any] = {}
        """Options that the last question was asked with, for its answers only."""
        self.used: int | None = None
        """Tokens of the context that are in use, as far as that is known."""
        self.over = False

    @property
    def fixed(self) -> dict[str, Any]:
        """Options of every conversation here."""
        return {"progress": self.terminal.console.reading}

    def run(self, line: PromptLine) -> None:
        """Read and answer until somebody leaves."""
        warned = False
        while not self.over:
            try:
                said = line.read()
            except EOFError:
                self.terminal.error_text("\n")
                return
            except KeyboardInterrupt:
                self.terminal.error_text("\n")
                if line.is_empty():
                    if warned:
                        return
                    warned = True
                    self.terminal.notice("Ctrl-C once more, or Ctrl-D, leaves")
                continue
            warned = False
            try:
                self.obey(said)
            except KeyboardInterrupt:
                self.terminal.notice("stopped")

    def obey(self, said: str) -> None:
        """Do what a line asks for: a command, or an answer. Errors become a line."""
        if not said.strip():
            return
        try:
            if is_command(said):
                run_command(self, said)
            else:
                self.ask(said)
        except NpqwenError as error:
            self.terminal.error(str(error))
        if not self.over:
            self.terminal.gap()

    def ask(self, question: str, **options: Any) -> None:
        """Say something and show the answer; options are for this answer only."""
        if self.answer(lambda: self.conversation.stream(question, **self.settings.options | options)):
            self.tries, self.once = 0, options

    def forget_last(self) -> None:
        """The last question is another one, or none: what is known of its answers holds no more."""
        self.tries, self.once, self.used = 0, {}, None

    def answer(self, begin: Callable[[], ChatStream], otherwise: str = "the question is taken back") -> bool:
        """Show an answer. Ctrl-C ends it and nothing else. Returns whether there is any of it.

        otherwise: what happened if there is none.
        """
        hint = "" if self.view.thought else "; /thought shows it"
        with self.terminal.quiet_keys(), one_interrupt():
            stream = begin()
            try:
                self.view.follow(stream, hint)
            except KeyboardInterrupt:
                pass
            finally:
                stream.close()
        self.last = stream.usage
        self.totals.add(stream.usage)
        self.used = self.conversation.tokens
        self.terminal.notice(statistics(stream, self.context()))
        if not stream.messages:
            self.terminal.notice(f"there was no answer yet: {otherwise}")
        return bool(stream.messages)

    def context(self) -> str:
        """How much of the context is in use; empty if that is not known before the next answer."""
        most = self.model.context
        return "" if self.used is None else f"context {self.used:,} of {most:,} ({100 * self.used / most:.0f} %)"
