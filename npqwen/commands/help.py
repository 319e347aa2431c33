"""The command `npqwen help`."""

from __future__ import annotations

import shutil
import sys

import click
from click.shell_completion import CompletionItem

from npqwen.commands.options import Command, argument_text
from npqwen.terminal.answer_text import rendered
from npqwen.terminal.documents import PAGES, Documents
from npqwen.terminal.terminal import Terminal

_WIDEST = 100
"""Most columns to which text is wrapped: longer rows are hard to read."""


def _topics(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    root = ctx.find_root().command
    names = [*PAGES, *(root.list_commands(ctx) if isinstance(root, click.Group) else ())]
    return [CompletionItem(name) for name in sorted(names) if name.startswith(incomplete)]


@click.command(cls=Command, context_settings={"ignore_unknown_options": True})  # --bits is a topic
@click.argument("topic", nargs=-1, shell_complete=_topics)
@click.pass_context
def help(ctx: click.Context, topic: tuple[str, ...]) -> None:
    """Show the documentation of TOPIC: a page, a section, an option, a command, or words of the text. Without TOPIC,
    list the pages and sections.

    \b
    npqwen help server
    npqwen help sampling
    npqwen help memory
    npqwen help temperature
    npqwen help --bits
    npqwen help chat

    On a terminal, long texts are shown by $PAGER; in a file or pipe, they are Markdown.
    """
    root = ctx.find_root()
    terminal = Terminal()
    words = argument_text(" ".join(topic))
    command = root.command.get_command(root, words) if isinstance(root.command, click.Group) else None
    if command is not None:
        with click.Context(command, info_name=words, parent=root) as below:
            terminal.text(f"{command.get_help(below)}\n")
        return
    documents = Documents()
    found = documents.named(words) if not words or words.startswith("-") else documents.headed(words)
    if words and not found:
        if flags := _flags(root, words):
            terminal.text(flags)
            return
        found = documents.find(words)
    if not words:
        _show(terminal, documents.listing(), documents.listing())
    elif len(found) == 1:
        _show(terminal, found[0].text, documents.for_terminal(found[0]))
    else:
        lines = "".join(f"npqwen help {one.topic}\n" for one in found)
        terminal.text(f"{len(found)} sections match:\n\n{lines}")


def _flags(root: click.Context, name: str) -> str:
    """The help of the commands' flags of a name, "bits" or "--bits", those with the same help together."""
    flag = f"--{name.lstrip('-').replace('_', '-')}"
    commands: dict[tuple[str, str], list[str]] = {}
    assert isinstance(root.command, click.Group)
    for command_name in root.command.list_commands(root):
        command = root.command.get_command(root, command_name)
        assert command is not None
        with click.Context(command, info_name=command_name, parent=root) as below:
            for parameter in command.params:
                record = parameter.get_help_record(below) if flag in parameter.opts else None
                if record is not None:
                    commands.setdefault(record, []).append(command_name)
    return "\n".join(f"{flags}\n  {help}\n  of {', '.join(names)}\n" for (flags, help), names in commands.items())


def _show(terminal: Terminal, exact: str, readable: str) -> None:
    """Write Markdown: exact to a file or pipe, rendered on a terminal, in a pager if taller than the terminal."""
    if not sys.stdout.isatty():
        terminal.text(exact)
        return
    size = shutil.get_terminal_size()
    shown = rendered(readable, min(size.columns, _WIDEST), terminal.styles_text) if terminal.draws_text else readable
    if shown.count("\n") < size.lines:
        terminal.write_text(shown)
    else:
        click.echo_via_pager(shown)  # with styles if it is `less`
