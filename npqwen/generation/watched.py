"""A text that is being generated, as the functions that watch it see it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from npqwen.generation.completion import FinishReason
    from npqwen.generation.thinking import ThinkingTracker

EndedBy = Literal["budget", "loop", "caller"]
"""Why the thinking was cut short: its budget, a loop, or a call of `end_thinking`."""


class Watched(Protocol):
    """A text that is being generated, as watches see it."""

    @property
    def ids(self) -> list[int]:
        """The ids generated so far, the prompt's not included."""

    @property
    def text(self) -> str:
        """The text so far."""

    @property
    def thinking(self) -> ThinkingTracker:
        """The state of the text's thinking."""

    @property
    def within_character(self) -> bool:
        """Whether the last token ended inside a character's bytes."""

    def force(self, ids: Iterable[int]) -> None:
        """Make `ids` the next tokens."""

    def end(self, reason: FinishReason) -> None:
        """Finish the text here."""

    def end_thinking(self, by: EndedBy = "caller") -> None:
        """End the thinking, so that the answer follows."""


Watch = Callable[[Watched], None]
"""watch(text) is called before the first token is drawn and after every step."""
