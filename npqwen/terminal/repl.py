"""The loop of a conversation in the terminal: read a line, run the command or answer the question."""

from __future__ import annotations

from npqwen.errors import NpqwenError
from npqwen.terminal.prompt_line import PromptLine
from npqwen.terminal.slash_commands import is_command, run_command
from npqwen.terminal.terminal_chat import TerminalChat


def run(chat: TerminalChat, line: PromptLine) -> None:
    """Read and handle messages until the user leaves."""
    warned = False
    while not chat.finished:
        try:
            message = line.read()
        except EOFError:
            chat.terminal.write_error("\n")
            return
        except KeyboardInterrupt:
            chat.terminal.write_error("\n")
            if line.is_empty():
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
        else:
            chat.ask(message)
    except NpqwenError as error:
        chat.terminal.error(str(error))
    if not chat.finished:
        chat.terminal.blank_line()
