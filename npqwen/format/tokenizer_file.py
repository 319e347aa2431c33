"""tokenizer.json, checked as bytes before the tokenizers library reads it.

The library uses unbounded memory for some files, panics on others, and aborts the process on a few.
"""

from __future__ import annotations

import re
from pathlib import Path

from npqwen.errors import CheckpointError
from npqwen.format.files import read_small
from npqwen.wording import unreadable

VALUES = 5_000_000
"""Most values of a tokenizer.json: 3 bytes may become an object of many more. Qwen3's has 1,000,000."""
ADDED, ALL_ADDED = 5_000, 1_000_000
"""Most bytes of an added token and of all: the library takes 75 bytes of memory for each. Qwen3's have 350."""

_AFFIX = re.compile(rb'"(?:continuing_subword_prefix|end_of_word_suffix)"\s*:\s*"(?!")')
"""A setting that no byte-level BPE has, and with which the tokenizers library aborts the process."""
_PART = re.compile(rb'"type"\s*:\s*"(Precompiled|FixedLength)"')
"""Parts of other tokenizers, with which the library panics."""
_CONTENT = re.compile(rb'"content"\s*:\s*"')
"""Precedes the text of an added token."""
_TEXT = re.compile(rb'(?:[^"\\]|\\.)*"', re.DOTALL)
_ESCAPED = re.compile(rb"\\u00[2-7]")
"""An escaped printable ASCII character, unless the backslash is itself escaped. Nobody needs these; they hide names."""


def read_tokenizer(path: Path) -> bytes:
    """The content of a tokenizer.json. CheckpointError if it is missing, unreadable, or not a Qwen3 tokenizer."""
    try:
        data = read_small(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; is {path.parent} a complete model directory?") from None
    except OSError as error:
        raise CheckpointError(unreadable(path, error)) from None
    if sum(map(data.count, (b",", b"[", b"{"))) > VALUES:
        raise CheckpointError(f"{path} cannot be read: it has more than {VALUES:,} values")
    if _has_escapes(data):
        raise CheckpointError(f"{path} cannot be read: it writes plain letters as escapes such as \\u0061")
    if part := _PART.search(data):
        raise CheckpointError(f"{path} has a part {part[1].decode()}; Qwen3's tokenizer is a byte-level BPE")
    if _AFFIX.search(data):
        raise CheckpointError(f"{path} has a subword prefix or suffix; Qwen3's tokenizer is a byte-level BPE")
    _check_added(data, path)
    return data


def _has_escapes(data: bytes) -> bool:
    """Whether a printable ASCII character is written as an escape, or there are too many candidates to check."""
    for number, found in enumerate(_ESCAPED.finditer(data)):
        before = data[max(0, found.start() - 100) : found.start()]
        is_escape = (len(before) - len(before.rstrip(b"\\"))) % 2 == 0  # the backslash is not itself escaped
        if is_escape or number == 1000:
            return True
    return False


def _check_added(data: bytes, path: Path) -> None:
    total = 0
    for found in _CONTENT.finditer(data):
        text = _TEXT.match(data, found.end(), found.end() + ADDED + 1)
        if text is None:
            raise CheckpointError(f"{path} has an added token of more than {ADDED:,} bytes; Qwen3's have at most 25")
        total += text.end() - text.start()
        if total > ALL_ADDED:
            raise CheckpointError(f"{path} has added tokens of more than {ALL_ADDED:,} bytes; Qwen3's have 350")
