"""An answer on the terminal while it is generated, and its statistics."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from npqwen.chat.events import Finish, Notice, Reasoning, Text
from npqwen.terminal.answer_text import AnswerText, answer_text
from npqwen.terminal.reasoning_view import ReasoningMode, ReasoningView
from npqwen.terminal.terminal import Terminal
from npqwen.tools.calls import ToolCall
from npqwen.wording import counted

if TYPE_CHECKING:
    from npqwen.chat.chat_stream import ChatStream
    from npqwen.chat.events import Event
    from npqwen.generation.completion import Usage

_THINKING_ENDED_BY = {
    "budget": ", ended by the thinking budget",
    "loop": ", ended because it repeated itself",
    "caller": ", ended early",
}
_FEWEST = 4
"""Tokens from which a speed is shown: the times of fewer say nothing."""
_INCOMPLETE = ", incomplete"


class AnswerView:
    """Shows answers: text (on a terminal, wrapped), reasoning according to `mode`, calls and new notices as dim lines.

    markdown: on a terminal, render the text as Markdown, unless it has a structure, such as JSON.
    """

    def __init__(self, terminal: Terminal, mode: ReasoningMode, *, markdown: bool = True) -> None:
        self.mode: ReasoningMode = mode
        self.markdown = markdown
        self.reasoning = ""
        """The latest reasoning."""
        self._terminal = terminal
        self._shown_notices: set[str] = set()
        self._reasoning_view: ReasoningView | None = None

    def follow(self, stream: ChatStream, hint: str = "", thinking_hint: str = "") -> None:
        """Show an answer to its end. An exception, such as Ctrl-C, still ends the text and the reasoning.

        hint: appended to the line into which the reasoning is folded. thinking_hint: shown while the model thinks.
        """
        self._reasoning_view = view = ReasoningView(self._terminal, self.mode, thinking_hint)
        text = answer_text(self._terminal, markdown=self.markdown and stream.structure is None)
        complete = False
        try:
            for event in stream:
                if isinstance(event, Reasoning):
                    view.add(event.text)
                elif view.open:
                    cut_off = isinstance(event, Finish) and event.reply.finish_reason == "length"
                    ended = _THINKING_ENDED_BY.get(stream.thinking_ended_by or "", _INCOMPLETE if cut_off else "")
                    view.close(stream.thinking_tokens, ended + hint)
                self._show(event, text)
            complete = True
        finally:
            if stream.reasoning:
                self.reasoning = stream.reasoning
            view.close(stream.thinking_tokens, interrupted=True)
            text.close(complete=complete)

    def announce_end_of_thinking(self) -> None:
        """Say that the thinking of the current answer is being ended."""
        if self._reasoning_view is not None:
            self._reasoning_view.announce_end()

    def _show(self, event: Event, text: AnswerText) -> None:
        if isinstance(event, Text):
            text.add(event.text)
        elif isinstance(event, ToolCall):
            arguments = json.dumps(event.arguments, ensure_ascii=False)
            text.pause()
            self._terminal.notice(f"calls {event.name} with {arguments}; no tools are available")
        elif isinstance(event, Notice) and event.text not in self._shown_notices:
            self._shown_notices.add(event.text)  # A notice about a setting is repeated with every answer.
            text.pause()
            self._terminal.notice(event.text)


def draft_tokens(usage: Usage) -> str:
    """How many draft tokens were accepted, to follow the number of generated tokens; "" if there were none."""
    return f" ({usage.accepted_tokens} of {usage.drafted_tokens} draft tokens accepted)" if usage.drafted_tokens else ""


def statistics(stream: ChatStream, context: str = "") -> str:
    """One line: why the answer ended, unless the model ended it; speed; tokens; `context`, the context usage."""
    usage = stream.usage
    parts = [
        decode_speed(usage),
        f"{counted(usage.generated_tokens, 'token')}{draft_tokens(usage)}",
        f"first token after {usage.first_token_seconds:.2f} s",
    ]
    reply = stream.reply
    if reply is None:
        parts.insert(0, "stopped")
    elif reply.finish_reason == "loop":
        parts.insert(0, "ended because it repeated itself")
    elif reply.finish_reason == "length":
        full = stream.max_tokens is None or usage.generated_tokens < stream.max_tokens
        parts.insert(0, "cut off: the context is full" if full else "cut off at max_tokens")
    return "; ".join(filter(None, (", ".join(filter(None, parts)), context)))


def decode_speed(usage: Usage) -> str:
    """The speed after the first token; empty for fewer than `_FEWEST` tokens."""
    return f"{usage.decode_rate:.1f} tok/s" if usage.generated_tokens >= _FEWEST else ""
