"""Stop strings in an answer: they end its text; reasoning and calls may contain them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from npqwen.chat.events import AnswerEvent, Text
from npqwen.generation.stop_strings import StopStrings


class TextStop:
    """Passes on an answer's pieces until its text contains one of `strings`.

    Text that may become a stop string is held back until more text, or another kind of piece, follows.
    """

    def __init__(self, strings: Sequence[str] = ()) -> None:
        self._stop = StopStrings(strings)

    @property
    def found(self) -> str | None:
        """The string that ended the text, if one did."""
        return self._stop.found

    def push(self, pieces: Iterable[AnswerEvent]) -> Iterator[AnswerEvent]:
        """The pieces that are certain to precede any stop string, once `pieces` have been appended."""
        for piece in pieces:
            if isinstance(piece, Text):
                yield from _text(self._stop.push(piece.text))
            else:
                yield from self.finish()
                yield piece
            if self.found is not None:
                return

    def finish(self) -> Iterator[AnswerEvent]:
        """The text that was held back, at the end of the answer."""
        yield from _text(self._stop.finish(""))


def _text(text: str) -> Iterator[Text]:
    if text:
        yield Text(text)
