"""Emphasis, code and links in a line of Markdown that is still growing."""

from __future__ import annotations

import re
import unicodedata

from npqwen.terminal.styles import BOLD, CODE, ITALIC, PLAIN, STRUCK, UNDERLINED, Run, combined
from npqwen.terminal.width import letter_width

LIMIT = 300
"""Longest span, in characters: a longer one is shown as written."""
_MAX_DEPTH = 6
_HOLD = -1
"""In place of an index: more text is needed to decide."""

_SPECIAL = re.compile(r"[*_~`\[\\$]")
_RUN = re.compile(r"\*+|_+|~+|`+")
_STYLES = {
    "*": ITALIC, "**": BOLD, "***": combined(BOLD, ITALIC), "_": ITALIC, "__": BOLD, "___": combined(BOLD, ITALIC),
    "~~": STRUCK,
}  # fmt: skip
_URL = r"[^\s()]*(?:\([^\s()]*\)[^\s()]*)*"
_LINK = re.compile(rf"\[([^\[\]]+)\]\((?!\))({_URL})(?:\s+\"[^\"]*\")?\)")
_LINK_BEGUN = re.compile(rf"\[[^\[\]]*(?:\](?:\({_URL}(?:\([^\s()]*|\s+(?:\"[^\"]*\"?)?)?)?)?")
_ESCAPABLE = frozenset("*_~`#$")
"""What a backslash makes an ordinary character; before any other, as in \\alpha, it is one itself."""
_MATH_ENDS = {"$$": re.compile(r"\$\$"), "$": re.compile(r"(?<=\S)\$(?!\d)"), "\\(": re.compile(r"\\\)")}
_MATH_STARTS = re.compile(r"\$\$|\$(?![\s\d])|\\\(")


def spans(text: str, before: str = "", *, final: bool, guess: bool = False) -> tuple[list[Run], int]:
    """The styled text of the beginning of `text`, as far as it is certain, and how many characters that is.

    Markup is removed only if it is complete, so that nothing is lost: `2 * 3`, `*args` and `$x^*$` are left as they
    are. What follows an opening marker is uncertain until the closing marker, the end of the line or LIMIT. The result
    for a line does not depend on how it was split into pieces.

    before: the character before `text`, in the same line. final: the line ends with `text`, and all of it is certain.
    guess: treat open markers as if they were closed at the end of `text`.
    """
    return _spans(text, before, PLAIN, final, guess, 0)


def _spans(text: str, before: str, style: str, final: bool, guess: bool, depth: int) -> tuple[list[Run], int]:
    runs: list[Run] = []
    at = plain = 0
    while (found := _SPECIAL.search(text, at)) is not None:
        at = found.start()
        previous = text[at - 1] if at else before
        inner, end = _element(text, at, previous, style, final, guess, depth)
        if end == _HOLD:
            break
        if inner is not None:
            _append(runs, text[plain:at], style)
            runs += inner
            plain = end
        at = end
    else:
        at = len(text)
    _append(runs, text[plain:at], style)
    return runs, at


def _append(runs: list[Run], text: str, style: str) -> None:
    if text:
        runs.append((text, style))


def _element(
    text: str, at: int, before: str, style: str, final: bool, guess: bool, depth: int
) -> tuple[list[Run] | None, int]:
    """The runs of the element whose marker is at index `at`, None if it is shown as written; and the index after it."""
    window = text[at : at + LIMIT]
    complete = final or len(window) == LIMIT
    mark = window[0]
    if mark == "[":
        return _link(window, at, style, complete, depth)
    if mark in "`\\$":
        end, content = _opaque(window, 0, complete)
        if end == _HOLD:
            return None, _HOLD
        if guess and mark == "`" and content is None:
            content = window[end:].rstrip("`")
            return ([(content, combined(style, CODE))] if content else []), len(text)
        if content is None:
            return None, at + end
        return [(content, combined(style, CODE) if mark == "`" else style)], at + end
    length = _run_length(window, 0)
    if length == len(window) and not complete:
        return None, _HOLD
    marks = window[:length]
    added = _STYLES.get(marks)
    if added is None or depth == _MAX_DEPTH or not _can_open(marks, before, window[length : length + 1]):
        return ([], len(text)) if guess and length == len(text) - at else (None, at + length)
    close = _find_close(window, length, complete)
    if close == _HOLD:
        return None, _HOLD
    if close:
        inner = window[length : close - length]
        if marks != "__" or not inner.isidentifier():  # __init__
            return _spans(inner, mark, combined(style, added), True, False, depth + 1)[0], at + close
    elif guess:
        return _spans(window[length:].rstrip(mark), mark, combined(style, added), True, True, depth + 1)[0], len(text)
    return None, at + length


