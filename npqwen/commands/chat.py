"""The command `npqwen chat`."""

from __future__ import annotations

import sys
import warnings
from contextlib import closing
from typing import TYPE_CHECKING, Any

import click

from npqwen.commands.options import Command, argument_text, generation_options, model_options, open_model, stdin_text
from npqwen.errors import OptionError, SamplingWarning
from npqwen.generation.options import CHAT_DEFAULTS, check_options
from npqwen.terminal.terminal import Terminal

if TYPE_CHECKING:
    from npqwen.terminal.reasoning_view import ReasoningMode
    from npqwen.terminal.terminal_chat import TerminalChat


@click.command(cls=Command)
@click.argument("model")
@click.argument("question", required=False)
@click.option("--system", metavar="TEXT", help="The system message.")
@click.option("--think/--no-think", "thinking", default=None, help="Whether to think before answering.")
@click.option(
    "--show-thinking/--hide-thinking",
    "show",
    default=None,
    help="Leave the reasoning on the screen, or hide it; default: fold it into one line when it ends.",
)
@generation_options(CHAT_DEFAULTS)
@model_options
def chat(
    model: str,
    question: str | None,
    system: str | None,
    thinking: bool | None,
    show: bool | None,
    bits: int | None,
    threads: int | None,
    context: int | None,
    yarn: float | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Chat with MODEL in the terminal, or answer one QUESTION.

    In the terminal, /help lists the commands. With a QUESTION, or text on stdin, or both (the text is then appended
    to the question), there is one answer: its text to stdout, everything else to stderr. By default, sampling
    is as the model's authors recommend, with or without thinking.
    """
    check_options(options)
    message = _single_message(question)
    mode: ReasoningMode = "fold" if show is None else "show" if show else "hide"
    system = None if system is None else argument_text(system)
    with (
        Terminal(quiet=quiet) as terminal,
        closing(open_model(model, bits, threads, context, terminal, yarn)) as loaded,
        warnings.catch_warnings(),
    ):
        from npqwen.terminal.answer_view import AnswerView
        from npqwen.terminal.interrupts import restored_terminal
        from npqwen.terminal.settings import Settings
        from npqwen.terminal.terminal_chat import TerminalChat

        warnings.simplefilter("ignore", SamplingWarning)  # the answer has a notice that says the same
        view = AnswerView(terminal, mode)
        settings = Settings(loaded, **options)
        session = TerminalChat(loaded, terminal, view, settings, system=system, thinking=thinking, name=model)
        with restored_terminal():
            if message is None:
                converse(session)
            else:
                _answer(session, message)


def _single_message(question: str | None) -> str | None:
    """The one message to answer, from the argument and stdin; None for a conversation in the terminal."""
    text = None if question in (None, "-") else argument_text(question or "")
    if question == "-" or not sys.stdin.isatty():
        piped = stdin_text()
        text = piped if text is None else f"{text}\n\n{piped}" if piped.strip() else text
    if text is not None and not text.strip():
        raise OptionError("there is no question: the argument or stdin is empty")
    return text


def _answer(chat: TerminalChat, message: str) -> None:
    """Answer one message. Ctrl-C and errors end the command."""
    from npqwen.terminal.answer_view import statistics

    with chat.terminal.echo_off():
        stream = chat.conversation.stream(message, **chat.settings.options)
        chat.view.follow(stream)
    chat.terminal.notice(statistics(stream))


def converse(chat: TerminalChat) -> None:
    """Hold a conversation in the terminal, with a history from earlier runs."""
    from npqwen.cache_directory import cache_directory
    from npqwen.terminal.history import History
    from npqwen.terminal.line_editor import message_reader
    from npqwen.terminal.repl import run
    from npqwen.terminal.slash_commands import completions

    history = History(cache_directory() / "history")
    reader = message_reader(history, completions)
    terminal = chat.terminal
    terminal.notice(
        f"{chat.name}, {chat.model.bits} bits per weight, context {chat.model.context:,}; "
        "/help lists the commands, Ctrl-D leaves"
    )
    readable = history.kept
    if not readable:
        terminal.notice(f"{history.path} cannot be read: there is no history of earlier conversations")
    terminal.blank_line()
    run(chat, reader)
    if readable and not history.kept:
        terminal.notice(f"{history.path} cannot be written: the history will lack what was entered now")
