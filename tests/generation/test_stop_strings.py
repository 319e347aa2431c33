"""Stop strings, against an oracle that searches the whole text after every character."""

from __future__ import annotations

import random
from typing import Any

import pytest
from checkpoints import TINY
from reciter import recite
from reference import ReferenceModel

from npqwen.errors import OptionError
from npqwen.generation.generate import generate, stream
from npqwen.generation.options import check_options
from npqwen.generation.stop_strings import StopStrings

SUM = "<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def model() -> ReferenceModel:
    return ReferenceModel.from_directory(TINY)


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


@pytest.mark.parametrize("stops", [[""], ["a", ""], [1], [None], ["\ud800"], ["a\udfffb"]])
def test_impossible_stop_strings(stops: list[Any]) -> None:
    with pytest.raises(OptionError, match="stop has"):
        StopStrings(stops)


@pytest.mark.parametrize("stop", [5, True, 1.5, b"a", "", "\ud800", ["a", None]])
def test_options_that_are_no_stop_strings(stop: Any) -> None:
    for call in (
        lambda: stream(recite("1"), "x", stop=stop),
        lambda: generate(recite("1"), "x", n=2, stop=stop),
        lambda: check_options({"stop": stop}),
    ):
        with pytest.raises(OptionError, match=r"^stop (is|has) "):
            call()


@pytest.mark.parametrize("stop", [None, (), []])
def test_no_stop_string(model: ReferenceModel, stop: Any) -> None:
    check_options({"stop": stop})
    assert generate(recite("12"), "x", stop=stop).text == "12"
    samples = model.generate("A river is", n=2, seed=1, max_tokens=3, stop=stop)
    assert [len(sample.ids) for sample in samples] == [3, 3]


@pytest.mark.parametrize(
    ("stop", "text", "found"),
    [
        ("37. 3", "<think>\n17 + 20 = ", "37. 3"),  # across tokens
        (["nowhere", "+ 2", "7 +"], "<think>\n1", "7 +"),  # the first to be complete
        (["= 42 and no more"], "<think>\n17 + 20 = 37. 37 + 5 = 42.\n</think>\n\n17 + 25 = 42", None),
    ],
)
def test_a_text_ends_before_a_stop_string(model: ReferenceModel, stop: Any, text: str, found: str | None) -> None:
    pieces = stream(model, SUM, temperature=0, stop=stop)
    assert "".join(pieces) == text
    assert pieces.stop_string == found
    assert pieces.finish_reason == "stop"
    assert model.tokenizer.decode(pieces.ids).startswith(text)


def test_a_stop_string_at_the_limit_is_a_stop_and_held_text_is_let_go() -> None:
    cut = generate(recite("1234"), "x", max_tokens=2, stop="12")
    assert (cut.text, cut.finish_reason) == ("", "stop")
    released = generate(recite("1234"), "x", max_tokens=2, stop="23")
    assert (released.text, released.finish_reason) == ("12", "length")
    at_eos = generate(recite("12"), "x", stop="23")
    assert (at_eos.text, at_eos.finish_reason) == ("12", "stop")


def test_a_special_tokens_name_stops_at_that_token() -> None:
    """It is hidden from the text, so it could not be found there."""
    model = recite("12<|im_start|>34")
    pieces = stream(model, "x", stop=["<|im_start|>", "nowhere", "29"])
    done = pieces.completion()
    assert (done.text, done.finish_reason, pieces.stop_string) == ("12", "stop", "<|im_start|>")
    assert stream(recite("1</think>2"), "x", stop="</think>").completion().text == "1"  # not special: text
    inside = stream(recite("12<|im_start|>34"), "x", stop="im_start").completion()
    assert inside.text == "1234"


@pytest.mark.parametrize("stop", ["🎉", "\u0301", "é", "🎉é", "\u200d👩"])
def test_stop_strings_of_characters_that_many_tokens_make(stop: str) -> None:
    text = "a🎈b🎉é c👩\u200d👩 q\u0301 end"
    pieces = stream(recite(text), "x", stop=stop)
    assert pieces.completion().text == text[: text.index(stop)]
    assert pieces.stop_string == stop
