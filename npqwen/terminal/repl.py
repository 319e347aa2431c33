"""The loop of a conversation in the terminal: read a message, run the command or answer the question."""

from __future__ import annotations

from typing import Protocol

from npqwen.errors import NpqwenError
from npqwen.terminal.slash_commands import answer_to_word, is_command, run_command
from npqwen.terminal.terminal_chat import TerminalChat


class MessageReader(Protocol):
    """Where the messages of a conversation come from."""

    def read(self) -> str:
        """The next message. Raises EOFError at the end of the input, KeyboardInterrupt on Ctrl-C."""

    def is_empty(self) -> bool:
        """After KeyboardInterrupt: whether nothing had been typed, as far as is known."""

    def confirm(self, question: str) -> bool:
        """Whether the user answers a question with yes; Ctrl-C and the end of the input mean no."""


def run(chat: TerminalChat, reader: MessageReader) -> None:
    """Read and handle messages until the user leaves."""
    chat.confirm = reader.confirm
    warned = False
    while not chat.finished:
        try:
            message = reader.read()
        except EOFError:
            return
        except KeyboardInterrupt:
            if reader.is_empty():
                if warned:
                    return
                warned = True
                chat.terminal.notice("press Ctrl-C again, or Ctrl-D, to leave")
            continue
        warned = False
        try:
            handle(chat, message)
        except KeyboardInterrupt:
            chat.terminal.notice("stopped")


def handle(chat: TerminalChat, message: str) -> None:
    """Run a command or answer a question. An error is shown as one line."""
    if not message.strip():
        return
    try:
        if is_command(message):
            run_command(chat, message)
        elif hint := answer_to_word(message):
            chat.terminal.lines(hint)
        else:
            chat.ask(message)
    except NpqwenError as error:
        chat.terminal.error(str(error))
    chat.save_automatically()
    if not chat.finished:
        chat.terminal.blank_line()
