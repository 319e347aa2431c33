"""What begins with a slash in a conversation in the terminal."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from npqwen.chat.conversation import FORMAT, Conversation
from npqwen.chat.sampling_mode import default_sampling, thinks
from npqwen.errors import NpqwenError, OptionError, OutputError
from npqwen.format.config import read_json
from npqwen.terminal.settings import NAMES

if TYPE_CHECKING:
    from npqwen.chat.answer import ChatStream
    from npqwen.terminal.talk import Talk

_COMMAND = re.compile(r"/([\w-]*\??)(?:\s+|$)")
_MOST_CACHE = 1 << 30
"""Bytes of keys and values that /save writes; beyond, reading the messages anew is the smaller evil."""


@dataclasses.dataclass(frozen=True)
class Command:
    """usage: its arguments. run(talk, arguments) does it, and may raise NpqwenError."""

    usage: str
    help: str
    run: Callable[[Talk, str], None]


def is_command(said: str) -> bool:
    """Whether somebody means a command: a slash and one word. Paths and several lines of anything else are messages."""
    found = _COMMAND.match(said)
    return found is not None and ("\n" not in said.strip() or _name(found) in COMMANDS)


def run_command(talk: Talk, said: str) -> None:
    """Do it. Raises OptionError for an unknown one, which names the nearest."""
    found = _COMMAND.match(said)
    assert found is not None
    name = _name(found)
    command = COMMANDS.get(name)
    if command is None:
        near = difflib.get_close_matches(name, [*COMMANDS, *_ALIASES], 1, 0.5)
        hint = f"did you mean /{_ALIASES.get(near[0], near[0])}?" if near else "/help lists them"
        raise OptionError(f"there is no command /{found[1]}; {hint} (a message may begin with a space)")
    arguments = said[found.end() :].strip()
    if arguments and not command.usage:
        raise OptionError(f"/{name} takes nothing after it")
    command.run(talk, arguments)


def _name(found: re.Match[str]) -> str:
    """What the command that was typed is called here."""
    name = found[1].lower().replace("-", "_")
    return _ALIASES.get(name, name)


def words(before: str, start: str) -> Iterable[str]:
    """Commands, or behind /set names of options, that begin so."""
    if not before and start.startswith("/"):
        return [f"/{name}" for name in COMMANDS if name.startswith(start[1:])]
    return [name for name in NAMES if name.startswith(start)] if before.split() == ["/set"] else []


def _help(talk: Talk, arguments: str) -> None:
    width = max(len(f"/{name} {command.usage}") for name, command in COMMANDS.items()) + 2
    lines = [f"  {f'/{name} {command.usage}'.strip():<{width}}{command.help}" for name, command in COMMANDS.items()]
    talk.terminal.tell("\n".join(lines))
    talk.terminal.tell(
        '\nA line that ends in \\ goes on in the next; """ begins and ends a message of several lines, and '
        "lines pasted together are one message. Ctrl-C stops the answer; Ctrl-D leaves."
    )


def _think(talk: Talk, arguments: str) -> None:
    _switch(talk, True, arguments)


def _nothink(talk: Talk, arguments: str) -> None:
    _switch(talk, False, arguments)


def _switch(talk: Talk, thinking: bool, question: str) -> None:
    talk.model.chat_template.check_thinking(thinking)
    if question:
        talk.ask(question, thinking=thinking)
    else:
        talk.conversation.thinking = thinking
        talk.once = {}
        talk.terminal.notice("answers begin with a thought" if thinking else "answers come without a thought")


def _thought(talk: Talk, arguments: str) -> None:
    if arguments in ("fold", "show", "hide"):
        talk.view.view = arguments  # type: ignore[assignment]
        how = {"fold": "are folded", "show": "stay", "hide": "are hidden"}[arguments]
        talk.terminal.notice(f"thoughts {how} from now on")
    elif arguments:
        raise OptionError(f"/thought {arguments}: it can be followed by fold, show or hide")
    elif not talk.view.thought:
        raise OptionError("there was no thought yet")
    else:
        talk.terminal.tell(talk.view.thought, dim=True)


def _system(talk: Talk, arguments: str) -> None:
    if not arguments:
        talk.terminal.tell(talk.conversation.system or "there is no system message; /system TEXT sets one")
    elif arguments == "-":
        talk.conversation.system = None
        talk.terminal.notice("no system message from now on")
    else:
        talk.conversation.system = arguments
        talk.terminal.notice("the model is told so from the next answer on; /system - takes it away")


def _set(talk: Talk, arguments: str) -> None:
    name, _, value = arguments.partition(" ")
    if not name:
        own, kind = talk.model.generation_config.sampling, talk.model.chat_template.thinking()
        usual = default_sampling(own, kind, thinks(kind, talk.conversation.thinking, talk.conversation.messages))
        talk.terminal.tell(talk.settings.shown(dataclasses.asdict(usual) | {"loop_guard": True}))
    elif not value.strip():
        raise OptionError(f"/set {name} needs a value; default is the model's own")
    else:
        talk.settings.set(name, value.strip())


