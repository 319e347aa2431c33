"""Stop strings, against a twin that looks at the whole text after every character."""

from __future__ import annotations

import random

import pytest

from npqwen.errors import OptionError
from npqwen.generation.stop_strings import StopStrings


def twin(text: str, stops: list[str]) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def test_any_cut_of_the_text_gives_the_twins_result() -> None:
    rng = random.Random(0)
    hits = 0
    for _ in range(3000):
        text = "".join(rng.choices("ab\n", k=rng.randrange(40)))
        stops = ["".join(rng.choices("ab\n", k=rng.randrange(1, 9))) for _ in range(rng.randrange(4))]
        expected, found = twin(text, stops)
        hits += found is not None
        matcher = StopStrings(stops)
        out, rest = "", text
        while rest and matcher.found is None:
            cut = rng.randrange(1, 6)
            out += matcher.push(rest[:cut])
            rest = rest[cut:]
            assert expected.startswith(out)
        if matcher.found is None:
            out += matcher.finish("")
        assert (out, matcher.found) == (expected, found)
    assert 500 < hits < 2900


def test_only_what_could_become_a_stop_string_is_held_back() -> None:
    matcher = StopStrings(["</end>", "STOP"])
    assert matcher.push("abc <") == "abc "
    assert matcher.push("/e") == ""
    assert matcher.push("x ST") == "</ex "
    assert matcher.push("OPPED") == ""
    assert matcher.found == "STOP"


def test_without_stop_strings_everything_passes() -> None:
    assert StopStrings().push("abc") == "abc"


def test_the_last_piece_is_searched_too() -> None:
    matcher = StopStrings(["xy"])
    assert matcher.push("ax") == "a"
    assert matcher.finish("yb") == ""
    assert matcher.found == "xy"


@pytest.mark.parametrize("stops", [[""], ["a", ""], [1], [None]])
def test_impossible_stop_strings(stops: list) -> None:
    with pytest.raises(OptionError, match="stop has"):
        StopStrings(stops)
