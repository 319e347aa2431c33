"""Tab completion in a conversation in the terminal."""

from __future__ import annotations

import os

from npqwen.generation.options import OPTIONS
from npqwen.terminal.setting_commands import SUBJECTS, SWITCHES
from npqwen.terminal.settings import NAMES
from npqwen.terminal.slash_commands import COMMANDS, REASONING_MODES, command_name


def completions(line: str) -> tuple[str, list[str]]:
    """For a line up to the cursor: the part at its end to complete, and its possible completions.

    Commands; after /set, names of options and their values; after /save and /load, paths; other commands' words.
    """
    command, space, argument = line.partition(" ")
    argument = argument.lstrip()
    if not command.startswith("/"):
        return line, []
    if not space:
        return command, [f"/{name}" for name in COMMANDS if name.startswith(command[1:])]
    name = command_name(command[1:])
    if name == "set":
        return _setting(argument)
    if name in ("save", "load"):
        return argument, _paths(argument)
    words = {"thought": REASONING_MODES, "markdown": ("on", "off"), "show": SUBJECTS, "help": COMMANDS}
    return argument, [word for word in words.get(name, ()) if word.startswith(argument)]


def _setting(argument: str) -> tuple[str, list[str]]:
    """Completes `NAME`, `NAME VALUE` and `NAME=VALUE`, also after `parameter`."""
    argument = argument.removeprefix("parameter ").lstrip()
    name = argument.replace("=", " ", 1).partition(" ")[0]
    if name == argument:
        return name, [word for word in (*NAMES, "system", *SWITCHES) if word.startswith(name)]
    value = argument[len(name) + 1 :].lstrip()
    option = OPTIONS.get(name)
    if option is None or not option.settable:
        return value, []
    values = ("on", "off", "default") if option.kind is bool else ("default",)
    return value, [word for word in values if word.startswith(value)]


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
