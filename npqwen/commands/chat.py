"""The command `npqwen chat`."""

from __future__ import annotations

import sys
import warnings
from contextlib import closing
from typing import TYPE_CHECKING, Any

import click

from npqwen.commands.options import argument_text, model_options, open_model, sampling_options, stdin_text
from npqwen.errors import OptionError, SamplingWarning

if TYPE_CHECKING:
    from npqwen.model import Model
    from npqwen.terminal.screen import Terminal
    from npqwen.terminal.talk import Talk
    from npqwen.terminal.thought_view import View


@click.command()
@click.argument("model")
@click.argument("question", required=False)
@click.option("--system", metavar="TEXT", help="What the model is told first.")
@click.option("--think/--no-think", "thinking", default=None, help="A thought before answers, or none.")
@click.option("--thinking-budget", type=int, metavar="N", help="End a thought after N tokens, and answer.")
@click.option(
    "--show-thinking/--hide-thinking",
    "show",
    default=None,
    help="Leave thoughts on the screen, or show none; default: fold them when they are over.",
)
@click.option("--max-tokens", type=int, metavar="N", help="At most N tokens an answer.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End an answer before this text; may be repeated.")
@click.option("--loop-guard/--no-loop-guard", default=None, help="End what repeats itself; default: on.")
@sampling_options
@model_options
def chat(
    model: str,
    question: str | None,
    system: str | None,
    thinking: bool | None,
    show: bool | None,
    stop: tuple[str, ...],
    bits: int | None,
    threads: int | None,
    context: int | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Talk to MODEL in the terminal, or have QUESTION answered.

    In the terminal, /help lists the commands. With QUESTION, or text on stdin, or both (the text is then put behind the
    question), there is one answer: its text to stdout, everything else to stderr. Sampling options that are not given
    are what the model's authors advise with or without thinking.
    """
    from npqwen.generation.options import check_options
    from npqwen.terminal.console import Console

    if stop:
        options["stop"] = [argument_text(text) for text in stop]
    check_options(options)
    said = _said(question)
    view: View = "fold" if show is None else "show" if show else "hide"
    told = None if system is None else argument_text(system)
    with Console(quiet=quiet) as console, closing(open_model(model, bits, threads, context, console)) as loaded:
        from npqwen.terminal.screen import Terminal

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SamplingWarning)  # There is a notice of it.
            talk = _talk(loaded, Terminal(console), view, options, told, thinking, model)
            if said is None:
                _converse(talk)
            else:
                _answer(talk, said)


def _said(question: str | None) -> str | None:
    """The one message there is to answer, from the argument and stdin; None for a conversation in the terminal."""
    text = None if question in (None, "-") else argument_text(question or "")
    if question == "-" or not sys.stdin.isatty():
        piped = stdin_text()
        text = piped if text is None else f"{text}\n\n{piped}" if piped.strip() else text
    if text is not None and not text.strip():
        raise OptionError("there is no question: the argument or stdin is empty")
    return text


def _talk(
    model: Model,
    terminal: Terminal,
    view: View,
    options: dict[str, Any],
    system: str | None,
    thinking: bool | None,
    name: str,
) -> Talk:
    from npqwen.terminal.answer_view import AnswerView
    from npqwen.terminal.settings import Settings
    from npqwen.terminal.talk import Talk

    settings = Settings(model, **options)
    return Talk(model, terminal, AnswerView(terminal, view), settings, system=system, thinking=thinking, name=name)


def _answer(talk: Talk, said: str) -> None:
    """One answer. Ctrl-C and errors end the command."""
    from npqwen.terminal.answer_view import statistics

    with talk.terminal.quiet_keys():
        stream = talk.conversation.stream(said, **talk.settings.options)
        talk.view.follow(stream)
    talk.terminal.notice(statistics(stream))


def _converse(talk: Talk) -> None:
    from npqwen.cache_directory import cache_directory
    from npqwen.terminal.history import History
    from npqwen.terminal.prompt_line import PromptLine
    from npqwen.terminal.slash_commands import words

    history = History(cache_directory() / "history")
    line = PromptLine(history, words)
    terminal = talk.terminal
    terminal.notice(
        f"{talk.name}, {talk.model.bits} bits a weight, context {talk.model.context:,}; "
        "/help lists the commands, Ctrl-D leaves"
    )
    read = history.kept
    if not read:
        terminal.notice(f"{history.path} cannot be read: there is no history of earlier runs")
    terminal.gap()
    talk.run(line)
    if read and not history.kept:
        terminal.notice(f"{history.path} cannot be written: the history lacks what was said now")
