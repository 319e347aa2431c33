"""Parsing of a model's text while it streams: reasoning, answer and tool calls.

Qwen3 writes `<think>`, its reasoning, `</think>`, the answer, and each call between `<tool_call>` and `</tool_call>`.
"""

from __future__ import annotations

import json
import re
from typing import Literal

from npqwen.chat.events import AnswerEvent, CallArguments, CallStart, Reasoning, Text, UnfinishedCall
from npqwen.generation.thinking import CLOSE as END_THINK
from npqwen.generation.thinking import OPEN as THINK
from npqwen.tools.calls import CLOSE, OPEN, is_inside_value, read_calls
from npqwen.tools.parameter_value import Schemas
from npqwen.tools.partial_call import PartialCall

_END_FUNCTION = "</function>"
_MAX_DOUBTS = 16
"""Closing tags inside values at which a block is no longer parsed as a call: each costs a scan of the whole block."""
_QUOTES = "`'\""
_BLANK = " \t\r\n"


class ReplyParser:
    """A state machine that turns pieces of text into events. Events do not depend on where the text was cut.

                        <think>                         <tool_call>, <function=NAME>
        +----------+ <------------ +--------+ ---------------------------------------> +------+
        | thinking |               |  text  |                                          | call |
        +----------+ ------------> +--------+ <--------------------------------------- +------+
                       </think>                 </tool_call>, </function>, <tool_call>
                                                  (not inside a value of the call)

    thinking: the text begins inside `<think>`, because the prompt ends with it (see `chat_template.opens_thinking`).
    schemas: the parameters of the tools on offer; Qwen3-Coder writes their values without quotes.
    structured: the answer is either calls, or text in which tags are plain text, as in the strings of JSON.

    In the states thinking and text, characters are emitted as soon as they cannot belong to a tag; tags are never
    emitted, not even in part. A tag between two quotes or backticks is text. Newlines next to tags belong to the
    chat template and are dropped. Reasoning without `</think>` stays reasoning.

    In the state call, the whole block is buffered: at its end, the calls in it are emitted, or its text if it cannot be
    read as a call. A closing tag inside a value of the call (a string, a parameter) ends the block only if what follows
    shows that it does: another call or the end of the text. Meanwhile `PartialCall` reads the block up to such a tag;
    once it is certain which tool is called, the arguments are emitted as they stream. If that call turns out to be
    incomplete or malformed at the block's end, an UnfinishedCall is emitted in place of the block's text. Calls have no
    ids.
    """

    def __init__(self, thinking: bool = False, schemas: Schemas | None = None, *, structured: bool = False) -> None:
        self._schemas = schemas or {}
        functions = [f"<function={name}>" for name in self._schemas]
        self._text_tags = _Tags([THINK, END_THINK, OPEN, CLOSE, *functions])
        self._thinking_tags = _Tags([THINK, END_THINK])
        self._structured = structured
        self._state: Literal["text", "thinking", "call"] = "thinking" if thinking else "text"
        self._rest = ""
        """Text not processed yet; in the state call, the block so far."""
        self._last = ""
        """The character before `_rest`, if there is one."""
        self._bare = False
        """Whether the call has no <tool_call> around it, as is the case for some of Qwen3-Coder's."""
        self._searched = 0
        """Where to look for the next tag in the block."""
        self._doubtful: list[tuple[int, int]] = []
        """Tags inside values so far, as `_next_end` returns them."""
        self._partial = PartialCall(self._schemas)
        """Reads the block while it is written."""
        self._calls = 0
        """How many calls have begun."""
        self._given_up = False
        """Whether a block was abandoned before its end: tags that follow may be part of it, so they open no call."""
        self._reasoning, self._answer = _BlankTrimmer(), _BlankTrimmer()
        self._pieces: list[AnswerEvent] = []

    def push(self, text: str) -> list[AnswerEvent]:
        """The events that are certain once `text` has been appended."""
        self._rest += text
        self._run(final=False, complete=True)
        return self._take_pieces()

    def finish(self, complete: bool = True) -> list[AnswerEvent]:
        """The events that were held back, at the end of the text.

        complete: the model ended the text itself. If it was cut off (max_tokens), an unfinished call is text, or an
        UnfinishedCall if its beginning has been emitted.
        """
        self._run(final=True, complete=complete)
        trimmer, kind = self._current()
        self._emit(kind, trimmer.end())
        return self._take_pieces()

    def _run(self, final: bool, complete: bool) -> None:
        while self._read_call(final, complete) if self._state == "call" else self._read_plain(final):
            pass

    def _take_pieces(self) -> list[AnswerEvent]:
        pieces, self._pieces = self._pieces, []
        return pieces

    def _current(self) -> tuple[_BlankTrimmer, type[Reasoning] | type[Text]]:
        return (self._reasoning, Reasoning) if self._state == "thinking" else (self._answer, Text)

    def _emit(self, kind: type[Reasoning] | type[Text], text: str) -> None:
        if text:
            self._pieces.append(kind(text))

    def _read_plain(self, final: bool) -> bool:
        """Emit text or reasoning up to the next tag; returns whether there was one."""
        trimmer, kind = self._current()
        tags = self._thinking_tags if self._state == "thinking" else self._text_tags
        start, tag = tags.find(self._rest, self._last, final)
        if self._structured and kind is Text and (trimmer.begun or self._rest[:start].strip(_BLANK)):
            start, tag = len(self._rest), ""
        self._emit(kind, trimmer.push(self._rest[:start]))
        self._last = (self._last + self._rest[:start])[-1:]
        self._rest = self._rest[start:]
        if not tag:
            return False
        trimmer.at_tag()
        self._bare = tag.startswith("<function=") and not self._given_up
        if not self._bare:
            self._rest = self._rest[len(tag) :]
            self._last = ""
        if tag == THINK:
            self._state = "thinking"
        elif tag == END_THINK:
            self._state = "text"
        elif tag != CLOSE and not self._given_up:
            self._state, self._searched, self._doubtful = "call", 0, []
            self._partial = PartialCall(self._schemas)
        return True

    def _read_call(self, final: bool, complete: bool) -> bool:
        """Leave the block if its end is certain, or the text ends; returns whether it was left.

        final: the text ends here. complete: see `finish`.
        """
        while (tag := self._next_end()) is not None:
            end, after = tag
            if not is_inside_value(self._rest[:end]):
                return self._leave_call(end, after)
            # The tag may be part of a value: that depends on what follows.
            is_end = self._is_followed_by_call(after, final, complete) if after > end else False
            if is_end is None:
                self._read_arguments(end)
                return False
            if is_end:
                return self._leave_call(end, after)
            self._doubtful.append(tag)
            if len(self._doubtful) == _MAX_DOUBTS:
                return self._leave_call(*self._doubtful[0], complete=False)
            self._searched = max(after, end + 1)
        if final:
            return self._leave_call(len(self._rest), len(self._rest), complete)
        self._searched = max(self._searched, len(self._rest) - len(CLOSE))
        self._read_arguments(len(self._rest) - self._ends.held(self._rest))
        return False

    @property
    def _ends(self) -> _Tags:
        return _BARE_ENDS if self._bare else _ENDS

    def _next_end(self) -> tuple[int, int] | None:
        """The end of the block if the next tag ends it, and the index to continue at."""
        tag = self._ends.pattern.search(self._rest, self._searched)
        if tag is None:
            return None
        return tag.start(), tag.start() if tag[0] == OPEN else tag.end()

    def _is_followed_by_call(self, at: int, final: bool, complete: bool) -> bool | None:
        """Whether another call, or the complete text's end, follows at index `at`; None if that is not certain yet."""
        tail = self._rest[at:].lstrip(_BLANK)
        marks = (OPEN, CLOSE, "<function=") if self._bare else (OPEN,)
        if tail.startswith(marks):
            return True
        if any(mark.startswith(tail) for mark in marks):
            return tail == "" and complete if final else None
        return False

    def _leave_call(self, end: int, after: int, complete: bool = True) -> bool:
        """Emit the block's calls and text, and continue at index `after` in the state text. Returns True."""
        block = self._rest[:end] + (_END_FUNCTION if self._bare and complete else "")
        calls, text = read_calls(block, self._schemas, complete=complete)
        if not calls and self._doubtful and end > self._doubtful[0][0]:
            # An unterminated value swallowed the tags after it: the first of them did end the block.
            return self._leave_call(*self._doubtful[0], complete)
        self._given_up = self._given_up or not complete
        self._read_arguments(end)
        if self._partial.name is not None:
            piece = self._partial.finish(block, calls[0]) if calls else None
            if piece is not None:
                self._emit_arguments(piece)
                self._pieces.append(calls.pop(0))
            else:
                self._pieces.append(UnfinishedCall(self._calls - 1, "", self._partial.name, self._partial.text))
                text = text if calls else ""
        self._emit(Text, self._answer.push(text))
        self._answer.at_tag()
        for call in calls:
            self._emit_start(call.name)
            self._emit_arguments(json.dumps(call.arguments, ensure_ascii=False))
            self._pieces.append(call)
        self._rest = self._rest[after:]
        self._last = ""
        self._state = "text"
        return True

    def _read_arguments(self, end: int) -> None:
        """Emit what is certain of the call that is being written; `_rest[:end]` is the block so far.

        After a tag that may end the block nothing is certain.
        """
        begun = self._partial.name is not None
        text = self._partial.read(self._rest, min(end, self._doubtful[0][0]) if self._doubtful else end)
        if not begun and self._partial.name is not None:
            self._emit_start(self._partial.name)
        self._emit_arguments(text)

    def _emit_start(self, name: str) -> None:
        self._pieces.append(CallStart(self._calls, "", name))
        self._calls += 1

    def _emit_arguments(self, text: str) -> None:
        if text:
            self._pieces.append(CallArguments(self._calls - 1, text))


