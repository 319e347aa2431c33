"""A model's raw text, as it comes, taken apart: what it thought, what it says, and which tools it calls.

Qwen3 writes `<think>`, its thought, `</think>`, an answer, and each call in `<tool_call>` and `</tool_call>`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from npqwen.tools.calls import CLOSE, OPEN, Schemas, ToolCall, is_inside_value, read_calls

THINK, END_THINK = "<think>", "</think>"
_END_FUNCTION = "</function>"
_ENDS = re.compile(f"{CLOSE}|{OPEN}")
_BARE_ENDS = re.compile(f"{_END_FUNCTION}|{CLOSE}|{OPEN}")
_MOST_DOUBTS = 16
"""Closing tags in one value, after which it is not read as a call any more: each is looked at from its beginning."""
_QUOTES = "`'\""
_BLANK = " \t\r\n"


@dataclass(frozen=True)
class Reasoning:
    """A piece of the thought."""

    text: str


@dataclass(frozen=True)
class Text:
    """A piece of the answer."""

    text: str


Piece = Reasoning | Text | ToolCall


class ReplyParser:
    """Takes a text apart piece by piece; the result does not depend on how the text was cut.

    in_thought: the prompt ended in an open thought, so the text begins inside it (see `chat_template.in_thought`).
    schemas: the parameters of the tools on offer, for calls whose values are written without types.

    A tag is never passed on, not even in parts: what could still become one is held back. A tag within a pair of quotes
    or backticks is not meant as one and stays text. Newlines around thoughts and calls belong to the template, and are
    left out. An unfinished thought stays a thought; what is in a call's place and cannot be read as one becomes text.
    """

    def __init__(self, in_thought: bool = False, schemas: Schemas | None = None) -> None:
        self._schemas = schemas or {}
        functions = [f"<function={name}>" for name in self._schemas]
        self._text_tags = _Tags([THINK, END_THINK, OPEN, CLOSE, *functions])
        self._thought_tags = _Tags([THINK, END_THINK])
        self._mode: Literal["text", "thought", "call"] = "thought" if in_thought else "text"
        self._rest = ""
        """What is not read yet; of a call, all of it so far."""
        self._last = ""
        """The letter before `_rest`."""
        self._bare = False
        """Whether the call goes without <tool_call>, as Qwen3-Coder's sometimes do."""
        self._searched = 0
        self._doubtful: list[tuple[int, int]] = []
        self._lost = False
        """Whether a call was given up whose end is not known: what looks like another may be a part of it."""
        self._reasoning, self._answer = _Flow(), _Flow()
        self._pieces: list[Piece] = []

    def push(self, text: str) -> list[Piece]:
        """The pieces that `text` makes certain."""
        self._rest += text
        self._run(final=False, whole=True)
        return self._taken()

    def finish(self, whole: bool = True) -> list[Piece]:
        """What was held back, now that nothing follows.

        whole: the model ended the text. If it broke off (a limit of tokens), a call that is not complete is text.
        """
        self._run(final=True, whole=whole)
        flow, kind = self._current()
        self._emit(kind, flow.end())
        return self._taken()

    def _run(self, final: bool, whole: bool) -> None:
        while self._read_call(final, whole) if self._mode == "call" else self._read_plain(final):
            pass

    def _taken(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    def _current(self) -> tuple[_Flow, type[Reasoning] | type[Text]]:
        return (self._reasoning, Reasoning) if self._mode == "thought" else (self._answer, Text)

    def _emit(self, kind: type[Reasoning] | type[Text], text: str) -> None:
        if text:
            self._pieces.append(kind(text))

    def _read_plain(self, final: bool) -> bool:
        """Pass on text or thought up to the next tag; whether there was one."""
        flow, kind = self._current()
        tags = self._thought_tags if self._mode == "thought" else self._text_tags
        start, tag = tags.find(self._rest, self._last, final)
        self._emit(kind, flow.push(self._rest[:start]))
        self._last = (self._last + self._rest[:start])[-1:]
        self._rest = self._rest[start:]
        if not tag:
            return False
        flow.break_off()
        self._bare = tag.startswith("<function=") and not self._lost
        if not self._bare:
            self._rest = self._rest[len(tag) :]
            self._last = ""
        if tag == THINK:
            self._mode = "thought"
        elif tag == END_THINK:
            self._mode = "text"
        elif tag != CLOSE and not self._lost:
            self._mode, self._searched, self._doubtful = "call", 0, []
        return True

    def _read_call(self, final: bool, whole: bool) -> bool:
        """Read a call once it is certain where it ends; whether it was."""
        while (found := self._next_end()) is not None:
            end, after = found
            if not is_inside_value(self._rest[:end]):
                return self._leave_call(end, after)
            # A tag that may be a part of a value: what follows tells.
            is_end = self._is_followed_by_call(after, final, whole) if after > end else False
            if is_end is None:
                return False
            if is_end:
                return self._leave_call(end, after)
            self._doubtful.append(found)
            if len(self._doubtful) == _MOST_DOUBTS:
                return self._leave_call(*self._doubtful[0], whole=False)
            self._searched = max(after, end + 1)
        self._searched = max(self._searched, len(self._rest) - len(CLOSE))
        return final and self._leave_call(len(self._rest), len(self._rest), whole)

    def _next_end(self) -> tuple[int, int] | None:
        """Where the next tag ends the call, if it is one, and where the text goes on then."""
        found = (_BARE_ENDS if self._bare else _ENDS).search(self._rest, self._searched)
        if found is None:
            return None
        return found.start(), found.start() if found[0] == OPEN else found.end()

    def _is_followed_by_call(self, at: int, final: bool, whole: bool) -> bool | None:
        """Whether another call, or the end that the model made, stands at `at`; None if that cannot be told yet."""
        tail = self._rest[at:].lstrip(_BLANK)
        marks = (OPEN, CLOSE, "<function=") if self._bare else (OPEN,)
        if tail.startswith(marks):
            return True
        if any(mark.startswith(tail) for mark in marks):
            return tail == "" and whole if final else None
        return False

    def _leave_call(self, end: int, after: int, whole: bool = True) -> bool:
        block = self._rest[:end] + (_END_FUNCTION if self._bare and whole else "")
        calls, text = read_calls(block, self._schemas, whole=whole)
        if not calls and self._doubtful and end > self._doubtful[0][0]:
            # Some value has no end, and so took in what follows: its first tag was one after all.
            return self._leave_call(*self._doubtful[0], whole)
        self._lost = self._lost or not whole
        self._emit(Text, self._answer.push(text))
        self._answer.break_off()
        self._pieces += calls
        self._rest = self._rest[after:]
        self._last = ""
        self._mode = "text"
        return True


class _Tags:
    """Finds tags in a text that is still growing."""

    def __init__(self, tags: list[str]) -> None:
        self._pattern = re.compile("|".join(map(re.escape, tags)))
        self._beginnings = {tag[:length] for tag in tags for length in range(1, len(tag))}
        self._longest = max(map(len, tags)) - 1

    def find(self, text: str, last: str, final: bool) -> tuple[int, str]:
        """Where the first tag begins, and the tag; without one "", and up to where none can begin any more.

        last: the letter before `text`. final: nothing follows it.
        """
        at = 0
        while (found := self._pattern.search(text, at)) is not None:
            before = text[found.start() - 1] if found.start() else last
            if before and before in _QUOTES:
                if found.end() == len(text) and not final:
                    return found.start(), ""
                if text[found.end() : found.end() + 1] == before:
                    at = found.end()
                    continue
            return found.start(), found[0]
        if not final:
            for length in range(min(self._longest, len(text) - at), 0, -1):
                if text[-length:] in self._beginnings:
                    return len(text) - length, ""
        return len(text), ""


class _Flow:
    """Text or thought on its way out: without the newlines at its borders."""

    def __init__(self) -> None:
        self._held = ""
        self._begun = False
        self._fresh = True

    def push(self, text: str) -> str:
        """What may go out: all but the blanks at its end, which a tag may follow."""
        text = self._held + text
        out = text.rstrip(_BLANK)
        self._held = text[len(out) :]
        if not out:
            return ""
        if self._fresh:
            out = ("\n" if self._begun else "") + out.lstrip("\n")
        self._begun, self._fresh = True, False
        return out

    def break_off(self) -> None:
        """A tag follows; if there is more after it, that begins on a new line."""
        self._held, self._fresh = "", True

    def end(self) -> str:
        """The blanks at the end of all."""
        return "" if self._fresh else self._held
