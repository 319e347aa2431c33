"""Schemas and grammars that are named on the command line or typed in the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from npqwen.errors import OptionError
from npqwen.structure.structure import MAX_SIZE
from npqwen.wording import quoted, size, unreadable


def read_schema(name: str, text: str) -> Any:
    """The schema in a file, or in a text that begins with "{"; True, for any JSON object, if the text is "json"."""
    if text.lower() == "json":
        return True
    inline = text.lstrip().startswith("{")
    try:
        return json.loads(text if inline else read_file(name, text))
    except (ValueError, RecursionError) as error:
        if isinstance(error, OptionError):
            raise
        problem = f"{error.msg} at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise OptionError(f"{name} {quoted(text)} is not JSON: {problem}") from None


def read_file(name: str, path: str) -> str:
    """The text of a UTF-8 file; OptionError if it cannot be read or is too large."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(4 * MAX_SIZE + 1)
        if len(data) > 4 * MAX_SIZE:
            raise OptionError(f"{name}: {path} has more than {size(4 * MAX_SIZE)}")
        return data.decode("utf-8-sig")
    except OSError as error:
        raise OptionError(unreadable(f"{name}: {path}", error)) from None
    except UnicodeDecodeError as error:
        raise OptionError(f"{name}: {path} is not UTF-8 (at byte {error.start})") from None
    except ValueError as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"{name}: {quoted(path)} is not the name of a file") from None
