"""The slash commands of a conversation in a terminal."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from npqwen.chat.conversation import FORMAT, Conversation
from npqwen.chat.sampling_mode import default_sampling, thinks
from npqwen.errors import NpqwenError, OptionError, OutputError
from npqwen.format.config import read_json
from npqwen.generation.options import CHAT_DEFAULTS
from npqwen.terminal.settings import NAMES
from npqwen.terminal.terminal_chat import TerminalChat

if TYPE_CHECKING:
    from npqwen.chat.chat_stream import ChatStream

_COMMAND = re.compile(r"/([\w-]*\??)(?:\s+|$)")
_MAX_CACHE_BYTES = 1 << 30
"""/save leaves out keys and values of more bytes: reading the messages again is then the better choice."""


@dataclasses.dataclass(frozen=True)
class Command:
    """A slash command. usage: its arguments, for /help. run(chat, arguments): executes it; may raise NpqwenError."""

    usage: str
    help: str
    run: Callable[[TerminalChat, str], None]


def is_command(message: str) -> bool:
    """Whether a message is a command: a slash and a word; in a message of several lines, the word of a known one."""
    found = _COMMAND.match(message)
    return found is not None and ("\n" not in message.strip() or _name(found) in COMMANDS)


def run_command(chat: TerminalChat, message: str) -> None:
    """Run a command. Raises OptionError for an unknown one, with a suggestion."""
    found = _COMMAND.match(message)
    assert found is not None
    name = _name(found)
    command = COMMANDS.get(name)
    if command is None:
        near = difflib.get_close_matches(name, [*COMMANDS, *_ALIASES], 1, 0.5)
        hint = f"did you mean /{_ALIASES.get(near[0], near[0])}?" if near else "/help lists the commands"
        raise OptionError(f"unknown command /{found[1]}; {hint} (to send it as a message, put a space before it)")
    arguments = message[found.end() :].strip()
    if arguments and not command.usage:
        raise OptionError(f"/{name} takes no arguments")
    command.run(chat, arguments)


def _name(found: re.Match[str]) -> str:
    """The command's own name, for an alias or another spelling."""
    name = found[1].lower().replace("-", "_")
    return _ALIASES.get(name, name)


def completions(line: str) -> tuple[str, list[str]]:
    """For a line up to the cursor: the part at its end to complete, and its possible completions.

    Commands, names of options after /set, paths after /save and /load.
    """
    command, space, argument = line.partition(" ")
    argument = argument.lstrip()
    if not space:
        return command, [f"/{name}" for name in COMMANDS if command.startswith("/") and name.startswith(command[1:])]
    if command == "/set":
        return argument, [name for name in NAMES if name.startswith(argument)]
    if command in ("/thought", "/reasoning"):
        return argument, [mode for mode in _REASONING_MODES if mode.startswith(argument)]
    if command == "/markdown":
        return argument, [state for state in ("on", "off") if state.startswith(argument)]
    return argument, _paths(argument) if command in ("/save", "/load") else []


def _paths(start: str) -> list[str]:
    """Paths that begin with `start`, directories with a slash at the end; hidden ones only after a dot."""
    folder, name = os.path.split(start)
    try:
        with os.scandir(os.path.expanduser(folder) or ".") as entries:
            return sorted(
                os.path.join(folder, entry.name) + (os.sep if entry.is_dir() else "")
                for entry in entries
                if entry.name.startswith(name) and (name.startswith(".") or not entry.name.startswith("."))
            )
    except (OSError, ValueError):
        return []


def _help(chat: TerminalChat, arguments: str) -> None:
    width = max(len(f"/{name} {command.usage}") for name, command in COMMANDS.items()) + 2
    lines = [f"  {f'/{name} {command.usage}'.strip():<{width}}{command.help}" for name, command in COMMANDS.items()]
    chat.terminal.lines("\n".join(lines))
    chat.terminal.lines(
        '\nAlt+Enter, or Enter after a \\, begins a new line; or put """ before and after a message of several lines. '
        "Pasted lines stay one message. Tab completes, arrows recall. Ctrl-C stops the answer; Ctrl-D leaves."
    )


