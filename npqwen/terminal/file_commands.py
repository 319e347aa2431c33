"""The slash commands for files: /save and /load."""

from __future__ import annotations

import os
from pathlib import Path

from npqwen.atomic_file import check_parent
from npqwen.chat.conversation import cache_file
from npqwen.chat.messages import joined
from npqwen.chat.saved_conversation import SavedConversation
from npqwen.errors import FormatError, OptionError, OutputError
from npqwen.terminal.terminal_chat import TerminalChat
from npqwen.wording import counted, size

_MAX_CACHE_BYTES = 1 << 30
"""Largest cache that /save writes, in bytes: above that, prefilling the messages again is the better choice."""
_TURNS = 2
"""How many turns of a conversation are shown when it is continued."""
_QUESTION_LENGTH, _ANSWER_LENGTH = 200, 600
"""Longer ones are cut to this many characters."""


def save(chat: TerminalChat, arguments: str) -> None:
    """`/save`: write the conversation, its settings and, unless it is very large, its cache to a file."""
    path = _path(chat, arguments, "/save")
    check_parent(path)
    if os.path.exists(path) and str(path) != chat.file and not _may_replace(chat, path):
        chat.terminal.notice("not saved")
        return
    saved = chat.saved()
    about = {"model": saved.model, "options": saved.options, "unanswered": saved.unanswered}
    with_cache = 0 < chat.conversation.cache_bytes <= _MAX_CACHE_BYTES
    try:
        chat.conversation.save(path, cache=with_cache, **about)  # type: ignore[arg-type]
    except OutputError:  # there may be disk space for the messages alone
        if not with_cache:
            raise
        with_cache = False
        chat.conversation.save(path, cache=False, **about)  # type: ignore[arg-type]
    chat.file = str(path)
    written = sum(file.stat().st_size for file in (path, cache_file(path)) if os.path.exists(file))
    without = "" if with_cache or not chat.conversation.cache_bytes else ", without the cache"
    chat.terminal.notice(f"saved {path}: {counted(len(saved.messages), 'message')}, {size(written)}{without}")


def load(chat: TerminalChat, arguments: str) -> None:
    """`/load`: continue a saved conversation with its settings; its last turns are shown."""
    path = _path(chat, arguments, "/load")
    if not os.path.exists(path):
        raise OptionError(
            f"{path} does not exist; /load continues a saved conversation (to talk to another model: npqwen chat MODEL)"
        )
    chat.restore(SavedConversation.read(path), path)
    if chat.autosave is not None:
        chat.autosave.begin()
    chat.file = str(path)
    loaded = f"loaded {path}: {counted(len(chat.conversation.messages), 'message')}"
    chat.terminal.notice("; ".join(filter(None, (loaded, chat.context_usage()))))
    show_last_turns(chat)


def show_last_turns(chat: TerminalChat) -> None:
    """Show the end of a conversation that is continued, shortened, and the question that has no answer yet."""
    messages = [
        message
        for message in map(joined, chat.conversation.messages)
        if message["role"] in ("user", "assistant") and message["content"].strip()
    ]
    users = [at for at, message in enumerate(messages) if message["role"] == "user"]
    first = users[-_TURNS] if len(users) > _TURNS else 0
    lines = [f"... {counted(first, 'earlier message')}"] if first else []
    for message in messages[first:]:
        if message["role"] == "user":
            lines += ["", "> " + _shortened(message["content"], _QUESTION_LENGTH)]
        else:
            lines.append(_shortened(message["content"], _ANSWER_LENGTH))
    if chat.unanswered is not None:
        question = _shortened(chat.unanswered.text, _QUESTION_LENGTH)
        lines += ["", f"> {question}", "(no answer yet; /retry asks the question again)"]
    if lines and not chat.terminal.quiet:
        chat.terminal.lines("\n".join(lines), dim=True)


def _shortened(text: str, length: int) -> str:
    text = text.strip()
    if len(text) <= length:
        return text
    space = text.rfind(" ", length // 2, length + 1)
    return text[: space if space > 0 else length].rstrip() + " ..."  # Chinese has no spaces


def _path(chat: TerminalChat, arguments: str, command: str) -> Path:
    if not arguments and chat.file is None:
        raise OptionError(f"{command} needs the name of a file, such as {command} talk.json")
    return Path(os.path.expanduser(arguments or chat.file or ""))


def _may_replace(chat: TerminalChat, path: Path) -> bool:
    """Whether the user lets `path` be replaced. Raises OutputError unless it is a saved conversation."""
    try:
        there = SavedConversation.read(path)
    except FormatError:
        raise OutputError(f"{path} exists and is not a saved conversation; choose another name") from None
    about = f"{path} exists: a conversation of {counted(len(there.messages), 'message')}"
    if chat.confirm is None:
        raise OutputError(f"{about}; choose another name")
    return chat.confirm(f"{about}. Overwrite it?")
