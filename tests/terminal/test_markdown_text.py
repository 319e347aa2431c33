"""Markdown on a terminal, as pyte shows what was written."""

from __future__ import annotations

import re
import time
import unicodedata
from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import pyte
import pytest
from fake_terminal import emulated

from npqwen.terminal.inline_markdown import LIMIT
from npqwen.terminal.markdown_text import MarkdownText
from npqwen.terminal.row_printer import RowPrinter


class Writing:
    """Markdown that is written to a terminal of changeable width."""

    def __init__(self, columns: int, *, redraws: bool = True, styles: bool = True) -> None:
        self.columns = columns
        self.written = ""
        self.text = MarkdownText(RowPrinter(self._write, lambda: self.columns, redraws=redraws, styles=styles))

    def _write(self, text: str) -> None:
        self.written += text

    def add(self, pieces: Iterable[str]) -> Writing:
        for piece in pieces:
            self.text.add(piece)
        return self

    def screen(self) -> pyte.Screen:
        return emulated(self.written, self.columns)


def shown(source: str, columns: int = 80, *, styles: bool = True) -> list[str]:
    """The rows of a finished text."""
    writing = Writing(columns, styles=styles).add(source)
    writing.text.close()
    screen = writing.screen()
    assert screen.cursor.x == 0
    return [row.rstrip() for row in screen.display[: screen.cursor.y]]


def letters(screen: pyte.Screen, attribute: str) -> str:
    """The characters that are bold, italics, underscore or strikethrough, or of the colour fg."""
    cells = [screen.buffer[y][x] for y in range(screen.lines) for x in range(screen.columns)]
    return "".join(cell.data for cell in cells if getattr(cell, attribute) not in (False, "default"))


@pytest.mark.parametrize(
    ("source", "row", "attribute", "styled"),
    [
        ("a **bold** word", "a bold word", "bold", "bold"),
        ("an *italic* word", "an italic word", "italics", "italic"),
        ("an _italic_ word", "an italic word", "italics", "italic"),
        ("***both*** of them", "both of them", "bold", "both"),
        ("***both*** of them", "both of them", "italics", "both"),
        ("~~no~~ yes", "no yes", "strikethrough", "no"),
        ("**bold *and italic***", "bold and italic", "bold", "bold and italic"),
        ("**bold *and italic***", "bold and italic", "italics", "and italic"),
        ("*italic **and bold** again*", "italic and bold again", "bold", "and bold"),
        ("这是**粗体**字", "这是粗体字", "bold", "粗体"),
        ("**“引号”**后面", "“引号”后面", "bold", "“引号”"),
        ("run `ls *.py` now", "run ls *.py now", "fg", "ls *.py"),
        ("``a `b` c``", "a `b` c", "fg", "a `b` c"),
        ("**use `x`:** so", "use x: so", "bold", "use x:"),
        ("see [the *docs*](https://a.b/c_d_e) now", "see the docs (https://a.b/c_d_e) now", "underscore", "the docs"),
        ("[x](https://en.org/wiki/A_(b)).", "x (https://en.org/wiki/A_(b)).", "underscore", "x"),
        ('[x](http://a.b "title")', "x (http://a.b)", "underscore", "x"),
        ("[http://a.b](http://a.b)", "http://a.b", "underscore", "http://a.b"),
        ("# A *b* `c`", "A b c", "bold", "A b c"),
        ("#### A", "A", "bold", "A"),
        (r"\*not\* but *so*", "*not* but so", "italics", "so"),
        (r"\_not\_ \~\~ \# \$5 but *a\_b and \$c*", "_not_ ~~ # $5 but a_b and $c", "italics", "a_b and $c"),
        ("**N**umber", "Number", "bold", "N"),
        ("1. **src/**: sources", "1. src/: sources", "bold", "src/"),
        ("- **`x`** and **?** and **-5 %**", "• x and ? and -5 %", "bold", "x?-5 %"),
        ("**(a)** *(b)* **[c](d)**", "(a) (b) c (d)", "bold", "(a)c (d)"),
        ("**a *b c**", "a *b c", "bold", "a *b c"),
    ],
)
def test_marks_become_styles(source: str, row: str, attribute: str, styled: str) -> None:
    writing = Writing(80).add(source)
    writing.text.close()
    assert writing.screen().display[0].rstrip() == row
    assert letters(writing.screen(), attribute).replace(" ", "") == styled.replace(" ", "")


