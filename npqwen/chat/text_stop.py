"""Ends an answer's text before a stop string, whatever the thought and the calls beside it say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from npqwen.chat.reply import Piece, Text
from npqwen.generation.stop_strings import StopStrings


class TextStop:
    """Passes an answer's pieces on until its text has one of `strings`, as OpenAI's API has it.

    Text that could still become one is held back until more of it comes, or something else does.
    """

    def __init__(self, strings: Sequence[str] = ()) -> None:
        self._stop = StopStrings(strings)

    @property
    def found(self) -> str | None:
        """The string that ended the text, if one did."""
        return self._stop.found

    def push(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """Those of `pieces`, the next ones, that are before the end."""
        for piece in pieces:
            if isinstance(piece, Text):
                yield from _text(self._stop.push(piece.text))
            else:
                yield from self.finish()
                yield piece
            if self.found is not None:
                return

    def finish(self) -> Iterator[Piece]:
        """What was held back."""
        yield from _text(self._stop.finish(""))


def _text(text: str) -> Iterator[Text]:
    if text:
        yield Text(text)