def _save(talk: Talk, arguments: str) -> None:
    path = _path(talk, arguments, "/save")
    if os.path.exists(path) and str(path) != talk.file and not _is_conversation(path):
        raise OutputError(f"{path} is there already and is no saved conversation; choose another name")
    size = talk.conversation.cache_bytes
    with_cache = size <= _MOST_CACHE
    try:
        talk.conversation.save(path, cache=with_cache)
    except OutputError:  # perhaps there is room for the messages alone
        if not with_cache:
            raise
        with_cache = False
        talk.conversation.save(path, cache=False)
    talk.file = str(path)
    beside = f", with {size / 1e6:.1f} MB of cache" if with_cache else ""
    talk.terminal.notice(f"{_messages(talk.conversation)} in {path}{beside}")


def _load(talk: Talk, arguments: str) -> None:
    path = _path(talk, arguments, "/load")
    loaded = Conversation.load(talk.model, path, **talk.fixed)
    try:
        loaded.thinking = loaded.thinking
    except OptionError:
        loaded.thinking = None
        talk.terminal.notice("saved with another model, which had a switch for thinking; this one has none")
    talk.conversation = loaded
    talk.file = str(path)
    talk.forget_last()
    talk.used = loaded.tokens or None  # Without its cache they are counted when they are read.
    talk.terminal.notice("; ".join(filter(None, (f"{_messages(loaded)} from {path}", talk.context()))))


def _retry(talk: Talk, arguments: str) -> None:
    options = talk.settings.options | talk.once
    talk.tries += 1
    if options.get("seed") is not None:
        options["seed"] += talk.tries  # The same seed would give the same answer.

    def begin() -> ChatStream:
        stream = talk.conversation.stream_retry(**options)
        if options.get("temperature", talk.model.generation_config.sampling.temperature) == 0:
            talk.terminal.notice(
                "the temperature is 0: the same answer comes again; /set temperature 0.7 allows others"
            )
        return stream

    talk.answer(begin, "the answer before stays")


def _undo(talk: Talk, arguments: str) -> None:
    said = talk.conversation.undo()
    text = " ".join(str(said).split())
    talk.forget_last()
    talk.terminal.notice(f"taken back: {text if len(text) <= 60 else text[:57] + '...'}")


def _clear(talk: Talk, arguments: str) -> None:
    talk.conversation.clear()
    talk.forget_last()
    kept = ", but the system message" if talk.conversation.system else ""
    talk.terminal.notice(f"all is forgotten{kept}")


def _stats(talk: Talk, arguments: str) -> None:
    model, totals, last = talk.model, talk.totals, talk.last
    thinking = {True: "on", False: "off", None: "the model's own way"}[talk.conversation.thinking]
    lines = [
        f"model         {talk.name}, {model.bits} bits a weight, {model.threads} threads",
        f"thinking      {thinking}",
        f"conversation  {_messages(talk.conversation)}, {talk.conversation.dropped} of them dropped",
    ]
    if context := talk.context():
        size = f"{talk.conversation.cache_bytes / 1e6:.1f} MB"
        lines.append(f"{context.replace('context ', 'context       ', 1)}, {size}")
    if last is not None:
        new = last.prompt_tokens - last.cached_tokens
        lines += [
            f"last answer   prompt: {last.cached_tokens:,} tokens kept, {new:,} read at {last.prefill_rate:,.0f} tok/s",
            f"              text: {last.generated_tokens:,} tokens at {last.decode_rate:.1f} tok/s, "
            f"the first after {last.first_token_seconds:.2f} s",
            f"all answers   {totals.answers}: {totals.prompt_tokens - totals.cached_tokens:,} tokens read, "
            f"{totals.generated_tokens:,} written, {totals.seconds:.1f} s",
        ]
    talk.terminal.tell("\n".join(lines))


def _exit(talk: Talk, arguments: str) -> None:
    talk.over = True


def _path(talk: Talk, arguments: str, command: str) -> Path:
    if not arguments and talk.file is None:
        raise OptionError(f"{command} needs the name of a file, such as {command} talk.json")
    return Path(os.path.expanduser(arguments or talk.file or ""))


def _is_conversation(path: Path) -> bool:
    try:
        return read_json(path).get("format") == FORMAT
    except NpqwenError:
        return False


def _messages(conversation: Conversation) -> str:
    count = len(conversation.messages)
    return f"{count} message{'' if count == 1 else 's'}"


COMMANDS = {
    "help": Command("", "this list", _help),
    "think": Command("[QUESTION]", "think before answers, or before this one only", _think),
    "nothink": Command("[QUESTION]", "answer at once, always or this once", _nothink),
    "thought": Command("[fold|show|hide]", "the last thought in full, or how to show them", _thought),
    "system": Command("[TEXT|-]", "what the model is told first; - for nothing", _system),
    "set": Command("[NAME VALUE]", "an option of generation; alone: all of them", _set),
    "retry": Command("", "have the last answer anew", _retry),
    "undo": Command("", "take back the last question and answer", _undo),
    "clear": Command("", "forget all but the system message", _clear),
    "save": Command("[FILE]", "keep the conversation in a file", _save),
    "load": Command("[FILE]", "go on with a conversation that was saved", _load),
    "stats": Command("", "speed, tokens and context so far", _stats),
    "exit": Command("", "leave", _exit),
}
_ALIASES = {"no_think": "nothink", "quit": "exit", "bye": "exit", "?": "help", "help?": "help"}
