"""Text divided into rows."""

from __future__ import annotations

import textwrap

import numpy as np
import pytest

from npqwen.terminal.styles import CODE, PLAIN
from npqwen.terminal.width import width
from npqwen.terminal.word_wrap import WordWrap


def rows(
    text: str, columns: int, *, hard: bool = False, style: str = PLAIN, hanging: str = "", size: int = 1
) -> list[str]:
    """The rows of a text that comes in pieces of `size` characters."""
    wrap = WordWrap(columns, hard=hard)
    letters = wrap.begin([], [(hanging, PLAIN)])
    for at in range(0, len(text), size):
        letters += wrap.add(text[at : at + size], style)
    return "".join(letter for letter, _ in letters + wrap.end()).split("\n")


def test_words_wrap_as_textwrap_wraps_them() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        words = ["x" * random.integers(1, 8) for _ in range(random.integers(1, 30))]
        columns = int(random.integers(10, 40))
        text = " ".join(words)
        assert rows(text, columns) == textwrap.wrap(text, columns)
        assert rows(text, columns, hanging="   ") == textwrap.wrap(text, columns, subsequent_indent="   ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("中文可以在任何地方换行", ["中文可以在", "任何地方换", "行"]),
        ("标点不在行。首出现", ["标点不在", "行。首出现"]),
        ("五个字五「引号」", ["五个字五", "「引号」"]),
        ("abc中文 words中文", ["abc中文", "words中文"]),
        ("か\u3099" * 6, ["か\u3099" * 5, "か\u3099"]),
        ("👩\u200d👩\u200d👧 👍\U0001f3fd ok", ["👩\u200d👩\u200d👧", "👍\U0001f3fd ok"]),
        ("cafe\u0301s are open", ["cafe\u0301s are", "open"]),
    ],
)
def test_wide_characters_may_be_parted_but_not_from_what_belongs_to_them(text: str, expected: list[str]) -> None:
    assert rows(text, 10) == expected


def test_a_word_wider_than_a_row_stays_in_one_piece_for_the_terminal_to_wrap() -> None:
    url = "https://example.org/" + "x" * 30
    last = "x" * 8  # of a terminal of 21 columns, which shows 50 characters in rows of 21, 21 and 8
    assert url[42:] == last
    assert rows(f"See {url} for more of it", 20) == ["See", f"{url} for more of", "it"]
    assert rows(f"See {url} for more", 20, hard=True)[:3] == ["See", url[:20], url[20:40]]


def test_inline_code_is_not_parted() -> None:
    assert rows("a b c d e f", 5, style=CODE) == ["a b c d e f"]
    assert rows("a b c d e f", 5, style=CODE, hard=True) == ["a b c", "d e f"]


def test_a_prefix_takes_half_of_the_row_at_most() -> None:
    wrap = WordWrap(10)
    assert "".join(letter for letter, _ in wrap.begin([(" " * 30 + "- ", PLAIN)])) == "   - "
    assert "".join(letter for letter, _ in wrap.begin([("│ " * 9, PLAIN)])) == "│ │ │"


@pytest.mark.parametrize("hard", [False, True])
def test_rows_do_not_depend_on_the_pieces(hard: bool) -> None:
    random = np.random.default_rng(1)
    for _ in range(300):
        text = "".join(random.choice([*"ab  中。「😀\u0301\u200d-", "word", "w" * 15], 40))
        columns = int(random.integers(4, 20))
        whole = rows(text, columns, hard=hard, size=len(text))
        assert rows(text, columns, hard=hard) == whole == rows(text, columns, hard=hard, size=3)
        if hard:
            assert all(width(row) <= columns for row in whole)
        letters = text.replace(" ", "")
        assert "".join(whole).replace(" ", "") == letters


def test_the_width_may_change_at_any_time() -> None:
    wrap = WordWrap(20)
    letters = wrap.add("one two three four five ")
    wrap.columns = 8
    letters += wrap.add("six seven eight") + wrap.end()
    assert "".join(letter for letter, _ in letters).split("\n") == ["one two three four", "five six", "seven", "eight"]
