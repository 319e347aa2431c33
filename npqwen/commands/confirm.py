"""Confirmation before something is removed."""

from __future__ import annotations

import sys

import click

from npqwen.errors import OptionError
from npqwen.terminal.terminal import Terminal

yes_option = click.option("--yes", "-y", is_flag=True, help="Do not ask.")


def confirm(question: str, yes: bool, terminal: Terminal) -> bool:
    """Whether the user agrees: True with `yes`, else as answered on the terminal; Enter alone means no.

    Raises OptionError if stdin is not a terminal, so that nobody could answer.
    """
    if yes:
        return True
    if not sys.stdin.isatty():
        raise OptionError("nothing was removed, since stdin is not a terminal to ask on; confirm with --yes")
    terminal.write_error(f"{question} [y/N] ")
    agreed = sys.stdin.readline().strip().lower() in ("y", "yes")
    if not agreed:
        terminal.lines("nothing was removed")
    return agreed
