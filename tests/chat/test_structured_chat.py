"""Answers of guaranteed structure: with and without thinking, beside tools, and as calls."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from json_validator import is_valid
from noise import Noise
from reciter import Reciter, without_ids

import npqwen
from npqwen.chat.reply_parser import ReplyParser
from npqwen.errors import OptionError
from npqwen.tools.calls import ToolCall

SCHEMA = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}
QUESTION = "What is 17 + 25?"


@dataclass
class Sum:
    sum: int


def get_weather(city: str, days: int = 1) -> str:
    """Get the weather."""
    return f"{days} sunny days in {city}"


def add(a: int, b: int) -> int:
    """Add numbers."""
    return a + b


OBJECT: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "file",
        "parameters": {
            "type": "object",
            "properties": {
                "path": {"type": "string"},
                "mode": {"type": "string", "enum": ["r", "w"]},
                "lines": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
                "limit": {"type": ["integer", "null"]},
                "options": {"$ref": "#/$defs/options"},
            },
            "required": ["path", "mode", "lines", "limit", "options"],
            "$defs": {"options": {"type": "object", "properties": {"deep": {"type": "boolean"}}, "required": ["deep"]}},
        },
    },
}

WITHOUT_TEXT: dict[str, Any] = {
    **OBJECT["function"]["parameters"],
    "properties": {**OBJECT["function"]["parameters"]["properties"], "path": {"enum": ["/", "/home", 3]}},
}


@pytest.mark.parametrize("thinking", [True, False, None])
@pytest.mark.parametrize("structured", [True, False])
def test_a_schema_leaves_the_thinking_as_it_is(thinking: bool | None, structured: bool) -> None:
    """Complaint: JSON lands in the reasoning; the schema is ignored without thinking; it switches thinking off."""
    options: dict[str, Any] = {"schema": SCHEMA} if structured else {}
    thought = "" if thinking is False else "<think>\nHm, {so}.\n</think>\n\n"
    reply = Reciter(thought + '{"sum": 42}').chat(QUESTION, thinking=thinking, **options)
    assert reply.reasoning == ("" if thinking is False else "Hm, {so}.")
    assert reply.text == '{"sum": 42}'
    assert reply.parsed == ({"sum": 42} if structured else None)
    words = Reciter(thought + "It is 42.").chat(QUESTION, thinking=thinking, **options)
    assert words.reasoning == reply.reasoning
    if structured:
        assert is_valid(json.loads(words.text), SCHEMA)
    else:
        assert words.text == "It is 42."


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("structured", [True, False])
def test_the_four_combinations_with_the_example_model(
    thinking: bool, structured: bool, tiny: Callable[[int], Path]
) -> None:
    with npqwen.load(tiny(4), threads=1) as model:
        options: dict[str, Any] = {"schema": Sum} if structured else {}
        reply = model.chat(QUESTION, thinking=thinking, seed=1, **options)
        plain = model.chat(QUESTION, thinking=thinking, seed=1)
    assert reply.reasoning == plain.reasoning == ("17 + 20 = 37. 37 + 5 = 42." if thinking else "")
    if structured:
        assert json.loads(reply.text) == {"sum": reply.parsed.sum}
        assert isinstance(reply.parsed, Sum)
    else:
        assert reply.text == "17 + 25 = 42"


@pytest.mark.parametrize(
    ("template", "prompt_thinks"), [("thinking-2507", True), ("instruct-2507", False), ("coder", False)]
)
def test_models_that_always_or_never_think(template: str, prompt_thinks: bool) -> None:
    script = "Hm.\n</think>\n\nYes." if prompt_thinks else "<think>Hm"
    reply = Reciter(script, template=template).chat(QUESTION, schema=SCHEMA)
    assert reply.reasoning == ("Hm." if prompt_thinks else "")
    assert is_valid(reply.parsed, SCHEMA)


def test_the_soft_switch_works_with_a_schema() -> None:
    reply = Reciter("<think>\n\n</think>\n\nYes.").chat(f"{QUESTION} /no_think", schema=SCHEMA)
    assert reply.reasoning == ""
    assert is_valid(reply.parsed, SCHEMA)


def test_budget_loop_guard_and_ctrl_c_lead_from_thinking_to_the_structure() -> None:
    reply = Reciter("<think>\n" + "Hm. " * 100).chat(QUESTION, schema=SCHEMA, thinking_budget=6)
    assert "limited time" in reply.reasoning
    assert is_valid(reply.parsed, SCHEMA)
    guard = npqwen.LoopGuard(thinking_tokens=30)
    looping = Reciter("<think>\n" + "Hm. " * 100).chat(QUESTION, schema=SCHEMA, loop_guard=guard)
    assert is_valid(looping.parsed, SCHEMA)


def test_text_that_was_cut_off_is_not_parsed() -> None:
    text = '{"sum": 4217}'
    assert Reciter(text).chat(QUESTION, schema=SCHEMA, thinking=False, max_tokens=6).parsed is None
    stopped = Reciter(text).chat(QUESTION, schema=SCHEMA, thinking=False, stop="21")
    assert (stopped.text, stopped.finish_reason, stopped.parsed) == ('{"sum": 4', "stop", None)
    assert Reciter(text).chat(QUESTION, schema=SCHEMA, thinking=False).parsed == {"sum": 4217}


def test_tags_in_strings_of_the_json_are_text() -> None:
    text = '{"a": "<tool_call> <think> x </think> `<tool_call>`"}'
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    start, encode = '{"a": "', Reciter().tokenizer.encode
    spelled = encode(start) + [id for letter in text.removeprefix(start) for id in encode(letter)]
    reply = Reciter(spelled).chat(QUESTION, schema=schema, thinking=False, tools=[add])
    assert reply.text == text
    assert reply.parsed == json.loads(text)
    parser = ReplyParser(structured=True)
    pieces = [piece for letter in "\n\n" + text for piece in parser.push(letter)] + parser.finish()
    assert "".join(piece.text for piece in pieces if isinstance(piece, npqwen.Text)) == text


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
VALUES = "<parameter=a>\n1\n</parameter>\n<parameter=b>\n2\n</parameter>\n"
TAGS = f"<tool_call>\n<function=add>\n{VALUES}</function>\n</tool_call>"
STYLES = [("hybrid", CALL), ("coder", TAGS)]


@pytest.mark.parametrize(("template", "call"), STYLES)
@pytest.mark.parametrize("choice", ["required", "add"])
def test_a_call_can_be_required(template: str, call: str, choice: str) -> None:
    expected = [ToolCall("add", {"a": 1, "b": 2})]
    options: dict[str, Any] = {"tools": [add], "tool_choice": choice}
    if template == "hybrid":
        options["thinking"] = False
    reply = Reciter(call, template=template).chat(QUESTION, **options)
    assert without_ids(reply.tool_calls) == expected
    assert (reply.text, reply.finish_reason, reply.parsed) == ("", "tool_calls", None)
    words = Reciter("I cannot. " + call, template=template).chat(QUESTION, **options)
    assert {type(one.arguments["a"]) for one in words.tool_calls} == {int}
    assert words.text == ""


@pytest.mark.parametrize("template", ["hybrid", "coder", "thinking-2507", "instruct-2507"])
def test_required_calls_follow_the_tools_schemas(template: str) -> None:
    tools: list[Any] = [OBJECT, get_weather]
    if template == "coder":  # strings end at a closing tag, which noise does not write
        tools = [{**OBJECT, "function": {**OBJECT["function"], "parameters": WITHOUT_TEXT}}]
    complete = 0
    for seed in range(12):
        model = Noise("</think>\n\n" if template == "thinking-2507" else "", template=template, seed=seed)
        reply = model.chat(QUESTION, tools=tools, tool_choice="required", thinking=None, seed=seed, temperature=1.0,
                           max_tokens=600)  # fmt: skip
        if reply.finish_reason == "length":
            continue
        assert reply.text == ""
        assert reply.tool_calls
        for call in reply.tool_calls:
            if call.name == "file":
                assert is_valid(call.arguments, tools[0]["function"]["parameters"]), call
            else:
                assert call.name == "get_weather"
                assert isinstance(call.arguments["city"], str)
                assert isinstance(call.arguments.get("days", 1), int)
        complete += 1
    assert complete >= 2


@pytest.mark.parametrize(("template", "call"), STYLES)
def test_a_named_tool_is_called_after_the_thinking(template: str, call: str) -> None:
    if template == "hybrid":
        reply = Reciter("<think>\nI add.\n</think>\n\nWell").chat(QUESTION, tools=[add, get_weather], tool_choice="add")
        assert reply.reasoning == "I add."
    else:
        reply = Reciter("Well", template=template).chat(QUESTION, tools=[add, get_weather], tool_choice="add")
    assert {one.name for one in reply.tool_calls} == {"add"}


@pytest.mark.parametrize(("template", "call"), STYLES)
def test_no_call_can_be_demanded(template: str, call: str) -> None:
    model = Reciter(call, template=template)
    reply = model.chat(QUESTION, tools=[add], tool_choice="none")
    assert reply.tool_calls == []
    assert "add" in reply.text
    assert "Tools" in model.prompts[0]


@pytest.mark.parametrize(("template", "call"), STYLES)
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_calls_can_be_limited_to_one(template: str, call: str, choice: str) -> None:
    two = f"{call}\n{call}"
    options: dict[str, Any] = {"tools": [add], "tool_choice": choice}
    assert len(Reciter(two, template=template).chat(QUESTION, **options).tool_calls) == 2
    reply = Reciter(two, template=template).chat(QUESTION, parallel_tool_calls=False, **options)
    assert without_ids(reply.tool_calls) == [ToolCall("add", {"a": 1, "b": 2})]
    assert reply.finish_reason == "tool_calls"
    assert len(reply.messages[0]["tool_calls"]) == 1


def test_two_calls_in_one_block_are_limited_to_one() -> None:
    block = '<tool_call>\n[{"name": "add", "arguments": {}}, {"name": "add", "arguments": {}}]\n</tool_call>'
    assert len(Reciter(block).chat(QUESTION, tools=[add], parallel_tool_calls=False).tool_calls) == 1


def test_a_required_call_is_made_once() -> None:
    model = Reciter(CALL, '{"sum": 3}')
    reply = model.chat(QUESTION, tools=[add], tool_choice="required", run_tools=True, schema=Sum, thinking=False)
    assert [result.content for result in reply.tool_results] == ["3"]
    assert reply.parsed == Sum(3)
    assert reply.finish_reason == "stop"


@pytest.mark.parametrize(("template", "call"), STYLES)
def test_with_tools_and_a_schema_the_answer_is_calls_or_json(template: str, call: str) -> None:
    options: dict[str, Any] = {"tools": [add], "schema": SCHEMA, "seed": 1}
    if template == "hybrid":
        options["thinking"] = False
    called = Reciter(call, template=template).chat(QUESTION, **options)
    assert without_ids(called.tool_calls) == [ToolCall("add", {"a": 1, "b": 2})]
    assert called.parsed is None
    answered = Reciter('{"sum": 3}', template=template).chat(QUESTION, **options)
    assert (answered.tool_calls, answered.parsed) == ([], {"sum": 3})
    neither = Reciter("It is 3.", template=template).chat(QUESTION, **options)
    assert neither.tool_calls or is_valid(neither.parsed, SCHEMA)
    none = Reciter(call, template=template).chat(QUESTION, tool_choice="none", **options)
    assert is_valid(none.parsed, SCHEMA)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tool_choice": "required"}, "tool_choice is 'required', but there are no tools"),
        (
            {"tool_choice": "sub", "tools": [add]},
            "tool_choice is 'sub'; it must be auto, none, required or one of the tools add",
        ),
        ({"tool_choice": 1, "tools": [add]}, "tool_choice is 1; it must be auto, none, required or a tool's name"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls is 'no'; it must be True or False"),
        ({"schema": SCHEMA, "regex": "a"}, "schema and regex exclude each other; give one of them"),
    ],
)
def test_impossible_demands_are_refused(options: Any, message: str) -> None:
    with pytest.raises(OptionError) as refused:
        Reciter("x").chat(QUESTION, **options)
    assert str(refused.value) == message


def test_schemas_of_tools_are_followed_as_far_as_they_are_known_or_exactly() -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    parameters["dependentRequired"] = {"a": []}
    tool: dict[str, Any] = {"name": "f", "parameters": parameters}
    reply = Reciter("x").chat(QUESTION, tools=[tool], tool_choice="f", thinking=False)
    assert isinstance(reply.tool_calls[0].arguments["a"], int)
    problem = r'the schema of the tool f cannot be used: Unimplemented keys: \["dependentRequired"\]'
    with pytest.raises(OptionError, match=problem):
        Reciter("x").chat(QUESTION, tools=[{**tool, "strict": True}], tool_choice="f")


def test_a_conversation_keeps_its_options_and_its_session() -> None:
    model = Reciter('{"sum": 1}', "Words.", '{"sum": 3}')
    talk = model.conversation(schema=SCHEMA, thinking=False)
    assert talk.send("a").parsed == {"sum": 1}
    assert talk.send("b", schema=None).text == "Words."
    assert talk.send("c", schema=Sum).parsed == Sum(3)
    assert model.read[1] < len(model.prompt_ids[1])
    assert [message["content"] for message in talk.messages[1::2]] == ['{"sum": 1}', "Words.", '{"sum": 3}']


def test_events_and_async_answers() -> None:
    import asyncio

    async def read() -> list[Any]:
        return [event async for event in Reciter('{"sum": 42}').stream_chat(QUESTION, schema=Sum, thinking=False)]

    events = asyncio.run(read())
    assert "".join(event.text for event in events if isinstance(event, npqwen.Text)) == '{"sum": 42}'
    assert events[-1].reply.parsed == Sum(42)


def test_values_between_tags_are_text_until_their_closing_tag() -> None:
    values = "<parameter=city>\nNew\n\nYork </param> \"<b>\"\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
    call = f"<tool_call>\n<function=get_weather>\n{values}</function>\n</tool_call>"
    reply = Reciter(call, template="coder").chat(QUESTION, tools=[get_weather, add], tool_choice="required")
    assert without_ids(reply.tool_calls) == [ToolCall("get_weather", {"city": 'New\n\nYork </param> "<b>"', "days": 3})]


@pytest.mark.parametrize("name", ["default", "enum", "const", "nullable", "properties"])
def test_a_parameter_that_may_be_null_may_have_the_name_of_a_keyword(name: str) -> None:
    parameter = {"type": "integer", "nullable": True}
    parameters = {"type": "object", "properties": {name: parameter}, "required": [name]}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    for template, call in (
        ("hybrid", f'{{"name": "f", "arguments": {{"{name}": null}}}}'),
        ("coder", f"<function=f>\n<parameter={name}>\nnull\n</parameter>\n</function>"),
    ):
        model = Reciter(f"<tool_call>\n{call}\n</tool_call>", template=template)
        reply = model.chat(QUESTION, tools=[tool], tool_choice="required", max_tokens=80)
        assert without_ids(reply.tool_calls) == [ToolCall("f", {name: None})]
