"""An answer on the terminal as it comes, and what to tell about it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from npqwen.chat.answer import Finish, Notice
from npqwen.chat.reply import Reasoning, Text
from npqwen.terminal.screen import Terminal
from npqwen.terminal.thought_view import ThoughtView, View
from npqwen.tools.calls import ToolCall

if TYPE_CHECKING:
    from npqwen.chat.answer import ChatStream, Event

_ENDED_BY = {
    "budget": ", ended by the thinking budget",
    "loop": ", ended because it repeated itself",
    "caller": ", ended",
}
_CUT = ", not to its end"


class AnswerView:
    """Shows answers: the text as it is, its Markdown untouched; thoughts by `view`; the rest a dim line each."""

    def __init__(self, terminal: Terminal, view: View) -> None:
        self.view = view
        self.thought = ""
        """The last thought there was."""
        self._terminal = terminal
        self._told: set[str] = set()

    def follow(self, stream: ChatStream, hint: str = "") -> None:
        """Show a whole answer. However it is left, the terminal is in order.

        hint: what to add to the line that is left of a thought.
        """
        thought = ThoughtView(self._terminal, self.view)
        try:
            for event in stream:
                if isinstance(event, Reasoning):
                    thought.add(event.text)
                elif thought.open:
                    cut = isinstance(event, Finish) and event.reply.finish_reason == "length"
                    how = _ENDED_BY.get(stream.thinking_ended_by or "", _CUT if cut else "")
                    thought.close(stream.thinking_tokens, how + hint)
                self._show(event)
        finally:
            if stream.reasoning:
                self.thought = stream.reasoning
            thought.close(stream.thinking_tokens, _CUT)
            self._terminal.end_line()

    def _show(self, event: Event) -> None:
        if isinstance(event, Text):
            self._terminal.answer(event.text)
        elif isinstance(event, ToolCall):
            arguments = json.dumps(event.arguments, ensure_ascii=False)
            self._terminal.notice(f"calls {event.name} with {arguments}; there are no tools here")
        elif isinstance(event, Notice) and event.text not in self._told:
            self._told.add(event.text)  # The same setting would be told of at every answer.
            self._terminal.notice(event.text)


def statistics(stream: ChatStream, context: str = "") -> str:
    """One line: how it ended if not as it should, speed, tokens. context: how much of it is in use."""
    usage = stream.usage
    parts = [
        f"{usage.decode_rate:.1f} tok/s",
        f"{usage.generated_tokens} tokens",
        f"first after {usage.first_token_seconds:.2f} s",
    ]
    reply = stream.reply
    if reply is None:
        parts.insert(0, "stopped")
    elif reply.finish_reason == "loop":
        parts.insert(0, "ended because it repeated itself")
    elif reply.finish_reason == "length":
        full = stream.max_tokens is None or usage.generated_tokens < stream.max_tokens
        parts.insert(0, "cut off: the context is full" if full else "cut off at max_tokens")
    return "; ".join(filter(None, (", ".join(parts), context)))
