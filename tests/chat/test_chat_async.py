"""`async for` over answers that are cancelled: what a conversation keeps, and that it stays usable."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from reciter import Reciter

from npqwen.chat.conversation import Conversation


class Gated(Reciter):
    """Waits in the pass of the given number until it is let through."""

    def __init__(self, *texts: str, gate: int) -> None:
        super().__init__(*texts)
        self.gate = gate
        self.inside, self.go_on = threading.Event(), threading.Event()

    def forward(self, *args: Any, **options: Any) -> Any:
        if len(self.calls) + 1 == self.gate:
            self.inside.set()
            assert self.go_on.wait(60)
        return super().forward(*args, **options)


def cancelled(model: Gated, conversation: Conversation, **options: Any) -> list[Any]:
    """The events of an answer whose task is cancelled in the pass that waits."""
    events: list[Any] = []

    async def read() -> None:
        async for event in conversation.stream("Count.", **options):
            events.append(event)

    async def main() -> None:
        task = asyncio.ensure_future(read())
        await asyncio.to_thread(model.inside.wait, 60)
        task.cancel()
        await asyncio.sleep(0.02)
        assert not task.done()
        model.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    return events


def test_a_cancelled_answer_keeps_the_text_that_was_begun() -> None:
    model = Gated("1 2 3 4 5 6", "7", gate=6)
    conversation = Conversation(model, thinking=False)
    events = cancelled(model, conversation)
    kept = conversation.messages[-1]
    assert kept["role"] == "assistant"
    assert kept["content"].startswith("1 2 3")
    assert "6" not in kept["content"]
    assert "".join(event.text for event in events) in kept["content"]
    assert conversation.send("And now?").text == "7"


def test_an_answer_that_is_cancelled_before_its_text_leaves_no_trace() -> None:
    model = Gated("1 2 3", "7", gate=1)
    conversation = Conversation(model, thinking=False)
    assert cancelled(model, conversation) == []
    assert conversation.messages == []
    assert conversation.send("And now?").text == "7"


def test_tools_are_not_run_for_a_cancelled_answer() -> None:
    ran: list[int] = []

    def count(n: int) -> int:
        """Count.

        Args:
            n: up to here
        """
        ran.append(n)
        return n

    call = '<tool_call>\n{"name": "count", "arguments": {"n": 1}}\n</tool_call>'
    model = Gated(call, "7", gate=8)
    conversation = Conversation(model, thinking=False)
    assert cancelled(model, conversation, tools=[count], run_tools=True) == []
    assert ran == []
    assert conversation.messages == []