@pytest.mark.parametrize(
    "source",
    [
        "def f(*args, **kwargs): ...",
        "2 * 3 * 4 and 2*3*4 and a ** b ** c",
        "snake_case_name and __init__ and _private",
        "/* a comment */ and /*one*/ and src/**/*.py and *.c or *.h",
        "an open `tick and an **open mark",
        "a [1] and a[0] and [x] (y) and [z](not closed",
        "[text](has spaces in it)",
        r"$x^*_i + (y)_j * z_j^*$ and \(a *b* c\) and $$\mathbf{x} *y* z$$",
        "it costs $5, *not $6, or 7 $",
        "a **** b",
        "#hashtag and ####### seven",
        "1.5 is a number, 2) too",
        "-x and +y and *",
        "C:\\path\\to and \\alpha",
        "a < b > c & d &amp; <br> <https://a.b>",
        "| no table |",
        "x | y",
    ],
)
@pytest.mark.parametrize("columns", [24, 80])
def test_what_is_no_markup_is_shown_as_written(source: str, columns: int) -> None:
    writing = Writing(columns).add(source)
    writing.text.close()
    assert " ".join(row.strip() for row in writing.screen().display if row.strip()) == source
    for attribute in ("bold", "italics", "underscore", "strikethrough", "fg"):
        assert not letters(writing.screen(), attribute)


def test_a_mark_that_closes_too_late_is_shown_as_written() -> None:
    near, far = f"**{'a ' * (LIMIT // 2 - 5)}b**", f"**{'a ' * LIMIT}b**"
    assert "**" not in "".join(shown(near))
    assert " ".join(shown(far)) == far


def test_lists_hang_and_nest() -> None:
    source = "- one two three four\n  - five six seven eight\n    1. nine ten eleven twelve\n"
    assert shown(f"{source}10) ten\n* star\n- [ ] to do\n", 18) == [
        "• one two three",
        "  four",
        "  • five six",
        "    seven eight",
        "    1. nine ten",
        "       eleven",
        "       twelve",
        "10) ten",
        "• star",
        "• [ ] to do",
    ]  # fmt: skip


def test_quotes_have_a_bar_on_every_row() -> None:
    assert shown("> one two three four\n>\n> - five six seven\n>> deep", 16) == [
        "│ one two three",
        "│ four",
        "│",
        "│ • five six",
        "│   seven",
        "│ │ deep",
    ]


def test_code_is_verbatim_and_the_terminal_wraps_it() -> None:
    code = "def f(x):\n    return '**x** `y`'  # a line that is longer than the row\n\n\tx = [1](2)\n    "
    writing = Writing(30).add(f"Code:\n\n```python\n{code}\n```\nafter **that**")
    writing.text.close()
    assert f"{code}\n" in writing.written.replace("\x1b[2m", "").replace("\x1b[0m", "")
    assert shown(f"```python\n{code}\n```\n", 90)[1:-1] == [*code.replace("\t", " " * 8).rstrip().split("\n"), ""]
    assert letters(writing.screen(), "bold") == "that"


@pytest.mark.parametrize(
    ("source", "rows"),
    [
        ("````\n```\n````\n*a*", ["````", "```", "````", "a"]),
        ("~~~ x\n```\n~~~\n*a*", ["~~~ x", "```", "~~~", "a"]),
        ("- item\n  ```\n  *a*\n  ```\n  *b*", ["• item", "  ```", "  *a*", "  ```", "  b"]),
        ("> ```\n> *a*\n> ```\n> *b*", ["│ ```", "│ *a*", "│ ```", "│ b"]),
        ("> ```\n> *a*\n*b*", ["│ ```", "│ *a*", "b"]),
        ("```a` ```\n*b*", ["a`", "b"]),
        ("```\n*never closed*", ["```", "*never closed*"]),
    ],
)
def test_fences(source: str, rows: list[str]) -> None:
    assert shown(source) == rows


def test_rules() -> None:
    assert shown("a\n\n---\n* * *\n___\nb") == ["a", "", "─" * 40, "─" * 40, "─" * 40, "b"]
    assert shown("---", 24) == ["─" * 23]


def test_blocks_of_mathematics_are_left_as_they_are() -> None:
    source = "\\[\n- b * c * d_i\n+ *e*\n\\]\n*a*\n$$\n# x *y*\n$$\n\\begin{align}\n> 1\n\\end{align}\n*b*"
    assert shown(source) == source.replace("*a*", "a").replace("*b*", "b").split("\n")
    assert shown("$$\nnever closed\n\n*a*") == ["$$", "never closed", "", "a"]
    assert shown("$$ x *y* $$\n*a*") == ["$$ x *y* $$", "a"]


