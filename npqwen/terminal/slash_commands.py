"""The slash commands of a conversation in a terminal."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from npqwen.chat.messages import joined
from npqwen.checks import near_names
from npqwen.errors import OptionError
from npqwen.terminal.answer_view import draft_tokens
from npqwen.terminal.file_commands import load, save
from npqwen.terminal.setting_commands import nothink, set_, show, system, think
from npqwen.terminal.terminal_chat import TerminalChat
from npqwen.wording import alternatives, counted

if TYPE_CHECKING:
    from npqwen.chat.chat_stream import ChatStream
    from npqwen.generation.watched import Watch

_COMMAND = re.compile(r"/([\w-]*\??)(?:\s+|$)")
_WORDS = {
    "exit": "type /exit or press Ctrl-D to leave",
    "quit": "type /exit or press Ctrl-D to leave",
    "help": "type /help for the list of commands",
}
"""The replies to a message that is just one of these words."""


@dataclasses.dataclass(frozen=True)
class Command:
    """A slash command. usage: its arguments, for /help. run(chat, arguments): executes it; may raise NpqwenError."""

    usage: str
    help: str
    run: Callable[[TerminalChat, str], None]


def answer_to_word(message: str) -> str | None:
    """What to say to a message that is meant for this program, not for the model: `exit`, `quit()`, `help`."""
    hint = _WORDS.get(message.rstrip().lower().removesuffix("()"))
    return hint and f"{hint} (to send the word as a message, put a space before it)"


def is_command(message: str) -> bool:
    """Whether a message is a command: a slash and a word; in a multi-line message, only a known one."""
    found = _COMMAND.match(message)
    return found is not None and ("\n" not in message.strip() or command_name(found[1]) in COMMANDS)


def run_command(chat: TerminalChat, message: str) -> None:
    """Run a command. Raises OptionError for an unknown one, with a suggestion."""
    found = _COMMAND.match(message)
    assert found is not None
    name = command_name(found[1])
    command = COMMANDS.get(name)
    if command is None:
        if name in _SHELL_COMMANDS:
            raise OptionError(f"unknown command /{name}; leave the chat and type npqwen {name}")
        near = dict.fromkeys(f"/{command_name(other)}" for other in near_names(name, [*COMMANDS, *_ALIASES]))
        hint = f"did you mean {alternatives(list(near))}?" if near else "/help lists the commands"
        raise OptionError(f"unknown command /{found[1]}; {hint} (to send it as a message, put a space before it)")
    arguments = message[found.end() :].strip()
    if arguments and not command.usage:
        raise OptionError(f"/{name} takes no arguments")
    command.run(chat, arguments)


def command_name(word: str) -> str:
    """The name in `COMMANDS`, for an alias or another spelling; it may be unknown."""
    name = word.lower().replace("-", "_")
    return _ALIASES.get(name, name)


def _help(chat: TerminalChat, arguments: str) -> None:
    name = command_name(arguments.removeprefix("/"))
    if name and name not in COMMANDS:
        raise OptionError(f"there is no command /{name}; /help lists all of them")
    width = max(len(f"/{name} {command.usage}") for name, command in COMMANDS.items()) + 2
    for other, command in COMMANDS.items():
        if name in ("", other):
            chat.terminal.lines(f"  {f'/{other} {command.usage}'.strip():<{width}}{command.help}")
    if not name:
        chat.terminal.lines(f"\n{_KEYS}")


_KEYS = (
    'Alt+Enter, or Enter after a \\, begins a new line; or put """ before and after a message of several lines. Pasted '
    "lines stay one message. Tab completes, arrows recall, Ctrl-X Ctrl-E opens an editor. While the model thinks, "
    "Ctrl-C makes it answer now; otherwise it stops the answer. Ctrl-D leaves."
)


REASONING_MODES = {"fold": "folded into one line", "show": "left on the screen", "hide": "hidden"}


def _thought(chat: TerminalChat, arguments: str) -> None:
    if arguments in ("fold", "show", "hide"):
        chat.view.mode = arguments  # type: ignore[assignment]
        chat.terminal.notice(f"reasoning is {REASONING_MODES[arguments]} from now on")
    elif arguments:
        raise OptionError(f"/thought {arguments}: give fold, show or hide, or nothing")
    elif not chat.view.reasoning:
        raise OptionError("there has been no reasoning yet")
    else:
        chat.terminal.lines(chat.view.reasoning, dim=True)


