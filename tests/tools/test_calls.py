"""Values that a model writes without their types, and the type that the tool's schema gives them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from npqwen.chat.messages import checked
from npqwen.tools.calls import ToolCall, read_calls
from npqwen.tools.parameter_value import parse_value, stays_text


@pytest.mark.parametrize(
    ("value", "schema", "expected"),
    [
        ("5", {"type": "string"}, "5"),
        (" a ", {"type": "string"}, " a "),
        ("5", {"type": "integer"}, 5),
        (" -5\n", {"type": "integer"}, -5),
        ("5.0", {"type": "integer"}, 5),
        ("5.5", {"type": "integer"}, "5.5"),
        ("five", {"type": "integer"}, "five"),
        ("", {"type": "integer"}, ""),
        ("True", {"type": "integer"}, "True"),
        ("2.5e3", {"type": "number"}, 2500.0),
        ("7", {"type": "number"}, 7),
        ("NaN", {"type": "number"}, "NaN"),
        ("1e999", {"type": "number"}, "1e999"),
        ("9" * 5000, {"type": "integer"}, "9" * 5000),
        ("true", {"type": "boolean"}, True),
        ("False", {"type": "boolean"}, False),
        ("yes", {"type": "boolean"}, "yes"),
        ("1", {"type": "boolean"}, "1"),
        ("null", {"type": ["string", "null"]}, None),
        ("None", {"type": "integer", "nullable": True}, None),
        ("null", {"type": "string"}, "null"),
        ('["a", 1]', {"type": "array"}, ["a", 1]),
        ("['a', True, None]", {"type": "array"}, ["a", True, None]),
        ("('a', 1)", {"type": "array"}, ["a", 1]),
        ("[1", {"type": "array"}, "[1"),
        ('{"a": "b & c"}', {"type": "object"}, {"a": "b & c"}),
        ("[1]", {"type": "object"}, "[1]"),
        ("{1}", {"type": "object"}, "{1}"),
        ("'\\d'", {"type": "object"}, "'\\d'"),
        ("[" * 100_000, {"type": "array"}, "[" * 100_000),
        ("__import__('os')", {"type": "object"}, "__import__('os')"),
        ("2", {"enum": [1, 2]}, 2),
        ("b", {"enum": ["a", "b"]}, "b"),
        ("None", {"enum": ["a", None]}, None),
        ("c", {"enum": ["a", "b"]}, "c"),
        ("5", {"const": "5"}, "5"),
        ("5", {"const": 5}, 5),
        ("5", {"anyOf": [{"type": "string"}, {"type": "integer"}]}, 5),
        ("x", {"anyOf": [{"type": "string"}, {"type": "integer"}]}, "x"),
        ("5", {}, 5),
        ("five", {}, "five"),
        ("5", True, "5"),
        ("5", {"type": 3}, 5),
    ],
)
def test_a_value_gets_the_type_of_its_schema_or_stays_text(value: str, schema: Any, expected: Any) -> None:
    found = parse_value(value, schema)
    assert found == expected
    assert type(found) is type(expected)


def test_a_value_that_is_certain_to_be_text_is_what_it_spells() -> None:
    schemas: list[Any] = [
        True,
        {},
        {"type": "string"},
        {"type": ["string", "null"]},
        {"type": "string", "nullable": True},
        {"anyOf": [{"type": "string"}, {"type": "null"}]},
        {"anyOf": [{"type": "string"}, {"type": "integer"}]},
        {"type": "string", "enum": ["null", "b"]},
        {"enum": [1, 2]},
        {"type": "string", "const": "5"},
        {"type": ["string", "integer"]},
        {"type": "null"},
        {"type": "integer"},
        {"anyOf": []},
    ]
    values = ["", "5", " 5", "null", " None\n", "nullable", "Nonesuch", "b", "a b", '{"a": 1}', "true"]
    for schema in schemas:
        for value in values:
            certain = [stays_text(value[:length], schema) for length in range(len(value) + 1)]
            assert certain == sorted(certain)  # what is certain stays so
            if certain[-1]:
                assert parse_value(value, schema) == value
    assert stays_text("", {"type": "string"})
    assert stays_text("nullab", {"anyOf": [{"type": "string"}, {"type": "null"}]})


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_lacks_are_no_arguments(number: str) -> None:
    block = f'{{"name": "f", "arguments": {{"a": {number}}}}}'
    assert read_calls(block, {}) == ([], block)
    assert parse_value(number, {}) == number


def test_a_value_without_its_end_is_not_an_argument_of_a_text_that_was_cut_off() -> None:
    for block in (
        "<function=f>\n<parameter=a>\nIt writes\n</function>\nand",
        "<function=f>\n<parameter=a>\n1\n<parameter=b>\n2\n</parameter>\n</function>",
    ):
        assert read_calls(block, {}, complete=False) == ([], block)
        assert len(read_calls(block, {})[0]) == 1


def test_tagged_values_of_a_tool_are_typed_and_those_of_others_are_text() -> None:
    block = "<function={}>\n<parameter=days>\n3\n</parameter>\n<parameter=other>\n4\n</parameter>\n</function>"
    schemas: dict[str, Any] = {"f": {"properties": {"days": {"type": "integer"}}}, "broken": {"properties": [1]}}
    assert read_calls(block.format("f"), schemas) == ([ToolCall("f", {"days": 3, "other": "4"})], "")
    for name in ("g", "broken"):
        assert read_calls(block.format(name), schemas) == ([ToolCall(name, {"days": "3", "other": "4"})], "")


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"$ref": "#/$defs/Version", "default": "1.0"}, "2.0"),
        ({"allOf": [{"$ref": "#/$defs/Version"}]}, "2.0"),
        ({"anyOf": [{"$ref": "#/$defs/Version"}, {"type": "null"}]}, "2.0"),
        ({"$ref": "#/$defs/Other"}, "2.0"),
        ({"$ref": "#/$defs/Factor"}, 2.0),
        ({"$ref": "#/$defs/None"}, 2.0),
        ({"$ref": "#/$defs/Circle"}, 2.0),
        ({"$ref": 3}, 2.0),
        ({"allOf": [3]}, 2.0),
    ],
)
def test_a_value_gets_the_type_that_its_schema_refers_to(schema: dict[str, Any], expected: Any) -> None:
    parts = {
        "Version": {"enum": ["1.0", "2.0"], "type": "string"},
        "Other": {"$ref": "#/$defs/Version"},
        "Factor": {"type": "number"},
        "Circle": {"$ref": "#/$defs/Circle"},
    }
    block = "<function=f>\n<parameter=a>\n2.0\n</parameter>\n</function>"
    found, _ = read_calls(block, {"f": {"properties": {"a": schema}, "$defs": parts}})
    assert found == [ToolCall("f", {"a": expected})]
    assert type(found[0].arguments["a"]) is type(expected)


@pytest.mark.parametrize("levels", [101, 700, 5_000, 100_000])
def test_arguments_nested_too_deeply_are_not_a_call(levels: int) -> None:
    deep = "[" * levels + "]" * levels
    for block in (
        "[" * levels,
        deep,
        f'{{"name": "f", "arguments": {{"a": {deep}}}}}',
        f'{{"name": "f", "arguments": {{"a": {"[" * levels}',
        json.dumps({"name": "f", "arguments": f'{{"a": {deep}}}'}),
    ):
        assert read_calls(block, {}) == ([], block)
    assert parse_value(deep, {"type": "array"}) == deep


def test_a_call_may_be_nested_and_its_message_fits_a_prompt() -> None:
    deep = "[" * 98 + "]" * 98
    ((call,), rest) = read_calls(f'{{"name": "f", "arguments": {{"a": {deep}}}}}', {})
    assert (call.arguments, rest) == ({"a": json.loads(deep)}, "")
    message = {"role": "assistant", "content": "", "tool_calls": [call.as_message()]}
    assert checked([message]) == [message]


def test_a_call_as_a_message_has_the_form_that_templates_read() -> None:
    call = ToolCall("f", {"a": 1}, "call_3")
    function = {"name": "f", "arguments": {"a": 1}}
    assert call.as_message() == {"id": "call_3", "type": "function", "function": function}
    assert ToolCall("f", {"a": 1}).as_message() == {"type": "function", "function": function}


def test_a_call_that_is_changed_leaves_its_message_as_it_was() -> None:
    call = ToolCall("f", {"a": [2, 1]})
    message = call.as_message()
    call.arguments["a"].sort()
    assert message["function"]["arguments"] == {"a": [2, 1]}


def test_lone_surrogates_are_replaced() -> None:
    plain = r'{"name": "f\ud83d", "arguments": {"a\udc00": ["x\ud83d y", "\ud83d\ude00"]}}'
    assert read_calls(plain, {}) == ([ToolCall("f?", {"a?": ["x? y", "😀"]})], "")
    in_a_string = r'{"name": "f", "arguments": "{\"a\": \"\\ud83d\"}"}'
    assert read_calls(in_a_string, {}) == ([ToolCall("f", {"a": "?"})], "")
    assert parse_value(r'["\ud83d"]', {"type": "array"}) == ["?"]
    assert parse_value(r"['\ud83d']", {"type": "array"}) == ["?"]