TABLE = "| Name | Age |  |\n|:-----|----:|:-:|\n| **Ann** B. | 7 | x |\n| 北京 | 1,000 | `a|b\\|c` |\n| short |\n"


def test_tables_are_aligned() -> None:
    assert shown(f"Before:\n{TABLE}\nafter") == [
        "Before:",
        "Name   │   Age │    │",
        "───────┼───────┼────┼─────",
        "Ann B. │     7 │ x  │",
        "北京   │ 1,000 │ `a │ b|c`",
        "short  │       │    │",
        "",
        "after",
    ]


def test_a_wide_table_wraps_its_cells_if_it_can() -> None:
    table = "| a | b |\n|---|---|\n| one two three four | five six seven eight |\n| x | y |\n"
    assert shown(table, 24) == [
        "a          │ b",
        "───────────┼───────────",
        "one two    │ five six",
        "three four │ seven",
        "           │ eight",
        "───────────┼───────────",
        "x          │ y",
    ]
    many = "|" + " abcdef |" * 9
    rows = shown(f"{many}\n|{'-|' * 9}\n{many}", 30)
    assert " ".join(rows).startswith("| abcdef | abcdef")
    assert sum(row.count("abcdef") for row in rows) == 18


def test_a_cell_may_have_several_lines() -> None:
    table = "| a | b |\n|---|---|\n| x | **one<br>two**<br/>three |\n"
    assert shown(table) == ["a │ b", "──┼──────", "x │ one", "  │ two", "  │ three"]


def test_a_long_table_does_not_wait_for_its_end() -> None:
    row = "| a | {} |\n"
    writing = Writing(80).add("| n | m |\n|---|---|\n" + "".join(row.format(n) for n in range(60)))
    assert "a │ 59" in writing.screen().display[61]
    writing.add(row.format("a longer text" * 9))
    writing.text.close()
    assert "".join(writing.screen().display).count("longer") == 9


def test_without_styles_marks_stay_and_structure_is_drawn() -> None:
    source = "# A\n- **b** `c` [d](e)\n\n| x |\n|---|\n| *y* |\n\n---"
    writing = Writing(80, styles=False).add(source)
    writing.text.close()
    assert shown(source, styles=False) == ["# A", "• **b** `c` [d](e)", "", "x", "───", "*y*", "", "─" * 40]
    assert "m" not in {part[-1:] for part in writing.written.split("\x1b[")[1:]}


def test_text_appears_as_it_comes() -> None:
    writing = Writing(30)
    for piece, row in [
        ("A ri", "A ri"),
        ("ver *is", "A river is"),
        (" a ** ", "A river is a **"),
        ("b*.", "A river is a ** b."),
        (" `co", "A river is a ** b. co"),
        ("\n| x | y", "| x | y"),
        (" |\n|--", "|--"),
    ]:
        writing.add([piece])
        screen = writing.screen()
        assert screen.display[screen.cursor.y].rstrip() == row
    writing.text.close()


def test_a_word_that_does_not_fit_moves_to_the_next_row() -> None:
    writing = Writing(12).add(["one two ", "th"])
    assert writing.screen().display[0] == "one two th  "
    writing.add(["ree"])
    assert [row.strip() for row in writing.screen().display[:2]] == ["one two", "three"]


# --- any text ---

MARKS = ["*", "**", "***", "_", "__", "`", "``", "```", "~~", "~~~", "#", "##", "-", "+", "---", ">", "|", "1."]
MARKS += ["<", "&", "[", "](", ")", "](u)", "\\", "\\*", "$", "$$", "\\[", "\\]", "\\(", "\\)", "!", ".", ":", ",", "("]
BLOCKS = ["\n", "\n\n", "- ", "1. ", "> ", "# ", "| a | b |\n", "|---|:-:|\n", "```\n", "***\n"]
WORDS = ["a", "of ", "word", "words of it ", "wide" * 8, "http://a.b/c_d_e ", "x*y", "_z_", " ", "  ", "    ", "\t"]
OTHERS = ["中文", "。", "「", "😀", "\u00ad", "e\u0301", "👩\u200d👧"]
PARTS = [*MARKS, *BLOCKS, *WORDS, *OTHERS]


def random_text(random: np.random.Generator, parts: int = 40) -> str:
    return "".join(random.choice(PARTS, random.integers(1, parts)))