def _markdown(chat: TerminalChat, arguments: str) -> None:
    if arguments not in ("", "on", "off"):
        raise OptionError(f"/markdown {arguments}: give on or off, or nothing")
    if arguments:
        chat.view.markdown = arguments == "on"
    chat.terminal.notice(f"Markdown is {'rendered' if chat.view.markdown else 'shown as it is written'}")


def _retry(chat: TerminalChat, arguments: str) -> None:
    if chat.unanswered is not None:
        chat.ask(chat.unanswered.text, **chat.unanswered.options)
        return
    options = chat.settings.options | chat.question_options
    chat.retries += 1
    if options.get("seed") is not None:
        options["seed"] += chat.retries  # the seed itself would give the same answer

    def begin(watch: list[Watch]) -> ChatStream:
        stream = chat.conversation.stream_retry(**options, watch=watch)
        if stream.temperature == chat.last_temperature == 0:
            chat.terminal.notice(
                "with temperature 0 the answer will be the same; /set temperature 0.7 allows other answers"
            )
        return stream

    chat.answer(begin, "the previous answer is kept")


def _undo(chat: TerminalChat, arguments: str) -> None:
    if chat.unanswered is not None:
        taken, chat.unanswered = chat.unanswered.text, None
    else:
        taken = joined({"content": chat.conversation.undo()})["content"]
        chat.forget_last()
    question = " ".join(taken.split())
    chat.terminal.notice(f"taken back: {question if len(question) <= 60 else question[:57] + '...'}")


def _clear(chat: TerminalChat, arguments: str) -> None:
    chat.conversation.clear()
    chat.forget_last()
    kept = "; the system message stays" if chat.conversation.system else ""
    chat.terminal.notice(f"the conversation is cleared{kept}")


def _stats(chat: TerminalChat, arguments: str) -> None:
    model, totals, last = chat.model, chat.totals, chat.last_usage
    thinking = {True: "on", False: "off", None: "the model's default"}[chat.conversation.thinking]
    dropped = chat.conversation.dropped
    hidden = f", the oldest {dropped} no longer shown to the model" if dropped else ""
    lines = [
        f"model         {chat.name}, {model.bits} bits per weight, {counted(model.threads, 'thread')}",
        f"thinking      {thinking}",
        f"conversation  {counted(len(chat.conversation.messages), 'message')}{hidden}",
    ]
    if context := chat.context_usage():
        size = f"{chat.conversation.cache_bytes / 1e6:.1f} MB"
        lines.append(f"{context.replace('context ', 'context       ', 1)}, {size}")
    if last is not None:
        new = last.prompt_tokens - last.cached_tokens
        lines += [
            f"last answer   prompt: {last.cached_tokens:,} tokens cached, "
            f"{new:,} read at {last.prefill_rate:,.0f} tok/s",
            f"              text: {last.generated_tokens:,} tokens{draft_tokens(last)} "
            f"at {last.decode_rate:.1f} tok/s, "
            f"first token after {last.first_token_seconds:.2f} s",
            f"all answers   {totals.answers}: {totals.prompt_tokens - totals.cached_tokens:,} tokens read, "
            f"{totals.generated_tokens:,} generated, {totals.seconds:.1f} s",
        ]
    chat.terminal.lines("\n".join(lines))


def _exit(chat: TerminalChat, arguments: str) -> None:
    chat.finished = True


COMMANDS = {
    "help": Command("[COMMAND]", "show this list", _help),
    "think": Command("[QUESTION]", "think before answering, or before this answer only", think),
    "nothink": Command("[QUESTION]", "answer without thinking, or this question only", nothink),
    "thought": Command("[fold|show|hide]", "show the last reasoning, or choose how to show it", _thought),
    "markdown": Command("[on|off]", "render the Markdown of answers, or not", _markdown),
    "system": Command("[TEXT|-]", "show, set or (-) remove the system message", system),
    "set": Command("[NAME VALUE]", "set an option; quiet, verbose: statistics", set_),
    "show": Command("[SUBJECT]", "show info, parameters, system or template", show),
    "retry": Command("", "answer the last question again", _retry),
    "undo": Command("", "take back the last question and its answer", _undo),
    "clear": Command("", "forget everything but the system message", _clear),
    "save": Command("[FILE]", "save the conversation and its settings", save),
    "load": Command("[FILE]", "continue a saved conversation", load),
    "stats": Command("", "show speed, tokens and context", _stats),
    "exit": Command("", "leave", _exit),
}
_ALIASES = {
    "no_think": "nothink",
    "reasoning": "thought",
    "quit": "exit",
    "bye": "exit",
    "?": "help",
    "help?": "help",
}
_SHELL_COMMANDS = ("list", "pull", "rm")
