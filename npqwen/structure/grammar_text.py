"""Grammars as users write them: Lark as llguidance has it, and llama.cpp's GBNF."""

from __future__ import annotations

import json
import re
from typing import Literal

from npqwen.errors import OptionError
from npqwen.wording import shortened

_RULE = re.compile(r"[ \t]*[?!]?([A-Za-z_][\w-]*)(?:\.-?\d+|\[[^\]\n]*\]|\{[^}\n]*\})?\s*(::=|:)")
_SKIPPED = re.compile(r"\s+|#[^\n]*|//[^\n]*")
_GBNF_PARTS = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*|\.', re.DOTALL)
_CLASS_PARTS = re.compile(r"\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})|\\(-)|\\.|([&~])", re.DOTALL)
_ANY = "[\\x00-\U0010ffff]"
"""A class of all characters, as "." is in GBNF; llguidance's does not match a newline."""
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)", re.DOTALL)


def language(text: str, option: str = "grammar") -> Literal["lark", "gbnf"]:
    """The language of a grammar: its first rule has "name ::=" in GBNF, "name:" in Lark.

    option: its name in messages. OptionError if it begins with neither.
    """
    at = 0
    while (skipped := _SKIPPED.match(text, at)) is not None:
        at = skipped.end()
    if text.startswith("%", at):  # a directive
        return "lark"
    rule = _RULE.match(text, at)
    if rule is None:
        raise OptionError(
            f"{option} begins with {shortened(text[at:], 40)!r}; it must be a Lark grammar, whose rules are "
            "'start: ...', or GBNF, whose rules are 'root ::= ...'"
        )
    return "gbnf" if rule[2] == "::=" else "lark"


def lark_text(text: str, option: str = "grammar") -> str:
    """The grammar in Lark. option: its name in messages. OptionError for GBNF that cannot be read."""
    if language(text, option) == "lark":
        return text
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return gbnf_to_lark(_plain_gbnf(text))
    except Exception as error:  # it raises bare Exceptions, and RecursionError for deep parentheses
        reason = shortened(str(error), 200) or type(error).__name__
        raise OptionError(f"{option} cannot be read as GBNF: {reason}") from None


def literal(text: str) -> str:
    """A Lark string of exactly this text."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", r"\x7f")  # which JSON has and Lark does not


def _plain_gbnf(text: str) -> str:
    r"""A GBNF grammar, rewritten where llguidance's converter differs from llama.cpp.

    Escapes by numbers become characters, or \xHH for ASCII. In classes, what is literal there but not in regular
    expressions becomes \xHH. "." becomes a class that has the newline, too.
    """

    def replaced(found: re.Match[str]) -> str:
        part = found[0]
        if part[0] == "[":
            return _CLASS_PARTS.sub(in_class, part)
        return _ANY if part == "." else _ESCAPE.sub(unescaped, part) if part[0] == '"' else part

    def unescaped(escape: re.Match[str]) -> str:
        code = escape[1] or escape[2] or escape[3]
        return escape[0] if code is None else character(int(code, 16))

    def in_class(found: re.Match[str]) -> str:
        code, one = found[1] or found[2], found[3] or found[4]
        return character(int(code, 16) if code else ord(one)) if code or one else found[0]

    def character(number: int) -> str:
        return chr(number) if number > 127 else rf"\x{number:02x}"

    return _GBNF_PARTS.sub(replaced, text)
