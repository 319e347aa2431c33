"""Reading what somebody says in the terminal: line editing, history, messages of several lines."""

from __future__ import annotations

import contextlib
import io
import select
import sys
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from npqwen.terminal.history import History

if TYPE_CHECKING:
    from types import ModuleType

PROMPT, MORE = "> ", ". "
QUOTES = '"""'
Words = Callable[[str, str], Iterable[str]]
_TYPED_SECONDS = 0.02
"""No hand follows a line by the next so soon."""


class PromptLine:
    """Reads messages from the terminal, with the standard library's readline where there is one.

    A line that ends in a backslash goes on in the next, and so does one that opens a block with three quotes, alone or
    after a command, until a line ends in three quotes. Lines that are pasted together are one message.

    words(before, start): what a word that begins so may become when Tab is pressed, and what is before it in the line.
    """

    def __init__(self, history: History | None = None, words: Words = lambda before, start: ()) -> None:
        self._history = history
        self._readline = _readline()
        self._goes_on = False
        """Whether the line that is read continues a message."""
        self._pastes = False
        """Whether readline itself takes pasted lines together."""
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")
        if self._readline is not None:
            self._prepare(self._readline, words)

    def read(self) -> str:
        """The next message. Raises EOFError at the end of the input, KeyboardInterrupt on Ctrl-C."""
        self._goes_on = False
        text = self._line(PROMPT)
        while (block := _in_block(text)) or text.endswith("\\"):
            self._goes_on = True
            try:
                more = self._line(MORE)
            except EOFError:  # what there is was meant
                break
            text = f"{text if block else text[:-1]}\n{more}"
        text = _without_quotes(text)
        if text.strip():
            self._remember(text)
        return text

    def is_empty(self) -> bool:
        """After KeyboardInterrupt: whether nothing was typed of the message, as far as can be known."""
        return not self._goes_on and (self._readline is None or not self._readline.get_line_buffer())

    def _line(self, prompt: str) -> str:
        line = _clean(self._input(prompt))
        if not self._pastes:
            while _more_waits():
                try:
                    more = self._input("")
                except EOFError:  # as above
                    break
                line += "\n" + _clean(more)
        return line

    def _input(self, prompt: str) -> str:
        if sys.stdout.isatty():
            return input(prompt)
        sys.stderr.write(prompt)
        sys.stderr.flush()
        return input()

    def _remember(self, text: str) -> None:
        if self._readline is None:
            return
        count = self._readline.get_current_history_length()
        if count and self._readline.get_history_item(count) == text:
            return
        _add_history(self._readline, text)
        if self._history is not None:
            self._history.add(text)

    def _prepare(self, readline: ModuleType, words: Words) -> None:
        gnu = "libedit" not in (readline.__doc__ or "")
        # Python switches this off; what is read here is not code.
        if gnu:
            readline.parse_and_bind("set enable-bracketed-paste on")
            self._pastes = getattr(readline, "_READLINE_RUNTIME_VERSION", 0) >= 0x0700
        readline.set_auto_history(False)
        for entry in self._history.entries() if self._history is not None else ():
            _add_history(readline, entry)

        def complete(start: str, at: int) -> str | None:
            before = readline.get_line_buffer()[: readline.get_begidx()]
            return [*words(before, start), None][at]

        readline.set_completer(complete)
        readline.set_completer_delims(" \t\n")
        readline.parse_and_bind("tab: complete" if gnu else "bind ^I rl_complete")


def _readline() -> Any:
    if sys.platform == "win32":  # its console edits lines itself
        return None
    try:
        import readline
    except ImportError:
        return None
    return readline


def _add_history(readline: ModuleType, entry: str) -> None:
    with contextlib.suppress(ValueError):  # what the C library's locale cannot spell, or a NUL
        readline.add_history(entry)


def _in_block(text: str) -> bool:
    """Whether a block is open: behind at most a command's name, three quotes that no others close."""
    opened = _block(text)
    return opened is not None and not opened.rstrip().endswith(QUOTES)


def _without_quotes(text: str) -> str:
    opened = _block(text)
    if opened is None:
        return text
    inside = opened.rstrip().removesuffix(QUOTES).removeprefix("\n").removesuffix("\n")
    return text[: len(text) - len(opened) - len(QUOTES)] + inside


def _block(text: str) -> str | None:
    """What follows the three quotes that open a block, if they do."""
    start = text.lstrip()
    if start.startswith("/"):
        start = start.partition(" ")[2].lstrip()
    return start.removeprefix(QUOTES) if start.startswith(QUOTES) else None


def _clean(line: str) -> str:
    """What cannot be UTF-8 replaced, and the end of a line that some terminals paste."""
    return line.encode("utf-8", "surrogateescape").decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n")


def _more_waits() -> bool:
    """Whether another line is there already, as when several are pasted."""
    if not sys.stdin.isatty():
        return False
    if sys.platform == "win32":
        import msvcrt

        time.sleep(_TYPED_SECONDS)
        return msvcrt.kbhit()
    return bool(select.select([sys.stdin.fileno()], [], [], _TYPED_SECONDS)[0])
