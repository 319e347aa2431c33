"""The slash commands that change or show what answers depend on: /think, /nothink, /system, /set and /show."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from npqwen.chat.sampling_mode import default_sampling, thinks
from npqwen.checks import suggestion
from npqwen.errors import OptionError
from npqwen.generation.options import CHAT_DEFAULTS
from npqwen.terminal.settings import NAMES, option_name
from npqwen.terminal.terminal_chat import Question, TerminalChat
from npqwen.wording import quoted

_NAME_AND_VALUE = re.compile(r"([^\s=]*)\s*=?\s*(.*)", re.DOTALL)
SWITCHES = ("think", "nothink", "verbose", "quiet", "history", "nohistory")
"""Words that `/set` accepts besides options, without a value."""
_AT_START = {"num_ctx": "context", "context": "context", "num_thread": "threads", "threads": "threads"}
"""Options that only the command line has -> its flag."""
SUBJECTS = ("info", "parameters", "system", "template")
"""Arguments of `/show`."""


def think(chat: TerminalChat, question: str) -> None:
    """`/think`: think before answering from now on, or before answering `question`."""
    _set_thinking(chat, True, question)


def nothink(chat: TerminalChat, question: str) -> None:
    """`/nothink`: answer without thinking from now on, or answer only `question` this way."""
    _set_thinking(chat, False, question)


def _set_thinking(chat: TerminalChat, thinking: bool, question: str) -> None:
    chat.model.chat_template.check_thinking(thinking)
    if question:
        chat.ask(question, thinking=thinking)
        return
    chat.conversation.thinking = thinking
    chat.question_options = {}
    if chat.unanswered is not None:
        chat.unanswered = Question(chat.unanswered.text)
    chat.terminal.notice(f"thinking is {'on' if thinking else 'off'}")


def system(chat: TerminalChat, text: str) -> None:
    """`/system`: show, set or (-) remove the system message."""
    if not text:
        chat.terminal.lines(chat.conversation.system or "there is no system message; /system TEXT sets one")
    elif text == "-":
        chat.conversation.system = None
        chat.terminal.notice("the system message is removed")
    else:
        chat.conversation.system = text
        chat.terminal.notice("the system message is set, from the next answer on; /system - removes it")


def set_(chat: TerminalChat, arguments: str) -> None:
    """`/set`: `NAME VALUE`, `NAME=VALUE` or, as in ollama, `parameter NAME VALUE`, `system TEXT` or a switch."""
    name, value = _name_and_value(arguments)
    if name.lower() in ("parameter", "parameters"):
        name, value = _name_and_value(value)
    word = option_name(name)
    if not name:
        _show_parameters(chat)
    elif word == "system":
        system(chat, value)
    elif word in SWITCHES:
        if value:
            raise OptionError(f"/set {word} takes no value")
        _switch(chat, word)
    elif word in _AT_START:
        flag = _AT_START[word]
        raise OptionError(f"{word} is chosen when the chat is started: npqwen chat MODEL --{flag} N")
    elif word not in NAMES:
        raise OptionError(f"unknown option {quoted(name)}; {suggestion(word, [*NAMES, 'system', *SWITCHES])}")
    else:
        chat.terminal.notice(chat.settings.set(word, value))


def _name_and_value(arguments: str) -> tuple[str, str]:
    found = _NAME_AND_VALUE.fullmatch(arguments.strip())
    assert found is not None  # it matches any text
    return found[1], found[2].strip()


def _switch(chat: TerminalChat, word: str) -> None:
    if word in ("think", "nothink"):
        _set_thinking(chat, word == "think", "")
    elif word in ("verbose", "quiet"):
        chat.shows_statistics = word == "verbose"
        chat.terminal.notice(f"statistics are {'shown after every answer' if chat.shows_statistics else 'hidden'}")
    else:
        _keep(chat, word == "history")


def _keep(chat: TerminalChat, keep: bool) -> None:
    if chat.history is None or chat.autosave is None:
        raise OptionError("this chat was started with --no-save: nothing of it is kept")
    chat.history.enabled = chat.autosave.enabled = keep
    chat.terminal.notice(
        "what you type and the whole conversation are kept again"
        if keep
        else "from now on nothing of this chat is kept; what came before stays, and /clear removes the conversation"
    )


def show(chat: TerminalChat, subject: str) -> None:
    """`/show`: the model, the options, the system message or the chat template."""
    subject = subject.lower() or "info"
    if subject == "info":
        _show_info(chat)
    elif subject in ("parameters", "parameter"):
        _show_parameters(chat)
    elif subject == "system":
        system(chat, "")
    elif subject == "template":
        chat.terminal.lines(chat.model.chat_template.source().strip(), wrap=False)
    else:
        raise OptionError(f"/show {subject}: choose from {', '.join(SUBJECTS)}")


def _show_info(chat: TerminalChat) -> None:
    from npqwen.reports.info import describe, inspect

    path, adapters = Path(chat.model.path), {name: one.directory for name, one in chat.model.adapters.items()}
    chat.terminal.lines(describe(inspect(path, chat.model.context, adapters=adapters), chat.name))


def _show_parameters(chat: TerminalChat) -> None:
    own, mode = chat.model.generation_config.sampling, chat.model.chat_template.mode()
    thinking = thinks(mode, chat.conversation.thinking, chat.conversation.messages)
    defaults = dataclasses.asdict(default_sampling(own, mode, thinking)) | CHAT_DEFAULTS
    chat.terminal.lines(chat.settings.table(defaults))