def _think(chat: TerminalChat, arguments: str) -> None:
    _set_thinking(chat, True, arguments)


def _nothink(chat: TerminalChat, arguments: str) -> None:
    _set_thinking(chat, False, arguments)


def _set_thinking(chat: TerminalChat, thinking: bool, question: str) -> None:
    chat.model.chat_template.check_thinking(thinking)
    if question:
        chat.ask(question, thinking=thinking)
    else:
        chat.conversation.thinking = thinking
        chat.question_options = {}
        chat.terminal.notice(f"thinking is {'on' if thinking else 'off'}")


_REASONING_MODES = {"fold": "folded into one line", "show": "left on the screen", "hide": "hidden"}


def _thought(chat: TerminalChat, arguments: str) -> None:
    if arguments in ("fold", "show", "hide"):
        chat.view.mode = arguments  # type: ignore[assignment]
        chat.terminal.notice(f"reasoning is {_REASONING_MODES[arguments]} from now on")
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


def _system(chat: TerminalChat, arguments: str) -> None:
    if not arguments:
        chat.terminal.lines(chat.conversation.system or "there is no system message; /system TEXT sets one")
    elif arguments == "-":
        chat.conversation.system = None
        chat.terminal.notice("the system message is removed")
    else:
        chat.conversation.system = arguments
        chat.terminal.notice("the system message is set, from the next answer on; /system - removes it")


def _set(chat: TerminalChat, arguments: str) -> None:
    name, _, value = arguments.partition(" ")
    if not name:
        own, kind = chat.model.generation_config.sampling, chat.model.chat_template.thinking()
        thinking = thinks(kind, chat.conversation.thinking, chat.conversation.messages)
        defaults = dataclasses.asdict(default_sampling(own, kind, thinking)) | CHAT_DEFAULTS
        chat.terminal.lines(chat.settings.table(defaults))
    elif not value.strip():
        raise OptionError(f"/set {name} needs a value, such as default for the model's own")
    else:
        chat.settings.set(name, value.strip())


def _save(chat: TerminalChat, arguments: str) -> None:
    path = _path(chat, arguments, "/save")
    if os.path.exists(path) and str(path) != chat.file and not _is_conversation(path):
        raise OutputError(f"{path} exists and is not a saved conversation; choose another name")
    size = chat.conversation.cache_bytes
    with_cache = size <= _MAX_CACHE_BYTES
    try:
        chat.conversation.save(path, cache=with_cache)
    except OutputError:  # there may be room for the messages alone
        if not with_cache:
            raise
        with_cache = False
        chat.conversation.save(path, cache=False)
    chat.file = str(path)
    cache = f", with {size / 1e6:.1f} MB of cache" if with_cache else ""
    chat.terminal.notice(f"{_count(len(chat.conversation.messages), 'message')} saved to {path}{cache}")


def _load(chat: TerminalChat, arguments: str) -> None:
    path = _path(chat, arguments, "/load")
    loaded = Conversation.load(chat.model, path, **chat.conversation_options)
    try:
        loaded.thinking = loaded.thinking
    except OptionError:
        loaded.thinking = None
        chat.terminal.notice("the saved thinking mode is ignored: this model cannot be switched to it")
    chat.conversation = loaded
    chat.file = str(path)
    chat.forget_last()
    chat.used = loaded.tokens or None  # without a saved cache, unknown until the messages are read
    summary = f"{_count(len(loaded.messages), 'message')} loaded from {path}"
    chat.terminal.notice("; ".join(filter(None, (summary, chat.context_usage()))))


