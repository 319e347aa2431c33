"""An answer that a conversation already begins: its last message, if that is the assistant's, which is continued."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from npqwen.chat.messages import Message, joined
from npqwen.generation.thinking import CLOSE, OPEN


class BegunAnswer(NamedTuple):
    """What the assistant has said; the model writes what follows, as part of the same message."""

    reasoning: str
    """Empty if the answer begins without thinking."""
    text: str
    """Empty while the model still thinks."""

    @classmethod
    def of(cls, messages: Sequence[Message]) -> BegunAnswer | None:
        """The answer that checked messages end with; None if the next answer is a new message.

        Calls end an answer. Reasoning may be in `reasoning_content`, or in the content between think tags. An answer
        with neither reasoning nor text has not begun: it is only the place of the next one.
        """
        last = messages[-1]
        if last["role"] != "assistant" or last.get("tool_calls"):
            return None
        text, reasoning = joined(last)["content"], last.get("reasoning_content", "")
        if not reasoning and text.lstrip().startswith(OPEN):
            reasoning, _, text = text.lstrip().removeprefix(OPEN).partition(CLOSE)
        return cls(reasoning.strip("\n"), text.lstrip("\n") if reasoning else text)

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.text)

    @property
    def is_thinking(self) -> bool:
        """Whether what follows continues the reasoning."""
        return bool(self.reasoning) and not self.text

    def whole(self, rest: Message) -> Message:
        """The assistant's message that `rest`, which the model wrote, completes."""
        message = {**rest, "content": self.text + rest["content"]}
        reasoning = self.reasoning + rest.get("reasoning_content", "")
        return {**message, "reasoning_content": reasoning} if reasoning else message

    def rendered(self, is_open: bool, marked: Callable[[str], str] = str) -> str:
        """The text after the opening of an answer. is_open: whether that opening ends inside think tags.

        marked: applied to what the assistant has said. Qwen's templates write a finished thought in the same way.
        """
        opening = "" if is_open else f"{OPEN}\n"
        if self.is_thinking:
            return opening + marked(self.reasoning)
        if self.reasoning:
            return f"{opening}{marked(self.reasoning)}\n{CLOSE}\n\n{marked(self.text)}"
        return (f"\n{CLOSE}\n\n" if is_open else "") + marked(self.text)