class _Tags:
    """Finds tags in a text that arrives in pieces."""

    def __init__(self, tags: list[str]) -> None:
        self.pattern = re.compile("|".join(map(re.escape, tags)))
        self._prefixes = {tag[:length] for tag in tags for length in range(1, len(tag))}
        self._longest = max(map(len, tags)) - 1

    def find(self, text: str, last: str, final: bool) -> tuple[int, str]:
        """The index of the first tag, and the tag; without one, the index up to which no tag can begin, and "".

        last: the character before `text`. final: nothing follows `text`.
        """
        at = 0
        while (tag := self.pattern.search(text, at)) is not None:
            before = text[tag.start() - 1] if tag.start() else last
            if before and before in _QUOTES:
                if tag.end() == len(text) and not final:
                    return tag.start(), ""
                if text[tag.end() : tag.end() + 1] == before:
                    at = tag.end()
                    continue
            return tag.start(), tag[0]
        return len(text) - (0 if final else self.held(text[at:])), ""

    def held(self, text: str) -> int:
        """How many characters at the end of `text` may be the beginning of a tag."""
        lengths = range(min(self._longest, len(text)), 0, -1)
        return next((length for length in lengths if text[-length:] in self._prefixes), 0)


_ENDS = _Tags([CLOSE, OPEN])
_BARE_ENDS = _Tags([_END_FUNCTION, CLOSE, OPEN])
"""The tags that end a block; `_BARE_ENDS` for one that does not begin with <tool_call>."""


class _BlankTrimmer:
    """Drops the whitespace before a tag and the newlines after one; separates the parts around it by one newline."""

    def __init__(self) -> None:
        self._held = ""
        self._begun = False
        self._after_tag = True

    def push(self, text: str) -> str:
        """The text to emit: all but trailing whitespace, which a tag may follow."""
        text = self._held + text
        out = text.rstrip(_BLANK)
        self._held = text[len(out) :]
        if not out:
            return ""
        if self._after_tag:
            out = ("\n" if self._begun else "") + out.lstrip("\n")
        self._begun, self._after_tag = True, False
        return out

    def at_tag(self) -> None:
        """A tag follows: drop the whitespace before it."""
        self._held, self._after_tag = "", True

    @property
    def begun(self) -> bool:
        """Whether there was anything but whitespace."""
        return self._begun

    def end(self) -> str:
        """The whitespace at the end of the text."""
        return "" if self._after_tag else self._held
