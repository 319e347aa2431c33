"""A body's fields: what is read, what is refused in one line that names the field, and what is tolerated."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
from asgi import call
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from npqwen.server.exchange import Exchanges
from npqwen.server.fields import FieldError, Fields, parse_fields, read_fields


def refusal(call: Callable[[], object]) -> tuple[str, str | None]:
    with pytest.raises(FieldError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value), error.value.param


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "the body is empty"),
        (b"  \n", "the body is empty"),
        (b"[1]", "must be a JSON object"),
        (b"5", "must be a JSON object"),
        (b"{", "not valid JSON"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": ' + 5000 * b"9" + b"}", "too many digits"),
        (b'{"a": "\xff"}', "not valid UTF-8 at byte 7"),
        (b'{"a": ' + 100_000 * b"[" + 100_000 * b"]" + b"}", "nested too deeply"),
        ('{"a": "ä'.encode("utf-16"), "not valid"),
    ],
)
def test_what_is_no_object_of_json_is_refused_in_one_line(body: bytes, words: str) -> None:
    message, param = refusal(lambda: parse_fields(body))
    assert words in message
    assert param is None
    assert len(message) < 200


def test_a_byte_order_mark_and_repeated_keys_are_tolerated() -> None:
    assert parse_fields(b'\xef\xbb\xbf{"n": 1, "n": 2}').whole("n", 1) == 2


@pytest.mark.parametrize(
    ("read", "value", "message"),
    [
        (lambda f: f.text("x"), 5, "x is 5; it must be text"),
        (lambda f: f.text("x"), "\ud800", "half a surrogate pair"),
        (lambda f: f.flag("x"), 1, "x is 1; it must be true or false"),
        (lambda f: f.whole("x", 1, 9), 10, "x is 10; it must be a whole number from 1 to 9"),
        (lambda f: f.whole("x", 1), True, "x is True; it must be a whole number, 1 or more"),
        (lambda f: f.whole("x", 1), 1.5, "x is 1.5; it must be a whole number, 1 or more"),
        (lambda f: f.number("x", 0, 2), "1", "x is '1'; it must be a number from 0 to 2"),
        (lambda f: f.number("x", 0, 2), 10**400, "it must be a number from 0 to 2"),
        (lambda f: f.one_of("x", ["a", "b"]), ["a"], "x is ['a']; it must be one of a, b"),
        (lambda f: f.items("x"), {}, "x is {}; it must be a list"),
        (lambda f: f.object("x"), [], "x is []; it must be an object"),
        (lambda f: f.objects("x"), [{}, 5], "x[1] is 5; it must be an object"),
        (lambda f: f.required("x", f.text), None, "x is missing"),
        (lambda f: f.refuse("x", "there is no sound", False), True, "x is not supported: there is no sound"),
    ],
)
def test_a_wrong_value_is_refused_with_the_fields_name(
    read: Callable[[Fields], object], value: Any, message: str
) -> None:
    words, param = refusal(lambda: read(Fields({"x": value})))
    assert message in words
    assert param in ("x", "x[1]")


def test_the_path_of_a_field_within_objects_is_named() -> None:
    fields = parse_fields(b'{"messages": [{}, {}, {"content": 5}]}')
    message = fields.required("messages", fields.objects)[2]
    assert refusal(lambda: message.wrong("content", "text or a list of parts")) == (
        "messages[2].content is 5; it must be text or a list of parts",
        "messages[2].content",
    )


def test_null_counts_as_absent() -> None:
    fields = parse_fields(b'{"a": null}')
    assert [fields.text("a"), fields.flag("a"), fields.whole("b", 0), fields.object("a")] == 4 * [None]
    assert "a" not in fields
    fields.refuse("a", "no reason")


def test_a_mapping_has_no_fields_of_its_own() -> None:
    fields = parse_fields(b'{"schema": {"type": "object", "anything": 1}, "wrong": 1}')
    assert fields.mapping("schema") == {"type": "object", "anything": 1}
    assert fields.mapping("absent") is None
    assert "it must be an object" in refusal(lambda: fields.mapping("wrong"))[0]
    assert fields._unknown() == []


def test_a_refused_field_may_have_its_neutral_value() -> None:
    fields = parse_fields(b'{"best_of": 1, "store": false}')
    fields.refuse("best_of", "one is enough", 1)
    assert "best_of is not supported" in refusal(lambda: fields.refuse("best_of", "one is enough", True))[0]


def test_unknown_fields_are_in_the_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        fields = await read_fields(Request(scope, receive))
        fields.whole("n", 1)
        fields.object("inner")
        fields.ignore("user")
        fields.log_unknown()
        await Response()(scope, receive, send)

    body = b'{"n": 1, "odd\\n": 2, "inner": {"deep": 1}, "user": "me"}'
    with caplog.at_level(logging.INFO, "npqwen.server.exchange"):
        call(Exchanges(application), "POST", "/x", None, body)
        call(Exchanges(application), "POST", "/x", None, b'{"n": 1}')
    first, second = (record.message for record in caplog.records)
    assert re.fullmatch(r"POST /x 200, \d\.\d\d s, ignored odd , inner\.deep, req_\w+", first)
    assert re.fullmatch(r"POST /x 200, \d\.\d\d s, req_\w+", second)
