"""Reading messages from the terminal: line editing, several lines, paste, history, completion."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import emacs_mode, has_focus
from prompt_toolkit.history import History as EditorHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.layout.processors import TabsProcessor
from prompt_toolkit.output import Output
from prompt_toolkit.output.defaults import create_output
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.shortcuts import CompleteStyle
from prompt_toolkit.utils import get_cwidth

from npqwen.terminal.history import History
from npqwen.terminal.message_text import in_block, is_continued, is_yes, joined, message

PROMPT, CONTINUATION, CHOICE = "> ", ". ", "[y/N] "
Completions = Callable[[str], tuple[str, Iterable[str]]]
"""completions(line): for a line up to the cursor, the part at its end to replace, and the replacements."""


def message_reader(history: History, completions: Completions) -> LineEditor | PlainReader:
    """A reader for stdin, a terminal: a line editor if stdout or stderr is a terminal that it can draw on."""
    drawn = sys.stdout.isatty() or sys.stderr.isatty()
    dumb = sys.platform != "win32" and os.environ.get("TERM", "dumb") in ("dumb", "unknown")
    return LineEditor(history, completions) if drawn and not dumb else PlainReader()


class LineEditor:
    """Reads messages with an editor that has the key bindings of a shell.

    Enter sends the message, unless it ends with a backslash or has an open block of three quotes; Alt+Enter always
    adds a line. Pasted lines stay one message. Tab completes.

    input, output: the terminal, for tests.
    """

    def __init__(
        self,
        history: History | None = None,
        completions: Completions = lambda line: ("", ()),
        input: Input | None = None,
        output: Output | None = None,
    ) -> None:
        output = output or create_output(always_prefer_tty=True)
        if isinstance(output, Vt100_Output):
            # Only full-screen programs and menus need the cursor position. A late reply from the terminal would be
            # read as key presses.
            output.enable_cpr = False
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            multiline=True,
            prompt_continuation=lambda width, line, wrapped: "" if wrapped else CONTINUATION,
            history=_EditorHistory(history),
            completer=_Completer(completions),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            enable_suspend=True,
            enable_open_in_editor=True,
            input_processors=[TabsProcessor(char1=" ", char2=" ")],
            vi_mode=_vi_mode(),
            key_bindings=self._key_bindings(),
            input=input,
            output=output,
        )

    def read(self) -> str:
        """The next message. Raises EOFError at the end of the input, KeyboardInterrupt on Ctrl-C."""
        self._session.app.erase_when_done = False
        text = self._session.prompt()
        if self._session.app.erase_when_done:
            output = self._session.output
            for at, line in enumerate(text.split("\n")):
                output.write(f"{CONTINUATION if at else PROMPT}{line.expandtabs(4)}\n")
            output.flush()
        return message(text)

    def is_empty(self) -> bool:
        """After KeyboardInterrupt: whether nothing had been typed."""
        return not self._session.default_buffer.text

    def confirm(self, question: str) -> bool:
        """Whether the user answers a question with yes; Ctrl-C and Ctrl-D mean no."""
        session: PromptSession[str] = PromptSession(input=self._session.input, output=self._session.output)
        try:
            return is_yes(session.prompt(f"{question} {CHOICE}"))
        except (EOFError, KeyboardInterrupt):
            return False

    def _key_bindings(self) -> KeyBindings:
        bindings = KeyBindings()
        editing = has_focus(DEFAULT_BUFFER)  # and not searching the history

        @bindings.add("enter", filter=editing)
        def send_or_continue(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            if in_block(buffer.text):
                buffer.insert_text("\n")
            elif buffer.text.endswith("\\"):
                buffer.cursor_position = len(buffer.text)
                buffer.delete_before_cursor()
                buffer.insert_text("\n")
            else:
                self._send(buffer)

        @bindings.add("escape", "enter", filter=editing & emacs_mode)
        def add_line(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @bindings.add("c-d", filter=editing)
        def send_or_leave(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            if not buffer.text:
                event.app.exit(exception=EOFError)
            elif buffer.document.is_cursor_at_the_end and buffer.text.endswith("\n"):
                self._send(buffer)
            else:
                buffer.delete()

        @bindings.add("pageup", filter=editing)
        def page_up(event: KeyPressEvent) -> None:
            event.current_buffer.cursor_up(self._page)

        @bindings.add("pagedown", filter=editing)
        def page_down(event: KeyPressEvent) -> None:
            event.current_buffer.cursor_down(self._page)

        return bindings

    @property
    def _page(self) -> int:
        """How many lines PageUp and PageDown move."""
        return max(1, self._session.output.get_size().rows - 2)

    def _send(self, buffer: Buffer) -> None:
        """Send the message. If it is taller than the window, `read` then writes it in full."""
        size = self._session.output.get_size()
        rows = sum(1 + (len(PROMPT) + get_cwidth(line)) // size.columns for line in buffer.text.split("\n"))
        self._session.app.erase_when_done = rows > size.rows
        buffer.validate_and_handle()


class PlainReader:
    """Reads messages line by line from a terminal without escape sequences, which edits lines itself."""

    def __init__(self) -> None:
        self._text = ""

    def read(self) -> str:
        """The next message. Raises EOFError at the end of the input, KeyboardInterrupt on Ctrl-C."""
        try:
            self._text = _input(PROMPT)
            while is_continued(self._text):
                try:
                    self._text = joined(self._text, _input(CONTINUATION))
                except EOFError:  # the message ends here
                    break
        except (EOFError, KeyboardInterrupt):
            _prompt("\n")
            raise
        text, self._text = self._text, ""
        return message(text)

    def is_empty(self) -> bool:
        """After KeyboardInterrupt: whether no line of the message had been completed."""
        return not self._text

    def confirm(self, question: str) -> bool:
        """Whether the user answers a question with yes; Ctrl-C and Ctrl-D mean no."""
        try:
            return is_yes(_input(f"{question} {CHOICE}"))
        except (EOFError, KeyboardInterrupt):
            _prompt("\n")
            return False


def _input(prompt: str) -> str:
    _prompt(prompt)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def _prompt(text: str) -> None:
    stream = sys.stdout if sys.stdout.isatty() else sys.stderr
    stream.write(text)
    stream.flush()


class _EditorHistory(EditorHistory):
    """The messages of this run and, from `history`, of earlier ones."""

    def __init__(self, history: History | None) -> None:
        super().__init__()
        self._history = history
        self._earlier = [] if history is None else history.entries()

    def load_history_strings(self) -> Iterable[str]:
        return reversed(self._earlier)

    def append_string(self, string: str) -> None:
        text = message(string)
        if text.strip() and self.get_strings()[-1:] != [text]:
            super().append_string(text)

    def store_string(self, string: str) -> None:
        if self._history is not None:
            self._history.add(string)


class _Completer(Completer):
    def __init__(self, completions: Completions) -> None:
        self._completions = completions

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        part, replacements = self._completions(document.text_before_cursor)
        for replacement in replacements:
            yield Completion(replacement, start_position=-len(part))


def _vi_mode() -> bool:
    """Whether the user's configuration of readline, the shell's line editor, selects vi's keys."""
    try:
        path = Path(os.environ.get("INPUTRC") or "~/.inputrc").expanduser()
        text = path.read_text(encoding="utf-8", errors="replace")
    except (OSError, RuntimeError):  # there is no such file, or no home directory
        return False
    return re.search(r"^\s*set\s+editing-mode\s+vi\b", text, re.MULTILINE) is not None
