"""The command `npqwen chat`."""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import closing
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import click

from npqwen.commands.loading import (
    Loading,
    adapter_option,
    draft_option,
    model_options,
    open_model,
    prefix_cache_options,
)
from npqwen.commands.options import (
    Command,
    Switch,
    argument_text,
    generation_options,
    keyboard_notice,
    stdin_text,
)
from npqwen.errors import OptionError, SamplingWarning
from npqwen.generation.options import CHAT_DEFAULTS, check_options
from npqwen.terminal.terminal import Terminal
from npqwen.wording import counted

if TYPE_CHECKING:

    from npqwen.terminal.autosave import Autosave
    from npqwen.terminal.reasoning_view import ReasoningMode
    from npqwen.terminal.terminal_chat import TerminalChat

_WAITING = (
    "waiting for text on stdin, which is appended to the question; "
    "to ask without it, " + ("use $null | npqwen chat ..." if sys.platform == "win32" else f"add < {os.devnull}")
)


class _Chat(Command):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for flag, value in pairwise(args):
            if flag == "-c" and value.isdecimal():  # llama.cpp's context
                raise OptionError(
                    f"-c continues the last conversation; for a context of {value} tokens, write --context {value}"
                )
        return super().parse_args(ctx, args)


@click.command(cls=_Chat)
@click.argument("model")
@click.argument("question", required=False)
@click.option("--system", metavar="TEXT", help="The system message.")
@click.option(
    "--think/--no-think",
    "thinking",
    cls=Switch,
    default=None,
    help="Whether to think before answering; default: the model's own.",
)
@click.option(
    "--show-thinking/--hide-thinking",
    "show",
    cls=Switch,
    default=None,
    help="Leave the reasoning on the screen, or hide it; default: fold it into one line when it ends.",
)
@click.option("--no-markdown", "plain", is_flag=True, help="Show answers as they are written, Markdown unrendered.")
@click.option("--continue", "-c", "continues", is_flag=True, help="Continue the last conversation.")
@click.option("--no-save", is_flag=True, help="Keep neither the conversation nor what is typed.")
@generation_options(CHAT_DEFAULTS)
@draft_option
@adapter_option
@prefix_cache_options
@model_options
def chat(
    model: str,
    question: str | None,
    continues: bool,
    no_save: bool,
    system: str | None,
    thinking: bool | None,
    show: bool | None,
    plain: bool,
    loading: Loading,
    quiet: bool,
    **options: Any,
) -> None:
    """Chat with MODEL in the terminal, or answer one QUESTION.

    In the terminal, /help lists the commands. With a QUESTION, or text on stdin, or both (the text is then appended
    to the question), there is one answer: its text to stdout, everything else to stderr. By default, sampling
    is as the model's authors recommend, with or without thinking.

    With --adapter answers use that adapter, the first of several; /set adapter NAME chooses another, and /set adapter
    default none.

    Conversations in the terminal are saved in the cache, readable by you alone; --continue finds the last one with
    MODEL, or else the last one.
    """
    options["adapter"] = loading.first_adapter
    check_options(options)
    terminal = Terminal(quiet=quiet)
    message = _single_message(question, terminal)
    mode: ReasoningMode = "fold" if show is None else "show" if show else "hide"
    system = None if system is None else argument_text(system)
    with (
        terminal,
        closing(open_model(model, loading, terminal, purpose="chat")) as loaded,
        warnings.catch_warnings(),
    ):
        from npqwen.cache_directory import cache_directory
        from npqwen.terminal.answer_view import AnswerView
        from npqwen.terminal.autosave import Autosave
        from npqwen.terminal.interrupts import restored_terminal
        from npqwen.terminal.settings import Settings
        from npqwen.terminal.terminal_chat import TerminalChat

        warnings.simplefilter("ignore", SamplingWarning)  # the answer has a notice that says the same
        saves = not no_save and (continues or message is None or _interactive())
        autosave = Autosave(cache_directory() / "conversations") if saves or continues else None
        session = TerminalChat(
            loaded,
            terminal,
            AnswerView(terminal, mode, markdown=not plain),
            Settings(loaded, **options),
            system=system,
            thinking=thinking,
            name=loaded.name,
            autosave=autosave if saves else None,
        )
        continued = continues and autosave is not None and _continue(session, autosave)
        if continued:
            session.settings.update(options)
            if system is not None:
                session.conversation.system = system
            if thinking is not None:
                session.conversation.thinking = thinking
        with restored_terminal():
            if message is None:
                converse(session, keep_history=not no_save, continued=continued)
            else:
                if continued:
                    _tell_continued(session)
                session.ask_once(message, ends_thinking=_interactive())


def _single_message(question: str | None, terminal: Terminal) -> str | None:
    """The one message to answer, from the argument and stdin; None for a conversation in the terminal."""
    text = None if question in (None, "-") else argument_text(question or "")
    if question == "-" or not sys.stdin.isatty():
        piped = stdin_text(terminal, keyboard_notice("the question") if text is None else _WAITING)
        text = piped if text is None else f"{text}\n\n{piped}" if piped.strip() else text
    if text is not None and not text.strip():
        raise OptionError("there is no question: the argument or stdin is empty")
    return text


def _interactive() -> bool:
    """Whether a user sees the answer stream, and can press Ctrl-C to end only the thinking, not the command."""
    return sys.stdin.isatty() and sys.stdout.isatty() and sys.stderr.isatty()


def _continue(chat: TerminalChat, autosave: Autosave) -> bool:
    """Restore the last conversation with this model, or else the last one; returns whether there is one."""
    last, problems = autosave.last(chat.name)
    for problem in problems:
        chat.terminal.notice(f"skipped: {problem}")
    if last is None:
        chat.terminal.notice("there is no earlier conversation; this is a new one")
        return False
    chat.restore(*last)
    return True


def _tell_continued(chat: TerminalChat) -> None:
    count = sum(message["role"] != "system" for message in chat.conversation.messages)
    chat.terminal.notice(f"continuing the last conversation: {counted(count, 'message')}")


def converse(chat: TerminalChat, *, keep_history: bool = True, continued: bool = False) -> None:
    """Hold a conversation in the terminal, with a history from earlier runs.

    keep_history: whether what is typed is added to it. continued: show the end of the conversation so far.
    """
    from npqwen.cache_directory import cache_directory
    from npqwen.terminal.completions import completions
    from npqwen.terminal.file_commands import show_last_turns
    from npqwen.terminal.history import History
    from npqwen.terminal.line_editor import message_reader
    from npqwen.terminal.repl import run

    history = History(cache_directory() / "history")
    history.enabled = keep_history
    if keep_history:
        chat.history = history
    reader = message_reader(history, completions)
    terminal = chat.terminal
    terminal.notice(
        f"{chat.name}, {chat.model.bits} bits per weight, context {chat.model.context:,}; "
        "/help lists the commands, Ctrl-D leaves"
    )
    readable = history.kept
    if not readable:
        terminal.notice(f"{history.path} cannot be read: there is no history of earlier conversations")
    if continued:
        _tell_continued(chat)
        show_last_turns(chat)
    terminal.blank_line()
    run(chat, reader)
    if readable and not history.kept:
        terminal.notice(f"{history.path} cannot be written: what you typed is not in the history")