def _retry(chat: TerminalChat, arguments: str) -> None:
    options = chat.settings.options | chat.question_options
    chat.retries += 1
    if options.get("seed") is not None:
        options["seed"] += chat.retries  # the seed itself would give the same answer

    def begin() -> ChatStream:
        stream = chat.conversation.stream_retry(**options)
        if options.get("temperature", chat.model.generation_config.sampling.temperature) == 0:
            chat.terminal.notice(
                "with temperature 0 the answer will be the same; /set temperature 0.7 allows other answers"
            )
        return stream

    chat.answer(begin, "the previous answer is kept")


def _undo(chat: TerminalChat, arguments: str) -> None:
    question = " ".join(str(chat.conversation.undo()).split())
    chat.forget_last()
    chat.terminal.notice(f"taken back: {question if len(question) <= 60 else question[:57] + '...'}")


def _clear(chat: TerminalChat, arguments: str) -> None:
    chat.conversation.clear()
    chat.forget_last()
    kept = "; the system message stays" if chat.conversation.system else ""
    chat.terminal.notice(f"the conversation is cleared{kept}")


def _stats(chat: TerminalChat, arguments: str) -> None:
    model, totals, last = chat.model, chat.totals, chat.last_usage
    thinking = {True: "on", False: "off", None: "the model's default"}[chat.conversation.thinking]
    messages, dropped = len(chat.conversation.messages), chat.conversation.dropped
    lines = [
        f"model         {chat.name}, {model.bits} bits per weight, {_count(model.threads, 'thread')}",
        f"thinking      {thinking}",
        f"conversation  {_count(messages, 'message')}, {dropped} of them dropped",
    ]
    if context := chat.context_usage():
        size = f"{chat.conversation.cache_bytes / 1e6:.1f} MB"
        lines.append(f"{context.replace('context ', 'context       ', 1)}, {size}")
    if last is not None:
        new = last.prompt_tokens - last.cached_tokens
        lines += [
            f"last answer   prompt: {last.cached_tokens:,} tokens cached, "
            f"{new:,} read at {last.prefill_rate:,.0f} tok/s",
            f"              text: {last.generated_tokens:,} tokens at {last.decode_rate:.1f} tok/s, "
            f"first after {last.first_token_seconds:.2f} s",
            f"all answers   {totals.answers}: {totals.prompt_tokens - totals.cached_tokens:,} tokens read, "
            f"{totals.generated_tokens:,} generated, {totals.seconds:.1f} s",
        ]
    chat.terminal.lines("\n".join(lines))


def _exit(chat: TerminalChat, arguments: str) -> None:
    chat.finished = True


def _path(chat: TerminalChat, arguments: str, command: str) -> Path:
    if not arguments and chat.file is None:
        raise OptionError(f"{command} needs the name of a file, such as {command} talk.json")
    return Path(os.path.expanduser(arguments or chat.file or ""))


def _is_conversation(path: Path) -> bool:
    try:
        return read_json(path).get("format") == FORMAT
    except NpqwenError:
        return False


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


COMMANDS = {
    "help": Command("", "show this list", _help),
    "think": Command("[QUESTION]", "think before answering, or before this answer only", _think),
    "nothink": Command("[QUESTION]", "answer without thinking, or this question only", _nothink),
    "thought": Command("[fold|show|hide]", "show the last reasoning in full, or choose how it is shown", _thought),
    "markdown": Command("[on|off]", "render the Markdown of answers, or do not", _markdown),
    "system": Command("[TEXT|-]", "show, set or (-) remove the system message", _system),
    "set": Command("[NAME VALUE]", "set a generation option; without a name, list them all", _set),
    "retry": Command("", "answer the last question again", _retry),
    "undo": Command("", "take back the last question and its answer", _undo),
    "clear": Command("", "forget everything but the system message", _clear),
    "save": Command("[FILE]", "save the conversation to a file", _save),
    "load": Command("[FILE]", "continue a saved conversation", _load),
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
