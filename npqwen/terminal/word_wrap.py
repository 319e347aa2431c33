"""Division of text into rows, between words where possible."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from npqwen.terminal.styles import CODE, PLAIN, Cell, Run
from npqwen.terminal.width import letter_width, width

_NO_START = frozenset(("Pe", "Pf", "Po", "Lm", "Mn", "Me", "Cf", "Sk"))
"""Unicode categories that do not begin a row: closing punctuation, and what belongs to the previous character."""
_NO_END = frozenset(("Ps", "Pi"))
"""Unicode categories that do not end a row: opening punctuation."""
_JOINER = "\u200d"
"""The zero-width joiner, which makes one emoji of two."""


class WordWrap:
    """Wraps text that arrives in pieces; the rows do not depend on how it was split.

    Rows break at spaces, which are dropped there, and beside wide characters (Chinese, Japanese), but not before
    closing or after opening punctuation. Inline code (style CODE) and words that are wider than a row are not broken:
    the terminal does that, so that copied text has them in one piece.

    columns: the width of rows, one less than the terminal's; may be changed at any time.
    hard: break words that are wider than a row, and code.
    """

    def __init__(self, columns: int, *, hard: bool = False) -> None:
        self.columns = columns
        self.column = 0
        """Columns of the row that are settled. More than `columns` after a word that is wider than a row."""
        self._hard = hard
        self._hanging: Sequence[Cell] = ()
        self._fresh = True
        """Whether the row has nothing but its prefix."""
        self._gap: list[Cell] = []
        """Spaces before `_word`, each one column wide."""
        self._word: list[Cell] = []
        """The last word, which moves to the next row if it becomes too wide."""
        self._word_width = 0
        self._lost = False
        """Whether it is unknown how much of its row a wide word leaves free."""

    @property
    def unsettled(self) -> list[Cell]:
        """The end of the text, which fits the row as it is, but may have to move to the next one."""
        return self._gap + self._word

    def begin(self, prefix: Sequence[Run] = (), hanging: Sequence[Run] = ()) -> list[Cell]:
        """Begin a row with `prefix`; rows that follow by wrapping begin with `hanging`. Returns the prefix.

        Either is cut to half the row's width: first leading spaces are removed, then characters at its end.
        """
        self._gap, self._word, self._word_width = [], [], 0
        self._fresh, self._lost = True, False
        first = self._prefix([(letter, style) for text, style in prefix for letter in text])
        self._hanging = [(letter, style) for text, style in hanging for letter in text]
        self.column = _width(first)
        return first

    def add(self, text: str, style: str = PLAIN) -> list[Cell]:
        """Append text without newlines. Returns what is settled, beginnings of rows included."""
        settled: list[Cell] = []
        for letter in text:
            if letter == " " and (self._hard or not style.endswith(CODE)):
                settled += self.settle()
                if self.column + len(self._gap) < self.columns:  # more would be dropped
                    self._gap.append((letter, style))
                continue
            columns = letter_width(letter)
            if self._word and self._breaks_before(letter, columns, style):
                settled += self.settle()
            self._word.append((letter, style))
            self._word_width += columns
            if not self._fits() and not self._fresh:
                settled += self._new_row()
            if not self._fits():
                self._gap = []
            if not self._fits():
                settled += self._wide_word(columns)
        return settled

    def settle(self) -> list[Cell]:
        """Settle the last word: the text after it may begin a new row."""
        if not self._word:
            if self._fresh and self.column > self.columns:  # a wide word ends here, in a row that the terminal began
                self._fresh = False
                self.column = self.columns if self._lost else self.column % (self.columns + 1) or self.columns
                self._lost = False
            return []
        settled = self._gap + self._word
        self.column += len(self._gap) + self._word_width
        self._fresh = False
        self._gap, self._word, self._word_width = [], [], 0
        return settled

    def end(self) -> list[Cell]:
        """Settle the last word, and drop the spaces after it: the line ends here."""
        settled = self.settle()
        self._gap = []
        return settled

    def overflow(self, in_word: bool) -> list[Cell]:
        """Settle everything, in a row that the terminal has broken somewhere: the next word begins a new row.

        in_word: what comes next still belongs to the last word.
        """
        settled = self.unsettled
        self._gap, self._word, self._word_width = [], [], 0
        self.column = self.columns + 1
        self._fresh, self._lost = in_word, True
        return settled

    def _fits(self) -> bool:
        return self.column + len(self._gap) + self._word_width <= self.columns

    def _breaks_before(self, letter: str, columns: int, style: str) -> bool:
        last = self._word[-1][0]
        if columns == 0 or (columns == 1 and letter_width(last) < 2) or last == _JOINER:
            return False
        if not self._hard and style.endswith(CODE):
            return False
        return unicodedata.category(letter) not in _NO_START and unicodedata.category(last) not in _NO_END

    def _new_row(self) -> list[Cell]:
        hanging = self._prefix(self._hanging)
        self.column = _width(hanging)
        self._fresh, self._lost = True, False
        self._gap = []
        return [("\n", PLAIN), *hanging]

    def _wide_word(self, columns: int) -> list[Cell]:
        """Settle the word so far, which is wider than a row; `columns` are those of its last letter."""
        if not self._hard:
            settled = self.settle()
            self._fresh = True  # until the word ends
            return settled
        if len(self._word) == 1:
            return []
        last = self._word.pop()
        self._word_width -= columns
        settled = self.settle() + self._new_row()
        self._word, self._word_width = [last], columns
        return settled

    def _prefix(self, prefix: Sequence[Cell]) -> list[Cell]:
        limit = self.columns // 2
        prefix = list(prefix)
        while _width(prefix) > limit and prefix[0][0] == " ":
            del prefix[0]
        while _width(prefix) > limit:
            del prefix[-1]
        return prefix


def _width(letters: Sequence[Cell]) -> int:
    return sum(width(letter) for letter, _ in letters)
