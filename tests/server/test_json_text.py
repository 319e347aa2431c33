"""JSON as the APIs write it: any reader finds the value, and no reader's line ends inside it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from npqwen.server.json_text import SentText, json_text, server_sent

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
