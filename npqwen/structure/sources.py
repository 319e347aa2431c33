"""Schemas and grammars that are named on the command line or typed in the terminal."""

from __future__ import annotations

import json
from typing import Any

from npqwen.errors import OptionError
from npqwen.structure.structure import MAX_SIZE
from npqwen.text_file import read_text
from npqwen.wording import quoted


def read_schema(name: str, text: str) -> Any:
    """The schema in a file, or in a text that begins with "{"; True, for any JSON object, if the text is "json"."""
    if text.lower() == "json":
        return True
    inline = text.lstrip().startswith("{")
    content = text if inline else read_file(name, text)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        problem = f"{error.msg} at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise OptionError(f"{name} {quoted(text)} is not JSON: {problem}") from None


def read_file(name: str, path: str) -> str:
    """The text of a UTF-8 file. name: the option's, in messages. OptionError if it cannot be read or is too large."""
    return read_text(path, f"{name}: {path}", 4 * MAX_SIZE)