def pieces_of(text: str, random: np.random.Generator) -> list[str]:
    cuts = [0, *sorted(random.integers(0, len(text) + 1, random.integers(0, 12))), len(text)]
    return [text[start:end] for start, end in pairwise(cuts)]


def cells(screen: pyte.Screen) -> list[list[pyte.screens.Char]]:
    return [[screen.buffer[y][x] for x in range(screen.columns)] for y in range(screen.cursor.y + 1)]


@pytest.mark.parametrize("styles", [False, True])
def test_the_screen_does_not_depend_on_the_pieces(styles: bool) -> None:
    random = np.random.default_rng(2)
    for number in range(150):
        text = random_text(random)
        columns = int(random.choice([10, 24, 40, 80]))
        whole = Writing(columns, styles=styles).add([text])
        whole.text.close()
        expected = cells(whole.screen())
        divided = pieces_of(text, random) if number % 2 else text
        for redraws in (False, True):
            other = Writing(columns, styles=styles, redraws=redraws).add(divided)
            other.text.close()
            assert cells(other.screen()) == expected, (text, columns, redraws)


@pytest.mark.parametrize("styles", [False, True])
def test_no_letter_is_lost(styles: bool) -> None:
    random = np.random.default_rng(3)
    for _ in range(300):
        text = random_text(random)
        writing = Writing(1000, redraws=False, styles=styles).add([text])
        writing.text.close()
        got = re.sub(r"\x1b\[[\d;]*m", "", writing.written)
        assert _alphanumeric(got) == _alphanumeric(text), text


def _alphanumeric(text: str) -> str:
    return "".join(filter(str.isalnum, unicodedata.normalize("NFC", text)))


def test_what_was_shown_stays_except_in_the_last_row() -> None:
    random = np.random.default_rng(4)
    for _ in range(40):
        writing = Writing(24, styles=False)
        before: list[str] = []
        for piece in pieces_of(random_text(random), random):
            writing.add([piece])
            screen = writing.screen()
            rows = screen.display[: screen.cursor.y + 1]
            assert rows[: max(0, len(before) - 1)] == before[:-1]
            before = rows


def test_only_known_escape_sequences_are_written() -> None:
    random = np.random.default_rng(5)
    for _ in range(100):
        writing = Writing(24).add(random_text(random))
        writing.text.close()
        for part in writing.written.split("\x1b")[1:]:
            assert part.startswith("[")
            assert part.lstrip("[0123456789;")[0] in "mDK"


def test_the_work_is_linear_in_the_length() -> None:
    def seconds(text: str) -> float:
        start = time.process_time()
        writing = MarkdownText(RowPrinter(lambda text: None, lambda: 80, redraws=True, styles=True))
        for at in range(0, len(text), 4):
            writing.add(text[at : at + 4])
        writing.close()
        return time.process_time() - start

    for unit in ("word ", "x", "*a ", "`a ", "[a", "$a", "**", "- ", "> ", "| a ", "#", "\\(", "`", "1. ", " ", "\n"):
        short = max(min(seconds(unit * (1000 // len(unit))) for _ in range(3)), 2e-3)
        assert seconds(unit * (8000 // len(unit))) < 8 * 5 * short, unit


# --- a window whose width changes ---


@pytest.mark.parametrize(("before", "after"), [(60, 30), (30, 60), (24, 80), (80, 24)])
def test_the_width_may_change_in_the_middle(before: int, after: int) -> None:
    text = "Some words of a **longer bold text** that are wrapped at `the edge` of the window. " * 3
    for cut in range(0, 80, 5):
        writing = Writing(before).add(text[:cut])
        start = len(writing.written)
        writing.columns = after
        writing.add(text[cut:])
        writing.text.close()
        # A wider terminal stands for one that has broken the last row: nothing is erased there, nothing is repeated.
        rows = emulated(writing.written, 200, 20).display
        assert "".join(rows).replace(" ", "") == text.replace(" ", "").replace("*", "").replace("`", "")
        for row in emulated(writing.written[start:], 200, 20).display[1:]:
            assert len(row.rstrip()) < after


def test_what_cannot_be_erased_after_a_change_of_the_width_stays() -> None:
    writing = Writing(60).add("Some words and **an open mark of a span that")
    writing.columns = 30
    writing.add("\nand more\n")
    writing.text.close()
    rows = [row.rstrip() for row in emulated(writing.written, 200, 20).display if row.strip()]
    assert rows == ["Some words and an open mark of a span that", "**an open mark of a span that", "and more"]
