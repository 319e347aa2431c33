"""Text files that users name."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import BinaryIO

from npqwen.errors import OptionError
from npqwen.wording import shortened, unreadable


def read_text(file: str | BinaryIO, label: str, limit: int | None = None) -> str:
    """The text of a file in UTF-8, without a byte order mark, and with "\\n" as line ending.

    file: a path, which may begin with "~" for the home directory, or an open file. label: its name in messages. limit:
    the most bytes that it may have; None: any number. Raises OptionError for a file that cannot be read, is larger, or
    is not UTF-8.
    """
    label = shortened(label, 200)
    try:
        with open(os.path.expanduser(file), "rb") if isinstance(file, str) else nullcontext(file) as opened:
            data = opened.read(-1 if limit is None else limit + 1)
    except OSError as error:
        raise OptionError(unreadable(label, error)) from None
    except ValueError:  # no path may have a NUL
        raise OptionError(f"{label} cannot be read: its name is not valid") from None
    if limit is not None and len(data) > limit:
        raise OptionError(f"{label} is larger than {limit / 1e6:.0f} MB; give a smaller one")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise OptionError(f"{label} is not UTF-8 (at byte {error.start})") from None