def _link(window: str, at: int, style: str, complete: bool, depth: int) -> tuple[list[Run] | None, int]:
    link = _LINK.match(window)
    if link is not None and depth < _MAX_DEPTH:
        text, url = link.groups()
        shown = _spans(text, "[", combined(style, UNDERLINED), True, False, depth + 1)[0]
        return (shown if text == url else [*shown, (f" ({url})", style)]), at + link.end()
    if not complete and _LINK_BEGUN.fullmatch(window):
        return None, _HOLD
    return None, at + 1


def _opaque(text: str, at: int, complete: bool) -> tuple[int, str | None]:
    """Parse the element at a backtick, backslash or dollar sign at index `at`, in which nothing else is markup.

    Returns the index after it, or _HOLD, and the text to show: code, an escaped character or mathematics; None for
    ordinary characters.
    """
    if text[at] == "`":
        length = _run_length(text, at)
        if at + length == len(text) and not complete:
            return _HOLD, None
        close = re.compile(rf"(?<!`)`{{{length}}}(?!`)").search(text, at + length)
        if close is None:
            return (at + length, None) if complete else (_HOLD, None)
        if close.end() == len(text) and not complete:
            return _HOLD, None
        code = text[at + length : close.start()]
        if code.startswith(" ") and code.endswith(" ") and code.strip():
            code = code[1:-1]
        return close.end(), code
    if len(text) - at < 3 and not complete:  # too few characters to tell which it is
        return _HOLD, None
    start = _MATH_STARTS.match(text, at)
    if start is not None:
        close = _MATH_ENDS[start[0]].search(text, start.end())
        if close is not None and (close.end() < len(text) or complete):
            return close.end(), text[at : close.end()]
        return (at + len(start[0]), None) if complete else (_HOLD, None)
    if text[at] == "\\" and text[at + 1 : at + 2] in _ESCAPABLE:
        return at + 2, text[at + 1]
    return at + 1, None


def _find_close(window: str, length: int, complete: bool) -> int:
    """The index after the marker that closes the initial one of `length` characters; 0 if none does; or _HOLD."""
    mark = window[0]
    opened = [length]
    at = length
    while (found := _SPECIAL.search(window, at)) is not None:
        at = found.start()
        if window[at] in "`\\$":
            at, _ = _opaque(window, at, complete)
            if at == _HOLD:
                return _HOLD
            continue
        if window[at] != mark:
            at += 1
            continue
        run = _run_length(window, at)
        after = window[at + run : at + run + 1]
        if not after and not complete:
            return _HOLD
        left = run
        if _can_close(window[at : at + run], window[at - 1], after):
            while left and opened:
                if left in opened:  # markers inside that are still open are ordinary characters
                    while opened.pop() != left:
                        pass
                    left = 0
                elif opened[-1] < left:
                    left -= opened.pop()
                else:
                    break
            if not opened:
                return at + run - left
        if left and run <= 2 and _can_open(window[at : at + run], window[at - 1], after):
            opened.append(run)
        at += run
    return 0 if complete else _HOLD


def _run_length(text: str, at: int) -> int:
    run = _RUN.match(text, at)
    assert run is not None
    return run.end() - at


def _can_open(marks: str, before: str, after: str) -> bool:
    """Whether markers between these characters may open a span: before a word, and not after one.

    Single ones are not markup before closing punctuation either, as in *.py or (*).
    """
    if not after or after.isspace() or after == "/":
        return False
    if len(marks) == 1 and (after in ",.;:!?%|" or unicodedata.category(after) in ("Pe", "Pf")):
        return False
    if not before or before.isspace():
        return True
    if marks[0] == "_":
        return before in "\"'*~" or unicodedata.category(before) in ("Ps", "Pi", "Pd")
    return before not in "/\\" and not _is_narrow_word(before)


def _can_close(marks: str, before: str, after: str) -> bool:
    """Whether markers between these characters may close a span: after a word, single ones also not before one."""
    if before.isspace() or unicodedata.category(before) in ("Ps", "Pi"):
        return False
    if not after:
        return True
    if marks[0] == "_":
        return not after.isalnum()
    if after == "/" or (marks == "*" and before in "/|"):
        return False
    return marks != "*" or not _is_narrow_word(after)


def _is_narrow_word(letter: str) -> bool:
    """Whether the letter is part of a word of a script that has spaces between words."""
    return letter.isalnum() and letter_width(letter) == 1
