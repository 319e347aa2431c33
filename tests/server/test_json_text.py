"""JSON as the APIs write it: any reader finds the value, and no reader's line ends inside it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from npqwen.server.json_text import SentText, json_text, server_sent, with_list

TEXTS = [
    *("", "a", 'quote " and \\ and </script>', "line\nend\r\t\x00\x1f", "é 中 🙂", "{}%s"),
    *("\x85\u2028\u2029", "half a pair \ud83d"),
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_value_is_read_back_from_one_line(text: str) -> None:
    value = {"a": [text, 1.5, None], text: True}
    written = json_text(value)
    assert json.loads(written.encode()) == value
    assert written.splitlines() == [written]


@pytest.mark.parametrize("values", [[], [1], [[1.5, "a"], {"b": None}]])
def test_a_list_that_is_written_value_by_value_is_part_of_the_object(values: list[Any]) -> None:
    head = {"model": 'a "name"', "n": {"x": 1}}
    assert json.loads(with_list(head, 'da"ta', iter(values))) == {**head, 'da"ta': values}


@pytest.mark.parametrize("text", TEXTS)
def test_events_that_differ_in_a_text_are_those_that_are_encoded_whole(text: str) -> None:
    def data(text: str) -> dict[str, Any]:
        return {"model": 'a "name" of 中', "choices": [{"text": text, "logprobs": None}], "usage": None}

    assert json.loads(SentText(data)(text).removeprefix("data: ")) == data(text)
    if text.isprintable():
        assert SentText(data)(text) == server_sent(data(text))


def test_numbers_that_json_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        json_text({"a": float("nan")})
